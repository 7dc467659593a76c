"""The inverse of the plan, compared with all windows of all lanes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.plan import segments
from shards.plan.cursor import Numbering
from shards.plan.segments import SourcePlan
from tests.examples import examples

Name = tuple[int, int, int]


def tables_of(shards: list[list[tuple[int, int]]]) -> list[np.ndarray]:
    """Make record tables of shards, given (records, raw bytes) of each of their cells."""
    return [np.cumsum([(0, 0), *cells], axis=0) for cells in shards]


def read_in(plan: SourcePlan, epochs: int) -> list[dict[tuple[int, int], Name]]:
    """Walk through all windows of all lanes: for each epoch, the (lane, q, window) of each (shard, record)."""
    found: list[dict[tuple[int, int], Name]] = [{} for _ in range(epochs)]
    for lane in range(plan.num_lanes):
        q = 0
        while q < plan.segments_of_lane(lane, epochs):
            deal = plan.deal(lane, q)
            for number, window in enumerate(deal.windows):
                for span in window.spans:
                    records = range(span.first_record, span.first_record + span.num_records)
                    found[deal.epoch] |= {(span.shard, record): (lane, q, number) for record in records}
            q = deal.next
    return found


def everything(plan: SourcePlan) -> np.ndarray:
    """Return (shard, record) of all records that a source takes."""
    places = zip(plan._skipped.tolist(), np.diff(plan._shard_ends[:, 0]).tolist(), strict=True)
    return np.array([(shard, first + i) for shard, (first, count) in enumerate(places) for i in range(count)])


def taken_by_hand(shards: list[list[tuple[int, int]]], first: int, end: int) -> list[tuple[int, int]]:
    """Return the range of each shard's records that have a number in [first, end), looking at one after the other."""
    numbers = iter(range(sum(records for cells in shards for records, _ in cells)))
    found = []
    for cells in shards:
        inside = [
            i for i, number in enumerate(itertools.islice(numbers, sum(n for n, _ in cells))) if first <= number < end
        ]
        found.append((inside[0], inside[-1] + 1) if inside else (0, 0))
    return found


CELL = st.integers(1, 40).flatmap(lambda records: st.tuples(st.just(records), st.integers(records, 60 * records)))


def numberings(segments: int) -> st.SearchStrategy[Numbering]:
    """Draw which segments of a source earlier stages have left, up to the third epoch."""
    return st.integers(0, 3 * segments).flatmap(
        lambda first: st.builds(
            lambda gaps: Numbering(first, tuple(sorted(gaps))),
            st.sets(st.integers(0, max(0, first - 1)), max_size=first),
        )
    )


@settings(max_examples=examples(300))
@given(
    shards=st.lists(st.lists(CELL, max_size=12), min_size=1, max_size=4).filter(any),
    lanes=st.integers(1, 9),
    limit=st.sampled_from([1, 300, 2000, 50_000]),
    largest=st.sampled_from([1, 100, 3000, 16 << 20]),  # bytes of a segment
    deal_bytes=st.sampled_from([1, 1000, 16 << 20]),
    version=st.sampled_from([1, 2]),
    draw=st.data(),
)
def test_every_record_is_found_where_a_walk_through_all_windows_meets_it(
    shards: list[list[tuple[int, int]]],
    lanes: int,
    limit: int,
    largest: int,
    deal_bytes: int,
    version: int,
    draw: st.DataObject,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "_MAX_SEGMENT_BYTES", largest)
        patch.setattr(segments, "_DEAL_BYTES", deal_bytes)
        plan = SourcePlan("s", tables_of(shards), limit, lanes, seed=7, version=version)
        later = draw.draw(numberings(plan.num_segments))
        other = SourcePlan("s", tables_of(shards), limit, draw.draw(st.integers(1, 9)), 7, version, lanes, later)
        first = draw.draw(st.integers(0, plan.num_records - 1))
        taken = taken_by_hand(shards, first, draw.draw(st.integers(first + 1, plan.num_records)))
        part = SourcePlan("s", tables_of(shards), limit, lanes, 7, version, taken=taken)
    records = everything(plan)
    for epoch, expected in enumerate(read_in(plan, epochs=3)):
        assert len(expected) == plan.num_records
        found = np.stack(plan.places_of(*records.T, epoch), axis=1)
        assert found.tolist() == [list(expected[shard, record]) for shard, record in records.tolist()]
    for epoch, expected in enumerate(read_in(other, epochs=3)):
        found = np.stack(other.places_of(*records.T, epoch), axis=1)
        nowhere = (-1, -1, -1)
        assert found.tolist() == [list(expected.get((shard, n), nowhere)) for shard, n in records.tolist()]
    for epoch, expected in enumerate(read_in(part, epochs=2)):
        assert sorted(expected) == [(shard, n) for shard, (a, b) in enumerate(taken) for n in range(a, b)]
        assert part.num_records == len(expected)
        found = np.stack(part.places_of(*everything(part).T, epoch), axis=1)
        assert found.tolist() == [list(expected[shard, n]) for shard, n in everything(part).tolist()]


