"""A run's state after a batch."""

from __future__ import annotations

import torch

from pretrain.checkpoint.state import RunState
from pretrain.feed import StepBatch
from pretrain.stepper import after


def batch(tokens_per_source: dict[str, int]) -> StepBatch:
    return StepBatch(
        tokens=torch.zeros(0), segment_ids=torch.zeros(0), stage=0, n_targets=0,
        n_tokens=tokens_per_source["pile"], n_padding=0,
        squared_lengths=0, row_hash=1, trained_hash=1, n_forgotten=0,
        tokens_per_source=tokens_per_source, epoch_per_source={},
        skipped=[], skipped_so_far=0, contaminated=[], replays=0, stop_requested=False, saving=False,
    )  # fmt: skip


def test_a_sub_source_missing_from_a_batch_keeps_its_count() -> None:
    state = RunState(0, 0, {}, "", restarts=0, config_hash="", tp_size=1, dp_size=1, zero_stage=1)
    for counts in ({"pile": 5, "pile/wiki": 5}, {"pile": 3, "pile/code": 3}, {"pile": 2, "pile/wiki": 2}):
        state = after(state, batch(counts))
    assert state.tokens_per_source == {"pile": 10, "pile/wiki": 7, "pile/code": 3}
    assert (state.step, state.tokens) == (3, 10)
