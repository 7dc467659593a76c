"""The plan's pure functions, compared with their definitions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.arrays import greedy_groups
from shards.hashing import permutation
from shards.plan.segments import SourcePlan, WindowPlan


def test_the_permutation_is_that_of_the_published_hash() -> None:
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


def tables_of(shards: list[list[int]], record_bytes: int = 10) -> list[np.ndarray]:
    """Make record tables of shards, given the number of records in each of their cells."""
    ends = [np.concatenate([[0], np.cumsum(cells)]).astype(np.int64) for cells in shards]
    return [np.stack([end, end * record_bytes], axis=1) for end in ends]


def records_of(plan: SourcePlan, lane: int, segments: int) -> int:
    """Count the records in a lane's first segments."""
    counts = np.zeros(plan.num_lanes, np.int64)
    counts[lane] = segments
    return int(plan.read_before(counts)[0][lane])


def read_by(plan: SourcePlan, lane: int, epochs: int) -> Iterator[tuple[int, WindowPlan]]:
    """Yield (epoch, window) for everything that a lane reads in `epochs` epochs."""
    q, limit = 0, plan.segments_of_lane(lane, epochs)
    while q < limit:
        deal = plan.deal(lane, q)
        assert records_of(plan, lane, deal.next) - records_of(plan, lane, q) == sum(
            window.num_records for window in deal.windows
        )
        yield from ((deal.epoch, window) for window in deal.windows)
        q = deal.next
    assert q == limit


@given(
    sizes=st.lists(st.lists(st.integers(1, 500), max_size=20), min_size=1, max_size=4).filter(any),
    lanes=st.integers(1, 9),
    epochs=st.integers(1, 3),
    limit=st.sampled_from([1000, 2000, 50_000]),
    version=st.sampled_from([1, 2]),
)
def test_lanes_together_read_every_record_once_an_epoch(
    sizes: list[list[int]], lanes: int, epochs: int, limit: int, version: int
) -> None:
    tables = tables_of(sizes)
    plan = SourcePlan("s", tables, window_limit=limit, lanes=lanes, seed=3, version=version)
    seen = {epoch: [] for epoch in range(epochs)}
    for lane in range(lanes):
        for epoch, window in read_by(plan, lane, epochs):
            assert window.num_records == sum(span.num_records for span in window.spans)
            assert window.raw_bytes <= limit or len(window.spans) == 1
            assert list(window.spans) == sorted(window.spans, key=lambda span: (span.shard, span.first_record))
            for span in window.spans:
                begin, end = tables[span.shard][:, 0].searchsorted(
                    [span.cells_record, span.cells_record + span.cells_records]
                )
                assert tables[span.shard][[begin, end]].ravel().tolist() == [
                    span.cells_record, span.start, span.cells_record + span.cells_records, span.stop,
                ]  # fmt: skip
                assert span.cells_record <= span.first_record
                assert span.first_record + span.num_records <= span.cells_record + span.cells_records
                first = span.first_record
                seen[epoch] += [(span.shard, record) for record in range(first, first + span.num_records)]
    everything = [(shard, record) for shard, cells in enumerate(sizes) for record in range(sum(cells))]
    assert all(sorted(records) == everything for records in seen.values())


@pytest.mark.parametrize(("documents", "lanes"), [(25, 8), (250, 64), (2500, 960)])
def test_a_few_documents_are_dealt_evenly(documents: int, lanes: int) -> None:
    plan = SourcePlan("s", tables_of([[documents]], 2000), 1 << 20, lanes, seed=0, version=2)
    limits = np.array([plan.segments_of_lane(lane, 1) for lane in range(lanes)])
    loads = plan.read_before(limits)[0].tolist()
    assert sum(loads) == documents
    assert max(loads) - min(loads) <= 1


def test_small_shards_fill_windows_and_large_ones_are_read_sequentially() -> None:
    small = SourcePlan("s", tables_of([[3]] * 20_000, 500), 1 << 20, 1, seed=0, version=2)
    windows = [window for _, window in read_by(small, 0, 1)]
    assert len(windows) < 1.2 * small.raw_bytes / (1 << 20)
    large = SourcePlan("s", tables_of([[500] * 4096], 2000), 1 << 20, 1, seed=0, version=2)
    deal = large.deal(0, 0)
    assert [len(window.spans) for window in deal.windows] == [1] * 16
    starts = [window.spans[0].start for window in deal.windows]
    assert starts == list(range(starts[0], starts[0] + 16_000_000, 1_000_000))
