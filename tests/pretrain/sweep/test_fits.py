"""Intervals hold what they promise, also of few points."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pretrain.sweep.fits import line, lowest_of_parabola, power_law, student_quantile


def test_quantiles_are_those_of_the_tables() -> None:
    tabulated = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 8: 2.306, 15: 2.131, 30: 2.042}
    assert {degrees: round(student_quantile(degrees), 3) for degrees in tabulated} == tabulated


def test_a_power_law_with_offset_is_found_again() -> None:
    compute = [1e12, 4e12, 2e13, 1e14, 3e14]
    fit = power_law(compute, [1.7 + (1e11 / c) ** 0.3 for c in compute], 1e16)
    assert fit.offset == pytest.approx(1.7, rel=1e-3)
    assert fit.exponent == pytest.approx(0.3, rel=5e-3)
    assert fit.expected.value == pytest.approx(1.7 + 1e-5**0.3, rel=1e-3)
    assert fit.expected.high - fit.expected.low < 0.01


def test_three_points_have_no_offset_and_a_wide_interval() -> None:
    compute = [1e12, 1e13, 1e14]
    fit = power_law(compute, [4.0, 2.1, 1.0], 1e15)
    assert fit.offset == 0
    assert fit.exponent == pytest.approx(-math.log(1.0 / 4.0) / math.log(100), rel=1e-6)
    assert fit.expected.high / fit.expected.low > 2


@pytest.mark.parametrize("points", [3, 5])
def test_a_line_covers_95_of_100_new_measurements(points: int) -> None:
    generator, inside, trials = np.random.default_rng(points), 0, 2000
    for _ in range(trials):
        x = np.arange(points, dtype=float)
        _, expected, _ = line(x.tolist(), (2 * x + generator.normal(size=points)).tolist(), 8.0)
        inside += expected.low <= 16 + generator.normal() <= expected.high
    assert inside / trials == pytest.approx(0.95, abs=0.015)


def test_a_power_law_covers_most_new_measurements() -> None:
    generator, compute, new, inside, trials = np.random.default_rng(0), np.geomspace(1e12, 1e14, 6), 1e15, 0, 30
    for _ in range(trials):
        loss = 1.5 + (1e12 / compute) ** 0.4 + generator.normal(0, 0.01, 6)
        expected = power_law(compute.tolist(), loss.tolist(), new).expected
        inside += expected.low <= 1.5 + (1e12 / new) ** 0.4 + generator.normal(0, 0.01) <= expected.high
    assert inside / trials >= 0.83  # 0.95 less three deviations of so few trials


def test_the_lowest_point_of_a_parabola() -> None:
    assert lowest_of_parabola([0, 1, 3, 4], [9.0, 4.0, 4.0, 9.0]) == pytest.approx(2.0)
    assert lowest_of_parabola([0, 1, 3], [1.0, 2.0, 9.0]) is None, "the least is at the edge"
    assert lowest_of_parabola([0, 1], [1.0, 2.0]) is None
