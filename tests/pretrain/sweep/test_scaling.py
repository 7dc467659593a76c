"""A large run is told from small ones by their best settings, and not at all from too few."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import product

import pytest

from pretrain.sweep.scaling import Size, SmallRun, advice, sizes_of
from shards import ConfigError

RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)


def size(width: int) -> Size:
    return Size(width, parameters=100 * width**2, tokens=2000 * width**2, flops=1.2e6 * width**4)


def loss_at(width: int, rate: float) -> float:
    """Return a loss whose best rate is 0.2 / width, and falls with the compute to the power 0.1 down to 1.5."""
    return 1.5 + 30 * size(width).flops ** -0.1 + 0.05 * math.log(rate * width / 0.2) ** 2


def small_run(width: int, rate: float, settings: str = "", loss: float | None = None) -> SmallRun:
    return SmallRun(
        size(width), rate, f"{settings}{width}", loss_at(width, rate) if loss is None else loss, 1e9 * width, "a CPU"
    )


def numbers(text: str, pattern: str) -> list[float]:
    found = re.search(pattern, text)
    assert found, text
    return [float(number) for number in found.groups()]


def test_what_is_told_of_a_larger_model() -> None:
    runs = [small_run(width, rate) for width, rate in product((32, 48, 64, 96), RATES)]
    told = "\n".join(advice(sizes_of(runs), size(128), "loss"))
    rate, low, high = numbers(told, r"optim.learning_rate=([\d.e-]+), 95 % interval ([\d.e-]+) to ([\d.e-]+)")
    assert rate == pytest.approx(0.2 / 128, rel=0.02)
    assert low <= rate <= high
    assert numbers(told, r"width to the power ([-+][\d.]+)") == pytest.approx([-1.0], abs=0.02)
    loss, low, high = numbers(told, r"loss: ([\d.]+), 95 % interval ([\d.]+) to ([\d.]+)")
    assert loss == pytest.approx(loss_at(128, 0.2 / 128), abs=0.03)
    assert low <= loss <= high
    seconds = size(128).flops / 96e9
    assert numbers(told, r"time: ([\d.]+) min")[0] == pytest.approx(seconds / 60, abs=0.06)


def test_the_best_settings_of_each_size_count_and_seeds_are_averaged() -> None:
    runs = [small_run(32, 1e-3, "bad", loss=9.0), small_run(32, 1e-3, loss=3.0), small_run(32, 1e-3, loss=5.0)]
    (found,) = sizes_of([*runs, small_run(32, 2e-3, loss=math.inf)])
    assert found.losses == {1e-3: 4.0, 2e-3: math.inf}
    assert found.loss == 4.0
    assert sizes_of([small_run(32, 1e-3, loss=math.inf)]) == [], "it diverged"


@pytest.mark.parametrize("widths", [(32, 48, 64), (32, 48, 64, 96)])
def test_a_loss_that_does_not_fall_with_the_compute_gives_no_curve(widths: tuple[int, ...]) -> None:
    runs = [small_run(width, 1e-3, loss=3.0 + i / 10) for i, width in enumerate(widths)]
    told = "\n".join(advice(sizes_of(runs), size(128), "loss"))
    assert "loss: not told, since it does not fall with the compute: 3.000, 3.100, 3.200" in told
    assert "95 % interval" not in told


def test_computes_of_a_group_are_near_its_least() -> None:
    runs = [
        replace(small_run(32, 1e-3, str(i), loss=3 - i / 10), size=Size(32, 1, 1, flops))
        for i, flops in enumerate((100, 109, 118, 127, 137))
    ]
    assert [found.size.flops for found in sizes_of(runs)] == [109, 127, 137]


def test_a_best_rate_at_the_edge_is_none() -> None:
    runs = [small_run(width, rate) for width, rate in product((32, 48, 64), RATES[:3])]
    assert [found.best_rate for found in sizes_of(runs)][:1] == [None]
    assert "learning rate: not told, since only" in "\n".join(advice(sizes_of(runs), size(128), "loss"))


def test_nothing_is_extrapolated_from_two_sizes() -> None:
    runs = [small_run(width, rate) for width, rate in product((32, 64), RATES)]
    with pytest.raises(ConfigError, match="these runs are of 2 sizes"):
        list(advice(sizes_of(runs), size(128), "loss"))


def test_other_training_lengths_and_distances_are_pointed_out() -> None:
    sizes = sizes_of([small_run(width, 4e-3) for width in (32, 48, 64)])
    far = "\n".join(advice(sizes, size(512)._replace(tokens=10**10), "loss"))
    assert "an offset cannot be told from 3 points" in far
    assert "more a guess than a prediction" in far
    assert "trained for so much longer" in far
