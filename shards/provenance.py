"""What a step was trained on, made again from a saved state. loader -> provenance -> pretrain.provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shards.batch import Batch
from shards.config import DataConfig
from shards.errors import CheckpointError
from shards.fingerprint import check_fingerprint
from shards.loader import Loader
from shards.stages import Stage


def batch_after(
    config: DataConfig,
    global_batch_size: int,
    seed: int,
    state: Mapping[str, object] | None,
    batches: int,
    fingerprint: Mapping[str, object] | None = None,
    stages: Sequence[Stage] = (),
    step: int | None = None,
    since: int | None = None,
) -> Batch:
    """Make a whole global batch again, as the ranks of a run shared it.

    Its `origins()` say where its pieces come from.

    Args:
        config, global_batch_size, seed: the run's.
        state: all lanes' cursors, saved at or before that batch; None = the run's start.
        batches: global batches between the state and the requested one.
        fingerprint: the fingerprint of the run's loader, if known, so that a difference is named.
        stages: the run's, after the first.
        step: the last optimizer step, counted from 1, for which the fingerprint holds: stages that begin after it may
            differ from the run's. None = none may.
        since: optimizer steps done at the state, if they are known beside it.
    Raises: ConfigError or ShardError if the data has changed; CheckpointError if the state belongs to another run, or
        the run ends before that batch.
    """
    config = config.model_copy(update={"max_bad_records": None})  # their number must not stop a look back
    with Loader(config, global_batch_size, seed, stages=stages) as loader:
        if fingerprint is not None:
            check_fingerprint(fingerprint, loader.fingerprint, step)
        if state is not None:
            loader.load_state_dict(state, since)
        for number, batch in enumerate(loader):
            if number == batches:
                return batch
    raise CheckpointError(f"the run's data ends less than {batches + 1} batches after the state")
