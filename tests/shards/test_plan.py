"""The plan's pure functions, against their definitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.plan import (
    MIXING_PERIOD,
    SourcePlan,
    greedy_groups,
    integer_weights,
    lane_phase,
    mixing_sequence,
    permutation,
    source_of_row,
)

WEIGHTS = st.lists(st.floats(0.001, 1.0), min_size=1, max_size=12).map(tuple)


def test_permutation_is_the_published_hash_and_stays_what_it_is() -> None:
    # splitmix64 from seed 1234567, reference values of the algorithm's authors.
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert permutation(1234567, 5).tolist() == np.argsort(np.array(expected, np.uint64), kind="stable").tolist()
    assert sorted(permutation(99, 1000).tolist()) == list(range(1000))
    assert permutation(99, 1000).tolist() != permutation(100, 1000).tolist()


@given(weights=WEIGHTS)
def test_integer_weights_are_within_one_of_their_share(weights: tuple[float, ...]) -> None:
    shares = integer_weights(weights)
    assert sum(shares) == MIXING_PERIOD
    for weight, share in zip(weights, shares, strict=True):
        assert share >= 1
        assert abs(share - weight / sum(weights) * MIXING_PERIOD) < 1 + 1e-6 or share == 1


@settings(deadline=None, max_examples=15)
@given(weights=WEIGHTS)
def test_every_stretch_of_the_sequence_is_within_two_rows_of_its_shares(weights: tuple[float, ...]) -> None:
    shares = integer_weights(weights)
    sequence = mixing_sequence(shares)
    steps = np.arange(MIXING_PERIOD + 1)
    for source, share in enumerate(shares):
        drawn = np.concatenate([[0], np.cumsum(sequence == source)])
        error = drawn - steps * share / MIXING_PERIOD
        assert drawn[-1] == share
        assert np.abs(error).max() < 1
        # A stretch is the difference of two prefixes, also across the end of the period.
        assert error.max() - error.min() < 2


@pytest.mark.parametrize("lanes", [8, 64, 256, 1024])
def test_a_batch_is_mixed_across_lanes(lanes: int) -> None:
    shares = integer_weights((0.5, 0.3, 0.15, 0.05))
    for row in (0, 1, 17, 5000):
        drawn = [source_of_row(lane, row, shares) for lane in range(lanes)]
        assert len(set(drawn)) > 1
        if lanes >= 256:
            for source, weight in enumerate((0.5, 0.3, 0.15, 0.05)):
                assert abs(drawn.count(source) / lanes - weight) < 0.05


def test_lane_phase_is_the_golden_fraction() -> None:
    golden = (5**0.5 - 1) / 2
    for lane in range(1000):
        assert abs(lane_phase(lane, 1 << 14) - int(lane * golden % 1 * (1 << 14))) <= 1


@given(
    shards=st.lists(st.lists(st.integers(1, 20), min_size=0, max_size=12), min_size=1, max_size=6),
    limit=st.integers(1, 40),
)
def test_groups_are_greedy_and_stay_within_shards(shards: list[list[int]], limit: int) -> None:
    expected, cell = [], 0
    for sizes in shards:
        room = -1
        for size in sizes:
            if size > room:
                expected.append(cell)
                room = limit
            room -= size
            cell += 1
    offsets = np.concatenate([[0], np.cumsum([size for sizes in shards for size in sizes])]).astype(np.int64)
    bounds = np.concatenate([[0], np.cumsum([len(sizes) for sizes in shards])]).astype(np.int64)
    assert greedy_groups(offsets, bounds, limit).tolist() == expected


@given(
    sizes=st.lists(st.lists(st.integers(1, 500), max_size=20), min_size=1, max_size=4).filter(any),
    lanes=st.integers(1, 9),
    epochs=st.integers(1, 3),
)
def test_lanes_together_read_every_record_once_an_epoch(sizes: list[list[int]], lanes: int, epochs: int) -> None:
    tables = []
    for cells in sizes:
        ends = np.concatenate([[0], np.cumsum(cells)]).astype(np.int64)
        tables.append(np.stack([ends, ends * 10], axis=1))
    plan = SourcePlan("s", tables, window_limit=2000, lanes=lanes, seed=3)
    seen = {epoch: [] for epoch in range(epochs)}
    for lane in range(lanes):
        for q in range(plan.segments_of_lane(lane, epochs)):
            epoch, segment = plan.segment_of(lane, q)
            for window in plan.windows_of(segment):
                assert window.stop - window.start == 10 * window.num_records
                first = window.first_record
                seen[epoch] += [(window.shard, record) for record in range(first, first + window.num_records)]
    everything = [(shard, record) for shard, cells in enumerate(sizes) for record in range(sum(cells))]
    assert all(sorted(records) == everything for records in seen.values())
