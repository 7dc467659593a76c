"""The mixing's pure functions, compared with their definitions: the mix that is drawn is the one asked for."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.plan.mixing import RULES, integer_weights, lane_phase, level_shares, mix_of, mixing_sequence
from tests.examples import examples

WEIGHTS = st.lists(st.floats(0.001, 1.0), min_size=1, max_size=12).map(tuple)
PERIOD = RULES[1][0]
# Hard to round: a weight 2 million times another, and many tiny ones beside a large one
UNLIKE = {"2.2e12 : 1e6": (2.2e12, 1e6), "100 x 1e-6": (*(1e-6,) * 100, 1 - 1e-4), "thirds": (1.0, 1.0, 1.0)}


def exact(weights: tuple[float, ...]) -> list[Fraction]:
    return [Fraction(str(weight)) for weight in weights]


@given(weights=WEIGHTS)
def test_integer_weights_are_within_one_of_their_share(weights: tuple[float, ...]) -> None:
    shares = integer_weights(exact(weights), PERIOD)
    assert sum(shares) == PERIOD
    for weight, share in zip(weights, shares, strict=True):
        assert share >= 1
        assert abs(share - weight / sum(weights) * PERIOD) < 1 + 1e-6 or share == 1


@settings(max_examples=examples(15))
@given(weights=WEIGHTS)
def test_any_stretch_of_a_level_is_within_two_slots_of_its_shares(weights: tuple[float, ...]) -> None:
    for shares in level_shares(exact(weights), *RULES[2]):
        sequence = mixing_sequence(shares)
        steps = np.arange(sum(shares) + 1)
        for number, share in enumerate(shares):
            drawn = np.concatenate([[0], np.cumsum(sequence == number)])
            error = drawn - steps * share / sum(shares)
            assert drawn[-1] == share
            assert np.abs(error).max() < 1
            # A stretch is the difference of two prefixes, even across the end of the period.
            assert error.max() - error.min() < 2


@given(weights=st.lists(st.floats(1e-7, 1e7), min_size=1, max_size=8).map(tuple))
def test_the_levels_together_keep_the_weights_within_the_stated_bound(weights: tuple[float, ...]) -> None:
    wanted = [weight / sum(exact(weights)) for weight in exact(weights)]
    met, scale = [Fraction(0)] * len(weights), Fraction(1)
    for shares in level_shares(exact(weights), *RULES[2]):
        for i in range(len(weights)):
            met[i] += scale * Fraction(shares[i], sum(shares))
        if len(shares) > len(weights):
            scale *= Fraction(shares[-1], sum(shares))
    assert sum(met) == 1
    bound = Fraction(len(weights), 1024) ** 3 / 1024
    assert all(abs(a - b) <= bound for a, b in zip(met, wanted, strict=True))


@pytest.mark.parametrize("case", UNLIKE)
def test_every_prefix_of_a_lane_is_within_two_rows_a_level_of_its_weights(case: str) -> None:
    weights = UNLIKE[case]
    mix, levels = mix_of(weights, 2), RULES[2][1]
    assert mix is not None
    for lane in (0, 1, 17, 959):
        for rows in (1, 7, 1000, 12_345, 10**6, 10**9 + 7):
            for source in {0, len(weights) // 2, len(weights) - 1}:
                wanted = rows * Fraction(str(weights[source])) / sum(exact(weights))
                assert abs(mix.drawn(lane, source, rows) - wanted) < 2 * levels


@pytest.mark.parametrize("case", UNLIKE)
def test_lanes_draw_a_small_source_at_different_times(case: str) -> None:
    """Check many lanes together: the mix is right from the first rows on, and lanes do not draw all at once."""
    weights, lanes, rows = UNLIKE[case], 960, 2000
    mix = mix_of(weights, 2)
    assert mix is not None
    for source in {0, len(weights) - 1}:
        wanted = lanes * rows * weights[source] / sum(weights)
        drawn = sum(mix.drawn(lane, source, rows) for lane in range(lanes))
        assert abs(drawn - wanted) <= 0.02 * wanted + 3


@settings(max_examples=examples(20))
@given(weights=WEIGHTS, version=st.sampled_from([1, 2]), lane=st.integers(0, 2000), draw=st.data())
def test_computed_counts_equal_those_of_rows_drawn_one_by_one(
    weights: tuple[float, ...], version: int, lane: int, draw: st.DataObject
) -> None:
    mix = mix_of(weights, version)
    assert mix is not None
    rows = [mix.source_of(lane, row) for row in range(600)]
    for source in range(len(weights)):
        assert mix.drawn(lane, source, 600) == rows.count(source)
        row, uses = draw.draw(st.integers(0, 300)), draw.draw(st.integers(0, 20))
        later = [place for place in range(row, 600) if rows[place] == source]
        if uses < len(later):
            assert mix.row_of_use(lane, source, row, uses) == later[uses]


def test_a_source_of_weight_zero_is_never_due() -> None:
    mix = mix_of((1.0, 0.0, 0.5), 2)
    assert mix is not None
    assert mix.row_of_use(3, 1, 0, 0) is None
    assert mix_of((0.0, 0.0), 2) is None


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("lanes", [8, 64, 256, 1024])
def test_a_batch_is_mixed_across_lanes(lanes: int, version: int) -> None:
    weights = (0.5, 0.3, 0.15, 0.05)
    mix = mix_of(weights, version)
    assert mix is not None
    for row in (0, 1, 17, 5000):
        drawn = Counter(mix.source_of(lane, row) for lane in range(lanes))
        assert len(drawn) > 1
        if lanes >= 256:
            for source, weight in enumerate(weights):
                assert abs(drawn[source] / lanes - weight) < 0.05


def test_lane_phase_is_the_golden_fraction() -> None:
    golden = (5**0.5 - 1) / 2
    for lane in range(1000):
        assert abs(lane_phase(lane, 1 << 14) - int(lane * golden % 1 * (1 << 14))) <= 1


def test_more_sources_than_slots_are_all_drawn() -> None:
    """Give every weight a slot on some level, or it would never be drawn and be sought without end."""
    *_, last = level_shares([Fraction(1)] * 1100, *RULES[2])
    assert last == (1,) * 1100