@settings(max_examples=examples(200))
@given(
    shards=st.lists(st.lists(CELL, max_size=6), min_size=1, max_size=4).filter(any),
    limit=st.sampled_from([1, 300, 2000]),
    largest=st.sampled_from([1, 100, 3000]),
    version=st.sampled_from([1, 2]),
    draw=st.data(),
)
def test_spans_of_a_part_name_whole_cells_and_only_those_that_hold_it(
    shards: list[list[tuple[int, int]]], limit: int, largest: int, version: int, draw: st.DataObject
) -> None:
    total = sum(records for cells in shards for records, _ in cells)
    first = draw.draw(st.integers(0, total - 1))
    taken = taken_by_hand(shards, first, draw.draw(st.integers(first + 1, total)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "_MAX_SEGMENT_BYTES", largest)
        plan = SourcePlan("s", tables_of(shards), limit, 3, 7, version, taken=taken)
        tables = tables_of(shards)
        for lane in range(3):
            q = 0
            while q < plan.segments_of_lane(lane, 1):
                deal = plan.deal(lane, q)
                for span in (span for window in deal.windows for span in window.spans):
                    bounds = tables[span.shard].tolist()
                    begin, end = [span.cells_record, span.start], [span.cells_record + span.cells_records, span.stop]
                    inside = bounds[bounds.index(begin) : bounds.index(end)]
                    last = span.first_record + span.num_records - 1
                    assert inside[-1][0] <= last < end[0]
                    assert begin[0] <= span.first_record < (inside[1:] or [end])[0][0]
                q = deal.next


@pytest.mark.parametrize(("version", "lanes"), [(1, 3), (2, 3), (2, 20)])
def test_segments_of_several_windows_and_windows_of_many_segments(version: int, lanes: int) -> None:
    """The sizes are those of real sources: version 1 cuts a segment into windows, version 2 joins parts of cells."""
    chance = np.random.default_rng(lanes)
    shards = [[(int(count), int(count) * 4000) for count in chance.integers(100, 300, cells)] for cells in (90, 1, 40)]
    plan = SourcePlan("s", tables_of(shards), 1 << 20, lanes, seed=0, version=version)
    expected = read_in(plan, epochs=2)[1]
    assert len({window for _, _, window in expected.values()}) > 1
    asked = list(expected)[::-7]
    places = plan.places_of(*np.array(asked).T, 1)
    found = list(zip(*(column.tolist() for column in places), strict=True))
    assert found == [expected[record] for record in asked]


def test_the_order_and_number_of_questions_change_no_answer() -> None:
    plan = SourcePlan("s", tables_of([[(50, 9000)] * 8, [(7, 100)] * 30]), 2048, 4, seed=1, version=2)
    records = np.array([399, 0, 17, 17, 208])
    together = np.stack(plan.places_of(np.zeros(5, np.int64), records, 4), axis=1)
    alone = [np.stack(plan.places_of(np.zeros(1, np.int64), records[i : i + 1], 4), axis=1)[0] for i in range(5)]
    assert together.tolist() == np.array(alone).tolist()
    none = np.zeros(0, np.int64)
    assert [column.size for column in plan.places_of(none, none, 0)] == [0, 0, 0]
