"""Learning-rate curves match hand-computed values, and only the right weights decay."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from pretrain.optim import OptimConfig, learning_rate_at, parameter_groups
from pretrain.parametrization import Scale

STEPS = 101


def curve(**values: object) -> list[float]:
    config = OptimConfig.model_validate({"learning_rate": 2.0, "floor": 0.1, "warmup_steps": 10} | values)
    return [learning_rate_at(step, config, STEPS) for step in range(STEPS)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_warm_up_is_linear_and_ends_at_the_peak(schedule: str) -> None:
    rates = curve(schedule=schedule)
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(2.0)
    assert max(rates) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("schedule", "at"),
    [
        ("constant", {55: 2.0, 100: 2.0}),
        # From step 10 to step 100, height 1 to 0, on a floor of 0.2: the middle is step 55.
        ("linear", {55: 0.2 + 1.8 / 2, 28: 0.2 + 1.8 * 0.8, 100: 0.2}),
        ("cosine", {55: 0.2 + 1.8 / 2, 40: 0.2 + 1.8 * 0.75, 70: 0.2 + 1.8 * 0.25, 100: 0.2}),
        # The last 20 of 101 steps decay: from step 81 to step 100.
        ("wsd", {55: 2.0, 81: 2.0, 100: 0.2, 82: 0.2 + 1.8 * 18 / 19}),
    ],
)
def test_schedules_equal_values_computed_by_hand(schedule: str, at: dict[int, float]) -> None:
    rates = curve(schedule=schedule, decay_steps=20)
    assert {step: rates[step] for step in at} == pytest.approx(at)


@pytest.mark.parametrize(
    ("shape", "heights"),
    # A quarter, a half and three quarters of the decay
    [("linear", [0.75, 0.5, 0.25]), ("cosine", [0.8536, 0.5, 0.1464]), ("sqrt", [0.5, 0.2929, 0.1340])],
)
def test_the_decay_of_wsd_has_its_shape(shape: str, heights: list[float]) -> None:
    rates = curve(schedule="wsd", decay_steps=21, decay_shape=shape)
    assert rates[79] == rates[80] == 2.0
    assert rates[100] == pytest.approx(0.2)
    assert [rates[step] for step in (85, 90, 95)] == pytest.approx([0.2 + 1.8 * height for height in heights], rel=1e-3)


def test_the_cosine_schedule_equals_its_formula_everywhere() -> None:
    expected = [0.2 + 0.9 * (1 + math.cos(math.pi * (step - 10) / 90)) for step in range(10, STEPS)]
    assert curve(schedule="cosine")[10:] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_after_warm_up_the_rate_never_rises_and_never_falls_below_its_floor(schedule: str) -> None:
    rates = curve(schedule=schedule)[10:]
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates))
    assert min(rates) == rates[-1] == pytest.approx(0.2)


def test_a_warm_up_longer_than_the_run_still_gives_a_rate() -> None:
    config = OptimConfig(learning_rate=1.0, schedule="wsd", warmup_steps=100, decay_steps=50)
    assert learning_rate_at(9, config, 10) == pytest.approx(0.1)


def test_only_matrices_decay() -> None:
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    groups = parameter_groups([("v", vector), ("m", matrix)], weight_decay=0.3, scale_of=lambda name: Scale())
    assert [(group["params"], group["weight_decay"]) for group in groups] == [([matrix], 0.3), ([vector], 0.0)]


def test_a_scaled_rate_decays_a_weight_as_fast() -> None:
    weights = [(str(i), torch.nn.Parameter(torch.ones(2, 2))) for i in range(4)]
    groups = parameter_groups(weights, weight_decay=0.3, scale_of=lambda name: Scale(learning_rate=1 + int(name) % 2))
    assert [[id(p) for p in group["params"]] for group in groups] == [
        [id(weights[0][1]), id(weights[2][1])], [id(weights[1][1]), id(weights[3][1])],
    ]  # fmt: skip
    assert [group["learning_rate_scale"] for group in groups] == [1, 2]
    assert {group["learning_rate_scale"] * group["weight_decay"] for group in groups} == {0.3}
