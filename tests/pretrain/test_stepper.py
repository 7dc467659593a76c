"""A run's state after a batch, and what becomes of the weights' moving average."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from pretrain.checkpoint.state import RunState
from pretrain.ema import EmaConfig
from pretrain.faults.spikes import SpikeWatch
from pretrain.feed import StepBatch
from pretrain.optim import OptimConfig, SchedulePart
from pretrain.run.metrics import Meter
from pretrain.step_stats import StepStats
from pretrain.stepper import Stepper, after


def batch(tokens_per_source: dict[str, int], stage: int = 0) -> StepBatch:
    return StepBatch(
        tokens=torch.zeros(0), segment_ids=torch.zeros(0), stage=stage, n_targets=0,
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


def stepper_of(config: Any, engine: Any, state: RunState) -> Stepper:
    return Stepper(config, engine, 100, state.step, SpikeWatch(4, 8.0, []))


def test_an_average_begins_where_the_config_says_so_and_is_dropped_where_it_does_not() -> None:
    done: list[object] = []
    average = SimpleNamespace(update=done.append, drop=lambda: done.append("dropped"))
    applied = iter([True, False, True, True, True, True])

    def train_step(*arguments: object) -> StepStats:
        return StepStats(1.0, 0.0, 1.0, applied=next(applied))

    adopted: list[object] = []
    engine: Any = SimpleNamespace(
        average=average,
        train_step=train_step,
        adopt=adopted.append,
        set_batches=lambda *sizes: None,
        topology=SimpleNamespace(is_main=False, dp_size=1),
    )
    sizes = {"micro_batch_size": lambda dp_size: 1, "micro_steps": lambda dp_size: 1}
    stages = [SimpleNamespace(model=model, **sizes) for model in ("ours", "theirs")]  # the second after step 10
    state = RunState(4, 0, {}, "", restarts=0, config_hash="", tp_size=1, dp_size=1, zero_stage=1)
    for ema, steps in ((EmaConfig(decay=0.5), 3), (None, 2), (EmaConfig(decay=0.5), 1)):
        config: Any = SimpleNamespace(
            train=SimpleNamespace(ema=ema, on_spike="mark"), data=SimpleNamespace(skip_steps=()), all_stages=stages,
            stage_of=lambda step: stages[step > 10], schedule=[SchedulePart(0, OptimConfig())],
        )  # fmt: skip
        for _ in range(steps):
            state = stepper_of(config, engine, state).step_on(batch({"pile": 1}), state, Meter()).state
    assert done == [1.0, 1 / 1.5, "dropped", 1.0]
    assert state.average_total == 1
    assert (state.step, adopted) == (10, [])
    applied = iter([False, True])
    for _ in range(2):  # each in a start of its own, the first of which resumes where the stage begins
        state = stepper_of(config, engine, state).step_on(batch({"pile": 1}, stage=1), state, Meter()).state
    assert (done[4:], adopted) == (["dropped", 1.0], ["theirs"])
