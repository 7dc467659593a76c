"""Moments in bf16 follow those in fp32 on average, where rounding to the nearest would leave them behind."""

from __future__ import annotations

import copy

import pytest
import torch

from pretrain.adamw import AdamW, rounded_at_random
from pretrain.optim import OptimConfig, ParameterGroup
from pretrain.topology import Topology

BETAS, RATE, DECAY = (0.9, 0.999), 1e-3, 0.1


def optimizer(weight: torch.nn.Parameter, moments: str, topology: Topology) -> AdamW:
    group = ParameterGroup(params=[weight], weight_decay=DECAY, learning_rate_scale=1.0, muon=False)
    config = OptimConfig.parse({"learning_rate": RATE, "betas": list(BETAS), "moments": moments})
    return AdamW([group], config, topology, seed=5)


def gradients(size: int, steps: int) -> torch.Tensor:
    """Return gradients [steps, size] that become a hundred times as small halfway."""
    scale = torch.logspace(-4, 1, size) * torch.where(torch.arange(steps) < steps // 2, 1, 0.01).unsqueeze(1)
    return scale * torch.randn(steps, size, generator=torch.Generator().manual_seed(2))


def test_a_number_is_rounded_to_a_neighbour_and_is_right_on_average() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(500, generator=generator) * torch.logspace(-30, 30, 500)
    rounded = torch.stack([rounded_at_random(values, generator).float() for _ in range(2000)])
    digit = 2.0 ** (values.abs().log2().floor() - 7)  # bf16 has eight digits
    assert ((rounded - values).abs() < digit).all()
    assert ((rounded.mean(0) - values).abs() < 0.06 * digit).all()  # five standard deviations
    exact = values.bfloat16().float()
    assert torch.equal(rounded_at_random(exact, generator).float(), exact)


def test_bf16_moments_train_almost_as_fp32_moments_do(topology: Topology, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.adamw._AT_ONCE", 300)  # a part of the partition
    size, steps = 1000, 400
    weights = {moments: torch.nn.Parameter(torch.zeros(size)) for moments in ("fp32", "bf16")}
    trained = {moments: optimizer(weight, moments, topology) for moments, weight in weights.items()}
    for gradient in gradients(size, steps):
        for moments, weight in weights.items():
            weight.grad = gradient.clone()
            trained[moments].step()
    states = {moments: trained[moments].state[weight] for moments, weight in weights.items()}
    assert states["bf16"]["exp_avg_sq"].dtype == torch.bfloat16
    assert int(states["bf16"]["step"]) == steps
    ratio = states["bf16"]["exp_avg_sq"].float() / states["fp32"]["exp_avg_sq"]
    assert ratio.mean() == pytest.approx(1, abs=5e-3)
    assert ratio.std() < 0.05
    apart = (weights["bf16"] - weights["fp32"]).norm() / weights["fp32"].norm()
    assert apart < 0.03


def test_a_resume_draws_what_an_uninterrupted_run_draws(topology: Topology) -> None:
    whole = torch.nn.Parameter(torch.zeros(1000))
    first = optimizer(whole, "bf16", topology)
    drawn = gradients(1000, 4)
    for gradient in drawn[:2]:
        whole.grad = gradient.clone()
        first.step()
    resumed_weight = torch.nn.Parameter(whole.detach().clone())
    resumed = optimizer(resumed_weight, "bf16", topology)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    assert resumed.state[resumed_weight]["exp_avg"].dtype == torch.float32  # PyTorch casts it
    resumed.settle()
    for gradient in drawn[2:]:
        for weight, trained in ((whole, first), (resumed_weight, resumed)):
            weight.grad = gradient.clone()
            trained.step()
    assert torch.equal(whole, resumed_weight)
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(first.state[whole][key], resumed.state[resumed_weight][key])
