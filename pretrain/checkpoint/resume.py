"""Which checkpoint is whole, decided by all ranks together. store -> resume -> {trainer, evaluation}."""

from __future__ import annotations

from pretrain.checkpoint.store import Checkpoint, CheckpointStore
from pretrain.topology import Topology
from shards import CheckpointError


def newest_valid(store: CheckpointStore, topology: Topology) -> tuple[Checkpoint | None, dict[int, list[str]]]:
    """Find the newest checkpoint whose files are all as they were saved; every rank checks a share of them.

    Returns:
        It, None if there are no checkpoints at all; and what is wrong with each newer one, a sentence a file. Those are
        to be set aside only now that a whole one is found: a disk that cannot be read today may be whole tomorrow.
    Raises:
        CheckpointError: if there are checkpoints and none of them is whole.
    """
    steps = topology.broadcast_object(topology.together(lambda: store.steps() if topology.is_main else []))
    damaged: dict[int, list[str]] = {}
    for step in reversed(steps):
        if not (found := damage_of(store, step, topology)):
            return store.open(step), damaged
        damaged[step] = found
    if damaged or store.has_damaged():
        sentences = "; ".join(sentence for found in damaged.values() for sentence in found)
        raise CheckpointError(
            f"none of the checkpoints in {store.root} is whole ({sentences});"
            " restore one from a copy, or start over with --fresh"
        )
    return None, damaged


def damage_of(store: CheckpointStore, step: int, topology: Topology) -> list[str]:
    """Says, on every rank, what is wrong with a checkpoint's files. Every rank calls it, and checks a share of them."""
    try:
        own = store.open(step).broken_files(topology.rank, topology.world_size)
    except CheckpointError as error:
        own = [str(error)]
    return [sentence for part in topology.gather_objects(own) for sentence in part]
