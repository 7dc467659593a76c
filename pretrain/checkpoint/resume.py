"""Takes a run up again from its newest whole checkpoint, on all ranks. store -> resume -> {assembly, evaluation}.

Rank 0 says which checkpoints there are; every rank compares a share of the files with their hashes. All ranks therefore
choose the same one, and each file is read for that once. A checkpoint of another layout is converted on the way.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pretrain.checkpoint.state import Layout, RunState, read_data, read_state
from pretrain.checkpoint.store import Checkpoint, CheckpointStore
from pretrain.checkpoint.universal import find_or_convert
from pretrain.topology import Topology
from shards import CheckpointError, Loader, check_fingerprint

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """The checkpoint that a start goes on from.

    Attributes:
        checkpoint: None if there is none at all.
        damaged: each newer checkpoint that is not whole, and what is wrong with it. They are to be set aside only once
            nothing can refuse the start any more: a disk that cannot be read today may be whole tomorrow.
    """

    checkpoint: Checkpoint | None
    damaged: dict[int, str] = field(default_factory=dict)

    def set_damaged_aside(self, store: CheckpointStore) -> None:
        """Set the damaged checkpoints aside and remove what killed saves left; on rank 0."""
        for step, sentences in self.damaged.items():
            aside = store.set_aside(step)
            _logger.warning("checkpoint of step %d is damaged, now in %s: %s", step, aside, sentences)
        store.discard_incomplete()


def choose(store: CheckpointStore, topology: Topology) -> Choice:
    """Choose the newest checkpoint whose files are all as they were saved; every rank calls it.

    Raises:
        CheckpointError: if there are checkpoints and none of them is whole.
    """
    steps = topology.broadcast_object(topology.together(lambda: store.steps() if topology.is_main else []))
    damaged: dict[int, str] = {}
    for step in reversed(steps):
        try:
            return Choice(open_verified(store, step, topology), damaged)
        except CheckpointError as error:
            damaged[step] = str(error)
    if damaged or store.has_damaged():
        raise CheckpointError(
            f"none of the checkpoints in {store.root} is whole ({'; '.join(damaged.values())});"
            " restore one from a copy, or start over with --fresh"
        )
    return Choice(None)


def open_verified(store: CheckpointStore, step: int, topology: Topology) -> Checkpoint:
    """Open a checkpoint whose files are all as they were saved. Every rank calls it, and checks a share of them.

    Raises:
        CheckpointError: on all ranks, if one of them finds anything wrong; with a sentence for each file.
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
    """An engine that takes its weights and optimizer state from a checkpoint; every rank calls both methods."""

    def load(self, folder: Path) -> None:
        """Load a checkpoint of this layout."""

    def load_universal(self, folder: Path) -> None:
        """Load what `universal` made of a checkpoint of another layout."""


@dataclass(frozen=True)
class Restorer:
    """Restores a run's parts from a checkpoint that was chosen.

    Args:
        store: where the checkpoint lies, and its conversion if it needs one.
        layout: what the engine's files are to fit.
        conversion: what to do a conversion in; it may take minutes.
    """

    store: CheckpointStore
    layout: Layout
    topology: Topology
    conversion: AbstractContextManager[None]

    def restore(self, checkpoint: Checkpoint, engine: LoadableEngine, loader: Loader | None) -> RunState:
        """Restore the loader, then the engine; every rank calls it.

        Args:
            loader: None on the ranks that have none.
        Returns:
            Where the run stands, in the layout that goes on with it.
        Raises:
            ConfigError: if the data is not what it was, or the disk has no room for a conversion.
            CheckpointError: if the checkpoint does not fit the model; like the other, on all ranks.
        """
        state = read_state(checkpoint)
        self.topology.together(lambda: _restore_loader(checkpoint, loader))
        if state.layout == self.layout:
            engine.load(checkpoint.folder)
        else:
            with self.conversion:
                folder = find_or_convert(self.store, checkpoint, state.layout, self.layout, self.topology)
            engine.load_universal(folder)
        _logger.info("resumed after step %d from %s", state.step, checkpoint.folder)
        return state.resumed(self.layout)


def _restore_loader(checkpoint: Checkpoint, loader: Loader | None) -> None:
    if loader:
        data = read_data(checkpoint)
        check_fingerprint(data.fingerprint, loader.fingerprint)
        loader.load_state_dict(data.cursors)
