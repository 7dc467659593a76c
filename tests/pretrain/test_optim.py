"""Learning-rate curves match hand-computed values, and only the right weights decay."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from pretrain.model.transformer import LlamaConfig
from pretrain.model.weights import weight_specs
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


DECAYING = OptimConfig(weight_decay=0.3)


def test_only_matrices_decay() -> None:
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    groups = parameter_groups([("v", vector), ("m", matrix)], DECAYING, scale_of=lambda name: Scale())
    assert [(group["params"], group["weight_decay"]) for group in groups] == [([matrix], 0.3), ([vector], 0.0)]


def test_a_scaled_rate_decays_a_weight_as_fast() -> None:
    weights = [(str(i), torch.nn.Parameter(torch.ones(2, 2))) for i in range(4)]
    groups = parameter_groups(weights, DECAYING, lambda name: Scale(learning_rate=1 + int(name) % 2))
    assert [[id(p) for p in group["params"]] for group in groups] == [
        [id(weights[0][1]), id(weights[2][1])], [id(weights[1][1]), id(weights[3][1])],
    ]  # fmt: skip
    assert [group["learning_rate_scale"] for group in groups] == [1, 2]
    assert {group["learning_rate_scale"] * group["weight_decay"] for group in groups} == {0.3}


def weights_of_a_model() -> dict[str, torch.nn.Parameter]:
    specs = weight_specs(LlamaConfig(dim=8, n_layers=2, n_heads=2, ffn_dim=16, vocab_size=16, qk_norm=True))
    return {name: torch.nn.Parameter(torch.ones(spec.shape)) for name, spec in specs.items()}


def rates(optim: OptimConfig) -> dict[str, tuple[float, float, bool]]:
    """Return each weight's factor of the learning rate, its decay relative to the rate, and whether it is Muon's."""
    weights = weights_of_a_model()
    names = {id(weight): name for name, weight in weights.items()}
    groups = parameter_groups(weights.items(), optim, lambda name: Scale(learning_rate=0.25, width=4.0))
    return {
        names[id(weight)]: (group["learning_rate_scale"], group["weight_decay"], group["muon"])
        for group in groups
        for weight in group["params"]
    }


def test_muon_trains_the_matrices_of_blocks_and_adamw_the_rest() -> None:
    for name, (rate, decay, muon) in rates(OptimConfig(name="muon", weight_decay=0.3)).items():
        is_matrix = "norm" not in name
        assert muon == (is_matrix and name not in ("embedding.weight", "output.weight")), name
        assert rate == (0.25 * 4**0.5 if muon else 0.25), name
        assert decay * rate == pytest.approx(0.3 if is_matrix else 0.0), "scales of mup leave the decay alone"


def test_patterns_of_names_change_learning_rates_and_the_decay_with_them() -> None:
    patterns = {"blocks.*.attention.w?.weight": 0.5, "blocks.1.*": 3.0, "embedding.weight": 7.0}
    plain = rates(OptimConfig(weight_decay=0.3))
    for name, (rate, decay, _) in rates(OptimConfig(weight_decay=0.3, learning_rate_groups=patterns)).items():
        factor = 7.0 if name == "embedding.weight" else 1.0
        factor *= 3.0 if name.startswith("blocks.1.") else 1.0
        factor *= 0.5 if name.split(".")[-2] in ("wq", "wk", "wv", "wo") else 1.0
        assert rate == pytest.approx(plain[name][0] * factor), name
        assert decay == plain[name][1], "AdamW multiplies it by the learning rate"
