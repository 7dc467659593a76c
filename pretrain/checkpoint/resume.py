"""Which checkpoint is whole, decided by all ranks together. store -> resume -> {trainer, evaluation}."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from pretrain.checkpoint.store import Checkpoint, CheckpointStore
from pretrain.topology import Topology
from shards import CheckpointError

_logger = logging.getLogger(__name__)


def newest_valid(store: CheckpointStore, topology: Topology) -> Checkpoint | None:
    """The newest checkpoint whose files are all as they were saved; every rank checks a share of them.

    Raises:
        CheckpointError: if there are checkpoints and none of them is whole.
    """
    steps = topology.broadcast_object(store.steps() if topology.is_main else None)
    assert isinstance(steps, list)
    damaged: dict[int, list[str]] = {}
    for step in reversed(steps):
        if not (found := damage_of(store, step, topology)):
            _set_aside(store, damaged, topology)
            return store.open(step)
        damaged[step] = found
    if damaged or list(store.root.glob("*.damaged")):
        sentences = "; ".join(sentence for found in damaged.values() for sentence in found)
        raise CheckpointError(
            f"none of the checkpoints in {store.root} is whole ({sentences});"
            " restore one from a copy, or start over with --fresh"
        )
    return None


def damage_of(store: CheckpointStore, step: int, topology: Topology) -> list[str]:
    """Says, on every rank, what is wrong with a checkpoint's files. Every rank calls it, and checks a share of them."""
    try:
        own = store.open(step).broken_files(topology.rank, topology.world_size)
    except CheckpointError as error:
        own = [str(error)]
    return [sentence for part in topology.gather_objects(own) for sentence in part]


def _set_aside(store: CheckpointStore, damaged: Mapping[int, list[str]], topology: Topology) -> None:
    # Only now that a whole one is found: a disk that cannot be read today may be whole tomorrow
    if topology.is_main:
        for step, sentences in damaged.items():
            aside = store.set_aside(step)
            _logger.warning("checkpoint of step %d is damaged, now in %s: %s", step, aside, "; ".join(sentences))
    topology.barrier()
