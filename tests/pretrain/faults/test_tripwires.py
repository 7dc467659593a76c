"""What no training should do is said once, and what it may do is not."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from pretrain.evaluation.plausibility import drawn_loss
from pretrain.faults.tripwires import Tripwires
from pretrain.model.transformer import LlamaConfig
from pretrain.run.metrics import StepRecord

MODEL = LlamaConfig(dim=32, n_layers=1, n_heads=2, vocab_size=4096)
RECORD = StepRecord(
    step=1, loss=drawn_loss(MODEL), grad_norm=1.0, learning_rate=1e-3, tokens=1, tokens_per_second=900.0, batch_hash="",
    step_seconds=1.0, data_wait_seconds=0.0, forward_backward_seconds=1.0, optimizer_seconds=0.0, peak_memory_bytes=1,
    padding_share=0.0, tokens_per_source={}, epoch_per_source={}, skipped_records=0, replayed_entries=0,
)  # fmt: skip


def told(*changes: dict[str, Any], drawn: bool = True) -> list[tuple[int, str]]:
    """Return step and kind of what is told of steps that differ from an ordinary one."""
    wires = Tripwires(MODEL, drawn)
    records = [dataclasses.replace(RECORD, **{"step": step, **change}) for step, change in enumerate(changes, 1)]
    return [(event.step, event.kind) for record in records for event in wires.note(record)]


def test_a_first_loss_that_cannot_be_is_told() -> None:
    assert told({}, {"loss": 50.0}) == []
    for loss in (3.0, 12.0, math.inf, math.nan):
        assert told({"loss": loss}) == [(1, "doubt")]
        assert told({"loss": loss}, drawn=False) == []
    assert told({"loss": math.nan, "without_targets": True}) == []


def test_a_gradient_of_nothing_is_told_once() -> None:
    assert told({}, {"grad_norm": 0.0}, {"grad_norm": 0.0}, {}, {"grad_norm": 0.0}) == [
        (2, "no_gradient"), (5, "no_gradient"),
    ]  # fmt: skip
    assert told({"grad_norm": math.nan}, {"grad_norm": 1e-30}) == []


def test_a_speed_that_falls_by_a_third_is_told_until_it_recovers() -> None:
    fast, slow = [{"tokens_per_second": 900.0}] * 30, [{"tokens_per_second": 590.0}] * 30
    found = told(*fast, *slow, *fast, *slow)
    assert [kind for _, kind in found] == ["slowdown", "slowdown"]
    assert 30 < found[0][0] <= 50
    assert 90 < found[1][0] <= 110
    assert told(*fast, *[{"tokens_per_second": 610.0}] * 60) == []
    passed_over = [{"tokens_per_second": 90_000.0, "passed_over": True}] * 30
    assert told(*fast, *passed_over, *fast) == []
    assert told(*fast, *[{"tokens_per_second": 300.0, "stage": 1}] * 60) == [], "another stage has another speed"
    assert told(*fast, {"tokens_per_second": 1.0}, *fast) == []
