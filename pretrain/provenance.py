"""Identify the documents of a step: rebuild its batch from the nearest cursors before it and prove that it is the same.

run folder, shards -> provenance -> commands.provenance.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from pretrain.checkpoint.state import read_data
from pretrain.checkpoint.store import CheckpointConfig, CheckpointStore
from pretrain.feed import chain_hash
from pretrain.run.run_folder import RunFolder
from pretrain.run.step_log import step_of
from shards import Batch, CheckpointError, ConfigError, DataConfig, Stage, Tokenizer, batch_after


def batch_of_step(folder: RunFolder, step: int, stages: Sequence[Stage], seed: int) -> Batch:
    """Rebuild the global batch of a run's `step`-th optimizer step, with all rows of all ranks.

    Args:
        step: counted from 1, as in metrics.jsonl.
        stages: all stages of the run.
        seed: the run's.
    Raises:
        ConfigError: if the run has not reached that step, or its data has changed.
        ShardError: if a shard has changed.
        CheckpointError: if the rebuilt batch does not have the hash that the run recorded.
    """
    trained = folder.metrics.last(step)
    if step < 1 or trained is None or trained["step"] != step:
        newest = folder.metrics.last()
        reached = f"has trained steps 1 to {newest['step']} so far" if newest else "has not trained a step yet"
        raise ConfigError(f"step {step}: the run in {folder.root} {reached}")
    cursors = folder.cursors.last(step - 1)
    state = {key: value for key, value in (cursors or {}).items() if key != "step"}
    since = step_of(cursors) if cursors else 0
    saved, fingerprint = newest_fingerprint(folder) or (step, None)
    (_, data, rows), *later = stages
    known = min(step, saved)  # the last step of which the fingerprint says how its stage was
    batch = batch_after(data, rows, seed, state or None, step - 1 - since, fingerprint, later, known, since)
    _check(folder, step, batch, str(trained["batch_hash"]))
    return batch


def texts(batch: Batch, data: DataConfig) -> Iterator[str]:
    """Decode each piece of a global batch, in the order of `batch.origins()`; only its tokens in the row count."""
    tokenizer, pieces = Tokenizer.of(data), batch.pieces
    for slot, origins in itertools.groupby(batch.origins(), key=lambda origin: origin.slot):
        for piece, _ in enumerate(origins, 1):
            yield tokenizer.decode(batch.tokens[slot][pieces[slot] == piece])  # nothing, if its document is forgotten


def newest_fingerprint(folder: RunFolder) -> tuple[int, dict[str, object]] | None:
    """Read the fingerprint of the run's data from the newest checkpoint, and its step; None if there is none.

    It knows nothing of stages that have begun since; the batch hash proves what it cannot compare.
    """
    store = CheckpointStore(folder.checkpoints, CheckpointConfig())
    steps = store.steps()
    return (steps[-1], read_data(store.open(steps[-1])).fingerprint) if steps else None


def _check(folder: RunFolder, step: int, batch: Batch, batch_hash: str) -> None:
    """Compare a batch with the chain of hashes in metrics.jsonl. Raises CheckpointError if they differ."""
    before = folder.metrics.last(step - 1) if step > 1 else {"step": 0, "batch_hash": ""}
    if before is None or before["step"] != step - 1:
        raise CheckpointError(f"{folder.metrics.path}: step {step - 1} is missing, so step {step} cannot be checked")
    again = chain_hash(str(before["batch_hash"]), batch.row_hash)
    if again != batch_hash:
        raise CheckpointError(
            f"step {step}: rebuilt, its batch hash is {again}, but the run was trained on {batch_hash}; the shards, "
            "the tokenizer or the program have changed"
        )
