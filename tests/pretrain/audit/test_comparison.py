"""A comparison finds what differs and allows what another layout explains; a verdict claims no more than it shows."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import msgspec
import pytest

from pretrain.audit.comparison import TOLERANCES, Comparison, compare, deviation, obstacles_to_equality
from pretrain.audit.interval import Figures, Interval, Training
from pretrain.audit.replay import Replay
from pretrain.audit.verdict import verdict
from pretrain.config import RunConfig
from pretrain.run.starts import Environment, StartRecord

FROM, STEPS = 10, 6
ENVIRONMENT = Environment(["CPU"], 1, {"torch": "2"}, "varlen")
START = StartRecord(FROM, "", "0.1", "abc", "c0", 1, 2, 1, ENVIRONMENT, ["node"])
CONFIG = RunConfig.model_validate(
    {
        "run": {"name": "x"},
        "model": {"dim": 32, "n_layers": 1, "n_heads": 2, "vocab_size": 64},
        "data": {"seq_len": 8, "tokenizer": "t", "sources": [{"name": "a", "paths": ["x"]}]},
        "train": {"steps": 20, "global_batch_size": 8, "micro_batch_size": 2},
    }
)


def step(number: int, **changes: Any) -> Figures:
    hashes = {"weight_hash": f"w{number}", "optimizer_hash": f"o{number}"}
    return Figures(number, f"b{number}", **{"learning_rate": 1e-3, "loss": 2.0, "grad_norm": 0.5, **hashes, **changes})


def interval(**changes: dict[int, dict[str, Any]]) -> Interval:
    """Return an interval whose hashes are taken at even steps, with changes by figure and step."""
    figures = []
    for number in range(FROM, FROM + STEPS + 1):
        changed = {figure: of_steps[number] for figure, of_steps in changes.items() if number in of_steps}
        unhashed = {"weight_hash": None, "optimizer_hash": None} if number % 2 else {}
        figures.append(step(number, **unhashed | changed))
    return Interval(figures[0], figures[1:])


def compared(found: Interval, obstacles: tuple[str, ...] = (), recorded: Interval | None = None) -> Comparison:
    return compare(recorded or interval(), found, "fp32", list(obstacles))


def test_equal_figures_agree_and_the_verdict_says_what_was_equal() -> None:
    outcome = compared(interval())
    assert outcome.agrees
    said = verdict(outcome)
    assert said.startswith("The run agrees bit for bit in steps 11 to 16")
    assert "moments of the 3 that were hashed" in said
    assert "checkpoint of step 10 holds the weights" in said
    unhashed = interval(weight_hash={FROM: None}, optimizer_hash={FROM: None})
    assert "was taken as it is" in verdict(compared(interval(), recorded=unhashed))


@pytest.mark.parametrize("figure", ["loss", "grad_norm"])
def test_one_bit_of_a_figure_counts_only_where_bits_are_compared(figure: str) -> None:
    value = getattr(step(13), figure)
    # Found from there on, as in a training that has left its course, so that no record is wrong.
    nudged = {number: math.nextafter(value, 10) for number in range(13, 17)}
    found = interval(**{figure: nudged, "weight_hash": {14: "?", 16: "?"}})
    outcome = compared(found)
    assert (outcome.differences[0].step, outcome.differences[0].figure) == (13, figure)
    assert "of step 13 differs" in verdict(outcome)
    assert "so were the weights after step 12" in verdict(outcome)
    assert compared(found, ("layout",)).agrees


@pytest.mark.parametrize("figure", ["loss", "grad_norm"])
@pytest.mark.parametrize("index", range(STEPS))
def test_a_tolerance_is_kept_to_and_grows(figure: str, index: int) -> None:
    limit, number, value = TOLERANCES["fp32"][figure].at(index), FROM + 1 + index, getattr(step(0), figure)
    assert compared(interval(**{figure: {number: value * (1 - 0.99 * limit)}}), ("layout",)).agrees
    outcome = compared(interval(**{figure: {number: value * (1 + 1.01 * limit)}}), ("layout",))
    assert [(found.step, found.figure) for found in outcome.differences] == [(number, figure)]
    assert outcome.deviations[figure] == pytest.approx(1.01 * limit)
    assert f"of step {number} differs by more than another order of summation explains" in verdict(outcome)


def test_tolerances_never_exceed_their_limit_however_long_an_interval_is() -> None:
    for tolerances in TOLERANCES.values():
        for tolerance in tolerances.values():
            assert [tolerance.at(index) for index in (0, 10**6)] == [tolerance.first, tolerance.most]


def test_batches_and_the_first_weights_are_compared_bit_for_bit_in_any_layout() -> None:
    for obstacles in ((), ("layout",)):
        changed = interval()
        changed.steps[2] = msgspec.structs.replace(changed.steps[2], batch_hash="other")
        assert "Step 13 was trained on another batch" in verdict(compared(changed, obstacles))
        other = dataclasses.replace(interval(), before=step(FROM, optimizer_hash="other"))
        assert "does not hold the moments that the run hashed" in verdict(compared(other, obstacles))
        other = dataclasses.replace(interval(), before=msgspec.structs.replace(step(FROM), batch_hash="other"))
        assert "do not belong to one history" in verdict(compared(other, obstacles))


def test_later_weights_are_not_compared_in_another_layout() -> None:
    found = interval(weight_hash={12: "other"})
    assert not compared(found).agrees
    assert compared(found, ("layout",)).agrees


def test_an_altered_checkpoint_is_told_from_an_altered_record() -> None:
    altered = {"weight_hash": {FROM: "?"}}
    assert "between the hash and the save, or the record of step 10 was altered" in verdict(
        compared(interval(**altered))
    )
    goes_on = {"weight_hash": {FROM: "?", 12: "?"}}
    assert "differ too, from step 12 on" in verdict(compared(interval(**goes_on)))
    assert "too little to show in the losses" in verdict(compared(interval(**altered), ("layout",)))


def test_a_record_that_alone_is_wrong_is_told_from_a_fault() -> None:
    recorded = interval(loss={13: 1.9})
    said = verdict(compared(interval(), recorded=recorded))
    assert "yet the weights after step 14 agree bit for bit: the training was right" in said
    recorded = interval(loss={16: 1.9})  # nothing later shows that the training was right
    assert "of step 16 differs" in verdict(compared(interval(), recorded=recorded))


def test_a_step_without_a_finite_loss_agrees_with_one_like_it_only() -> None:
    assert deviation(None, None) == 0
    assert deviation(None, 1.0) == deviation(1.0, None) == math.inf
    both = interval(loss={12: None}, grad_norm={12: None})
    assert compared(both, recorded=both).agrees
    assert not compared(interval(), ("layout",), recorded=both).agrees


def test_another_learning_rate_is_named_as_such() -> None:
    assert "was trained at another learning rate" in verdict(compared(interval(learning_rate={12: 2e-3})))


def obstacles(
    start: StartRecord = START, config: RunConfig = CONFIG, starts: list[StartRecord] | None = None
) -> list[str]:
    starts = [START] if starts is None else starts
    training = Training(CONFIG, starts, [CONFIG] * len(starts), [])
    return obstacles_to_equality(training, Replay(config, start, interval(), {}))


def with_environment(**changes: Any) -> StartRecord:
    return msgspec.structs.replace(START, environment=msgspec.structs.replace(ENVIRONMENT, **changes))


def test_bits_are_compared_only_where_all_that_decides_them_is_the_same() -> None:
    assert obstacles() == []
    assert obstacles(msgspec.structs.replace(START, hosts=["other"], commit="def", time="later", step=12)) == []
    for start, name in (
        (msgspec.structs.replace(START, dp_size=4), "layout"),
        (msgspec.structs.replace(START, zero_stage=3), "layout"),
        (with_environment(devices=["GPU"]), "devices"),
        (with_environment(threads=2), "threads"),
        (with_environment(packages={"torch": "3"}), "torch"),
        (with_environment(attention="sdpa"), "attention"),
    ):
        assert [found.partition(":")[0] for found in obstacles(start)] == [name]
        assert [found.partition(":")[0] for found in obstacles(starts=[START, start])] == [name]
    (said,) = obstacles(starts=[])
    assert "did not record what it was trained with" in said


def test_settings_that_change_bits_are_obstacles_and_others_are_not() -> None:
    def with_settings(key: str, value: object) -> RunConfig:
        section, _, name = key.partition(".")
        part = getattr(CONFIG, section).model_copy(update={name: value})
        return CONFIG.model_copy(update={section: part})

    for key, value in (("parallel.activation_checkpointing", "full"), ("train.micro_batch_size", 4)):
        assert [found.partition(":")[0] for found in obstacles(config=with_settings(key, value))] == [key]
    assert obstacles(config=with_settings("parallel.timeout_minutes", 5.0)) == []
    changed = Training(CONFIG, [START, START], [CONFIG, with_settings("train.micro_batch_size", 4)], [])
    assert len(obstacles_to_equality(changed, Replay(CONFIG, START, interval(), {}))) == 1, "of the second start"
    # Of two data-parallel ranks, all rows of a rank are four.
    whole = with_settings("train.micro_batch_size", None)
    assert obstacles(config=whole) == ["train.micro_batch_size: the run had 2, the audit 4"]


def test_a_gpu_without_deterministic_kernels_is_an_obstacle() -> None:
    start = with_environment(devices=["GPU"], threads=None)
    (said,) = obstacles(start, starts=[start])
    assert said.startswith("parallel.deterministic is off")
    parallel = CONFIG.parallel.model_copy(update={"deterministic": True})
    config = CONFIG.model_copy(update={"parallel": parallel})
    training = Training(config, [start], [config], [])
    assert obstacles_to_equality(training, Replay(config, start, interval(), {})) == []
