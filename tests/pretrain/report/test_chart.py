"""Thinning keeps every extreme; axes hold their values, with ticks that say what they are."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.report.chart import axis_of, needs_log, short
from pretrain.report.thinning import thin

VALUES = st.lists(st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf]), min_size=1, max_size=60)


@given(values=VALUES, most=st.integers(1, 20))
def test_each_point_stands_for_its_stretch(values: list[float], most: int) -> None:
    x = np.arange(10, 10 + len(values), dtype=np.float64)
    found = thin(x, np.array(values), most)
    assert len(found.x) <= most or found.each == 1
    begin = 0
    for i, last in enumerate(found.x):
        end = int(last) - 10 + 1
        finite = [value for value in values[begin:end] if math.isfinite(value)]
        assert end - begin == found.each or end == len(values)
        if finite:
            assert (found.low[i], found.high[i]) == (min(finite), max(finite))
            assert found.y[i] == pytest.approx(sum(finite) / len(finite), abs=1e-6)
        else:
            assert math.isnan(found.y[i])
        begin = end
    assert begin == len(values)


def test_the_mean_of_an_explosion_is_finite() -> None:
    assert thin(np.arange(4.0), np.full(4, 1e308), 2).y.tolist() == [1e308, 1e308]


@given(values=st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=9), from_zero=st.booleans())
def test_a_linear_axis_holds_its_values(values: list[float], from_zero: bool) -> None:
    axis = axis_of(np.array(values), from_zero=from_zero)
    places = axis.place(np.array(values))
    assert ((places >= -1e-6) & (places <= 1 + 1e-6)).all()
    assert 2 <= len(axis.ticks) <= 9
    if from_zero:
        assert axis.low <= 0 <= axis.high


@given(values=st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=9))
def test_a_logarithmic_axis_holds_its_values(values: list[float]) -> None:
    axis = axis_of(np.array([*values, -1.0, math.nan]), log=True)
    places = axis.place(np.array(values))
    assert ((places >= -1e-6) & (places <= 1 + 1e-6)).all()
    assert 1 <= len(axis.ticks) <= 14
    assert np.isnan(axis.place(np.array([-1.0])))


@given(low=st.floats(0.001, 1000), ratio=st.floats(1.01, 1000))
def test_ticks_say_their_value(low: float, ratio: float) -> None:
    axis = axis_of(np.array([low, low * ratio]))
    steps = np.diff([value for value, _ in axis.ticks])
    assert np.allclose(steps, steps[0])
    for value, text in axis.ticks:
        assert float(text.replace(",", "").replace("k", "e3").replace("M", "e6")) == pytest.approx(
            value, rel=1e-9, abs=1e-12
        )


def test_a_scale_is_logarithmic_only_where_it_has_to_be() -> None:
    assert needs_log(np.array([1.0, 2, 3, 5e30]))
    assert not needs_log(np.array([8.0, 4, 3, 3]))
    assert not needs_log(np.array([0.0, 1, 1000]))
    assert not needs_log(np.array([math.nan]))


def test_short_numbers() -> None:
    said = [short(value) for value in (0, 12.34567, 12_000, 1.5e6, 2.5e30, 3e-5, math.nan, math.inf)]
    assert said == ["0", "12.35", "12k", "1.5M", "2.5e+30", "3e-05", "-", "∞"]
