"""Resume a run from its newest intact checkpoint, on all ranks together. store -> resume -> {assembly, evaluation}.

Rank 0 lists the checkpoints, and each rank verifies the hashes of a part of the files. All ranks thus choose the same
checkpoint, and each file is read once for it. A checkpoint with another layout is converted on the way.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pretrain.checkpoint.state import RunState, read_data, read_state
from pretrain.checkpoint.store import Checkpoint, CheckpointStore
from pretrain.checkpoint.universal import find_or_convert
from pretrain.topology import Layout, Topology
from shards import CheckpointError, Loader, check_fingerprint

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """The checkpoint that a start resumes from.

    Attributes:
        checkpoint: None if the run has none.
        damaged: what is wrong with each newer checkpoint that is damaged. They are set aside only once nothing can
            refuse the start any more, since a disk that cannot be read today may be readable tomorrow.
    """

    checkpoint: Checkpoint | None
    damaged: dict[int, str] = field(default_factory=dict)

    def set_damaged_aside(self, store: CheckpointStore) -> None:
        """Set the damaged checkpoints aside and remove what killed saves left behind; call it on rank 0."""
        for step, sentences in self.damaged.items():
            aside = store.set_aside(step)
            _logger.warning("checkpoint of step %d is damaged, now in %s: %s", step, aside, sentences)
        store.discard_incomplete()


def choose(store: CheckpointStore, topology: Topology, step: int | None = None) -> Choice:
    """Choose the newest intact checkpoint, or that of a step; every rank calls it.

    Raises:
        CheckpointError: if there are checkpoints but all are damaged, or if that of the step is.
    """
    if step is not None:
        topology.together(lambda: store.find(step))
        return Choice(open_verified(store, step, topology))
    steps = topology.broadcast_object(topology.together(lambda: store.steps() if topology.is_main else []))
    damaged: dict[int, str] = {}
    for step in reversed(steps):
        try:
            return Choice(open_verified(store, step, topology), damaged)
        except CheckpointError as error:
            damaged[step] = str(error)
    if damaged or store.has_damaged():
        raise CheckpointError(
            f"every checkpoint in {store.root} is damaged ({'; '.join(damaged.values())});"
            " restore one from a copy, or start over with --fresh"
        )
    return Choice(None)


def open_verified(store: CheckpointStore, step: int, topology: Topology) -> Checkpoint:
    """Open a checkpoint after verifying all its files. Every rank calls it and checks a part of them.

    Raises:
        CheckpointError: on all ranks, if any of them finds damage, with one sentence per file.
    """
    checkpoint, found = None, []
    try:
        checkpoint = store.open(step)
        found = checkpoint.broken_files(topology.rank, topology.world_size)
    except CheckpointError as error:
        found = [str(error)]
    if sentences := [sentence for part in topology.gather_objects(found) for sentence in part]:
        raise CheckpointError("; ".join(sentences))
    assert checkpoint is not None
    return checkpoint


class LoadableEngine(Protocol):
    """An engine that loads its weights and optimizer state from a checkpoint; every rank calls both methods."""

    def load(self, folder: Path) -> None:
        """Load a checkpoint saved with this layout."""

    def load_universal(self, folder: Path) -> None:
        """Load a folder that `universal` converted from another layout."""


def restore(
    checkpoint: Checkpoint,
    store: CheckpointStore,
    layout: Layout,
    engine: LoadableEngine,
    loader: Loader | None,
    topology: Topology,
    conversion: AbstractContextManager[None],
) -> RunState:
    """Restore a run's loader from its chosen checkpoint, then its engine; every rank calls it.

    Args:
        checkpoint: as `choose` returned it.
        store: holds the checkpoint, and its conversion if it needs one.
        layout: the layout of the engine that loads the files.
        loader: None on ranks without one.
        conversion: a context that surrounds a conversion, which may take minutes.
    Returns:
        The run's state, with the layout that continues it.
    Raises:
        ConfigError: on all ranks, if the data has changed, or the disk has no room for a conversion.
        CheckpointError: on all ranks, if the checkpoint does not fit the model.
    """
    state = read_state(checkpoint)
    topology.together(lambda: _restore_loader(checkpoint, loader))
    if state.layout.has_files_of(layout):
        engine.load(checkpoint.folder)
    else:
        with conversion:
            folder = find_or_convert(store, checkpoint, state.layout, layout, topology)
        engine.load_universal(folder)
    _logger.info("resumed after step %d from %s", state.step, checkpoint.folder)
    return state.resumed(layout)


def _restore_loader(checkpoint: Checkpoint, loader: Loader | None) -> None:
    if loader:
        data = read_data(checkpoint)
        step = read_state(checkpoint).step
        check_fingerprint(data.fingerprint, loader.fingerprint, step)
        loader.load_state_dict(data.cursors, step)
