"""The moving average of the weights is the mean of those after each step, weighted by how long ago that was."""

from __future__ import annotations

import pytest

from pretrain.ema import EmaConfig


@pytest.mark.parametrize("ema", [{"decay": 0.5 ** (1 / 3)}, {"half_life_steps": 3}, {"half_life_tokens": 300}])
def test_steps_count_half_after_each_half_life(ema: dict[str, float]) -> None:
    config, values, total, average = EmaConfig(**ema), [5.0, -1.0, 4.0, 2.0, 8.0, 0.0, 1.0], 0.0, 100.0
    for value in values:
        total = config.total_after(total, n_tokens=100)
        average += (value - average) / total
    weights = [0.5 ** (age / 3) for age in reversed(range(len(values)))]
    mean = sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)
    assert average == pytest.approx(mean)


def test_tokens_count_where_batches_differ() -> None:
    config, total = EmaConfig(half_life_tokens=300), 0.0
    for n_tokens in (100, 600, 300):
        total = config.total_after(total, n_tokens)
    assert total == 1 + 0.5 + 0.125


@pytest.mark.parametrize("ema", [{}, {"decay": 0.9, "half_life_steps": 3}])
def test_exactly_one_length_is_given(ema: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="exactly one of decay, half_life_steps and half_life_tokens"):
        EmaConfig(**ema)
