"""Which record of which source is read where and when: pure functions of (record tables, seed, plan version).

shard_index -> segments -> lane. A source is cut into *segments*, which each epoch permutes and deals to the lanes in
turn. A *deal* is consecutive segments of one lane's sequence within one epoch, and a *window* is part of a deal.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

import msgspec
import numpy as np

from shards.arrays import Ints, greedy_groups
from shards.hashing import key_of, permutation, permutations
from shards.plan.cursor import EVERY_SEGMENT, Cut, Numbering
from shards.plan.taken import Range, taken_cells

_MAX_SEGMENT_BYTES = 16 << 20  # raw bytes read contiguously from a large source
_DEAL_BYTES = 16 << 20  # approximate raw bytes of a deal whose segments are smaller
_MAX_DEAL_SEGMENTS = 4096
_SEGMENTS_PER_LANE = {1: 8, 2: 64}  # by plan version: minimum per epoch if the source is large enough
# Under version 2 a segment is at least this large, or a 4,096th of the source if that is less: a window is gathered
# from as many places as it has segments, and each place costs decoding from the entry before it. With segments of 64
# KiB, windows of 1 GB in one frame came at a seventh of the rate of whole MiBs; with these, at two fifths.
_SMALL_SEGMENT_BYTES = 256 << 10
_SMALL_SEGMENTS = 4096
_SUMMED_AT_ONCE = 1 << 20  # segments summed together, over all epochs


class Span(msgspec.Struct, frozen=True):
    """Consecutive records of a shard, and the whole cells that hold them."""

    shard: int  # number in the source
    first_record: int  # number in the shard, counted from 0
    num_records: int  # including blank and bad ones
    cells_record: int  # number of the cells' first record
    cells_records: int  # number of records in the cells
    start: int  # raw offset in the shard where the cells begin
    stop: int  # raw offset where they end

    @property
    def raw_bytes(self) -> int:
        """Raw bytes of the records, as if all records of a cell had equal length."""
        return (self.stop - self.start) * self.num_records // self.cells_records


class WindowPlan(NamedTuple):
    """The records of a window, in the order of the source."""

    spans: tuple[Span, ...]
    num_records: int
    raw_bytes: int  # estimated where cells are divided


class WindowId(NamedTuple):
    """The name of a window as its lane reaches it."""

    source: int
    lane: int
    segment: int  # q: the deal begins with the lane's q-th segment
    window: int  # number in the deal
    stage: int = 0  # number of the stage in whose plan it has this name
    cuts: tuple[Cut, ...] = ()  # what earlier stages have drawn from it


class Deal(NamedTuple):
    """Consecutive segments of a lane's sequence, all of one epoch."""

    epoch: int
    segments: tuple[int, ...]  # numbers in the source, in the epoch's order
    windows: tuple[WindowPlan, ...]
    next: int  # q of the following segment in the lane's sequence


class Places(NamedTuple):
    """Where an epoch reads records: of each, the parts of the name of its window; -1 if an earlier stage dealt it."""

    lanes: Ints
    segments: Ints  # q: the deal that holds it begins with the lane's q-th segment
    windows: Ints  # number in the deal


class _SpanColumns(NamedTuple):
    """The spans into which windows divide a source, in its order."""

    first_records: Ints  # [spans]: in the concatenation of all shards
    sizes: Ints  # [spans]: raw bytes, as `Span.raw_bytes`
    starts: Ints  # [segments + 1]: each segment's first span


class SourcePlan:
    """One source's records, cut into segments and windows, dealt to lanes for any number of epochs."""

    def __init__(
        self,
        name: str,
        tables: list[Ints],
        window_limit: int,
        lanes: int,
        seed: int,
        version: int,
        segment_lanes: int | None = None,
        numbering: Numbering = EVERY_SEGMENT,
        taken: Sequence[Range] | None = None,
    ) -> None:
        """Cut a source into segments.

        Args:
            name: the source's name; its order depends on it.
            tables: for each shard, int64 [cells + 1, 2]: each cell's first record and raw offset; last, the shard's
                end.
            window_limit: raw bytes per window.
            lanes: V.
            seed: the run's seed.
            version: plan version. Under version 1 a segment is at least a window, and each is a deal of its own.
            segment_lanes: V of the stage that added the source, which decides its segments for good; None = `lanes`.
            numbering: the segments to deal, without those that earlier stages have dealt.
            taken: of each shard, the first record to read and one past the last, all without a gap; None = all.
        """
        self.name, self.num_lanes, self._seed = name, lanes, seed
        self._first, self._gaps = numbering.first, np.array(numbering.gaps, np.int64)
        self._window_limit = window_limit
        part = taken_cells(tables, taken or [(0, int(table[-1, 0])) for table in tables])
        self._skipped, self._shifts, self._head, self._tail = part.skipped, part.shifts, part.head, part.tail
        tables = part.tables
        self._shard_cells = np.cumsum([0, *(len(table) - 1 for table in tables)])  # each shard's first cell
        # Offsets and records in the concatenation of all shards, so that one search covers them all.
        ends = np.cumsum([[0, 0], *(table[-1] for table in tables)], axis=0)
        places = [end + table[:-1] for end, table in zip(ends[:-1], tables, strict=True)]
        records, self._offsets = np.ascontiguousarray(np.concatenate([*places, ends[-1:]]).T)
        self._records, self._shard_ends = records, ends
        self.num_records, self.raw_bytes = int(records[-1]), int(self._offsets[-1])
        wanted = self.raw_bytes // (_SEGMENTS_PER_LANE[version] * (segment_lanes or lanes))
        least = min(_SMALL_SEGMENT_BYTES, self.raw_bytes // _SMALL_SEGMENTS) if version > 1 else window_limit
        self.segment_bytes = max(1, least, min(wanted, _MAX_SEGMENT_BYTES))
        self._cut(divide=version > 1)
        mean_bytes = max(1, self.raw_bytes // max(1, self.num_segments))
        self._deal_segments = min(max(1, _DEAL_BYTES // mean_bytes), _MAX_DEAL_SEGMENTS) if version > 1 else 1
        self._permutation = lru_cache(maxsize=8)(self._permute)
        self.deal = lru_cache(maxsize=2 * lanes + 2)(self._deal)  # the current and the next deal of each lane

    def _cut(self, divide: bool) -> None:
        """Cut the source into segments along cells; with `divide`, cut cells longer than a segment by records."""
        first = greedy_groups(self._offsets, self._shard_cells, self.segment_bytes)
        stop = np.append(first[1:], len(self._offsets) - 1)
        records, sizes = self._records[stop] - self._records[first], self._offsets[stop] - self._offsets[first]
        parts = np.ones(len(first), np.int64)
        if divide:
            parts = np.clip(-(-sizes // self.segment_bytes), 1, np.maximum(1, records))
        which = np.repeat(np.arange(len(first)), parts)
        part = np.arange(len(which)) - np.repeat(np.cumsum(parts) - parts, parts)
        self._first_cell, self._stop_cell = first[which], stop[which]
        bounds = [self._records[first][which] + records[which] * (part + i) // parts[which] for i in (0, 1)]
        self._first_record, self._stop_record = bounds  # in the concatenation of all shards
        counts = self._stop_record - self._first_record
        self._sizes = np.stack(
            [counts, sizes[which] * counts // np.maximum(1, records[which])]
        )  # records and raw bytes

    @property
    def num_segments(self) -> int:
        return len(self._first_cell)

    def _permute(self, epoch: int) -> Ints:
        return permutation(self._epoch_key(epoch), self.num_segments)

    def _epoch_key(self, epoch: int) -> int:
        return key_of("segments", self._seed, self.name, epoch)

    def segments_of_lane(self, lane: int, max_epochs: int) -> int:
        """Count the segments that a lane is dealt until `max_epochs` epochs are over."""
        return len(range(lane, self.places_before(max_epochs * self.num_segments), self.num_lanes))

    def number_of(self, places: Ints) -> Ints:
        """Return the numbers of the segments at places of the order in which this plan deals them."""
        fresh = places - len(self._gaps) + self._first
        if not len(self._gaps):
            return fresh
        return np.where(places < len(self._gaps), self._gaps[np.minimum(places, len(self._gaps) - 1)], fresh)

    def places_before(self, number: int) -> int:
        """Count the places of the segments below a number."""
        return int(np.searchsorted(self._gaps, number)) + max(0, number - self._first)

    def place_of(self, numbers: Ints) -> Ints:
        """Return the places of segments by their numbers, the inverse of `number_of`; -1 = this plan deals it not."""
        places = numbers - self._first + len(self._gaps)
        before = numbers < self._first
        if before.any():
            found = np.searchsorted(self._gaps, numbers[before])
            in_gap = np.append(self._gaps, -1)[found] == numbers[before]
            places[before] = np.where(in_gap, found, -1)
        return places

    def read_before(self, counts: Ints) -> Ints:
        """Sum what each lane's first segments hold. What earlier stages were dealt counts for lane 0.

        The time depends only on the number of these segments, however many epochs and lanes they are spread over.

        Args:
            counts: int64 [V], number of segments of each lane.
        Returns: int64 [2, V], their records and approximate raw bytes.
        """
        sums = np.zeros((2, self.num_lanes), np.int64)
        stops = np.where(counts > 0, (counts - 1) * self.num_lanes + np.arange(self.num_lanes) + 1, 0)
        stop = max(self._first, int(self.number_of(np.array([stops.max() - 1]))[0]) + 1)
        epochs, at_once = -(-stop // self.num_segments), max(1, _SUMMED_AT_ONCE // self.num_segments)
        for first in range(0, epochs, at_once):
            keys = [self._epoch_key(epoch) for epoch in range(first, min(epochs, first + at_once))]
            dealt = permutations(keys, self.num_segments).ravel()
            numbers = first * self.num_segments + np.arange(len(dealt))
            places = self.place_of(numbers)
            lanes = np.maximum(places, 0) % self.num_lanes
            read = places // self.num_lanes < counts[lanes]  # a place below 0 was dealt before
            sums += np.array(
                [np.bincount(lanes[read], sizes[dealt[read]], self.num_lanes) for sizes in self._sizes]
            ).astype(np.int64)
        return sums

    def _deal(self, lane: int, q: int) -> Deal:
        """Return the deal from a lane's q-th segment, which is at place q * V + lane."""
        places = (q + np.arange(self._deal_segments)) * self.num_lanes + lane
        epochs, positions = np.divmod(self.number_of(places), self.num_segments)
        epoch = int(epochs[0])
        dealt = self._permutation(epoch)[positions[epochs == epoch]]
        return Deal(epoch, tuple(dealt.tolist()), tuple(self._windows(dealt)), q + len(dealt))

    def places_of(self, shards: Ints, records: Ints, epoch: int) -> Places:
        """Find the windows that read some records in an epoch: the inverse of `deal`, for all of them at once.

        The time depends on the number of the source's segments, and hardly on the number of records.

        Args:
            shards: int64 [records], number of each one's shard in the source.
            records: int64 [records], number of each in its shard, counted from 0; all of them must be taken.
            epoch: counted from 0.
        """
        begins = self._shard_ends[shards, 0]
        numbers = begins + records - self._skipped[shards]
        assert ((begins <= numbers) & (numbers < self._shard_ends[1:, 0][shards])).all(), "no such record"
        columns = self._span_columns
        spans = np.searchsorted(columns.first_records, numbers, side="right") - 1
        segments = np.searchsorted(columns.starts, spans, side="right") - 1
        order, begin = self._permutation(epoch), epoch * self.num_segments
        positions = np.empty_like(order)
        positions[order] = np.arange(self.num_segments)
        places = self.place_of(begin + positions[segments])
        found = np.full((3, len(numbers)), -1)
        here = places >= 0
        places, spans, segments = places[here], spans[here], segments[here]
        # A lane's places are V apart, and the first of them in the epoch begins a deal.
        in_deal = (places - self.places_before(begin)) // self.num_lanes % self._deal_segments
        deals, deal_of = np.unique(places - in_deal * self.num_lanes, return_inverse=True)
        reach = deals[:, None] + self.num_lanes * np.arange(self._deal_segments)
        inside = reach < self.places_before(begin + self.num_segments)
        deal_starts = np.concatenate([[0], np.cumsum(inside.sum(axis=1))])
        dealt = order[self.number_of(reach[inside]) - begin]
        windows, span_starts = self._window_numbers(dealt, deal_starts)
        which = span_starts[deal_starts[deal_of] + in_deal] + spans - columns.starts[segments]
        found[:, here] = places % self.num_lanes, places // self.num_lanes - in_deal, windows[which]
        return Places(*found)

    def _window_numbers(self, dealt: Ints, deal_starts: Ints) -> tuple[Ints, Ints]:
        """Count the windows of deals, as `_windows` cuts them.

        Args:
            dealt: segments, deal by deal.
            deal_starts: int64 [deals + 1], where each deal begins in `dealt`, and the end.
        Returns: for each span of these segments, the number of its window in its deal; and int64 [segments + 1], each
            segment's first span among them.
        """
        columns = self._span_columns
        counts = columns.starts[dealt + 1] - columns.starts[dealt]
        span_starts = np.concatenate([[0], np.cumsum(counts)])
        spans = np.arange(span_starts[-1]) + np.repeat(columns.starts[dealt] - span_starts[:-1], counts)
        offsets = np.concatenate([[0], np.cumsum(columns.sizes[spans])])
        bounds = span_starts[deal_starts]
        firsts = greedy_groups(offsets, bounds, self._window_limit)  # the first span of each window
        numbers = np.searchsorted(firsts, np.arange(len(spans)), side="right")
        return numbers - np.repeat(numbers[bounds[:-1]], np.diff(bounds)), span_starts

    @cached_property
    def _span_columns(self) -> _SpanColumns:
        """Cut every segment into its spans, as `_spans` does with those of a deal."""
        undivided = np.append(True, self._first_cell[1:] != self._first_cell[:-1])
        bounds = np.append(self._first_cell[undivided], len(self._offsets) - 1)
        cells = greedy_groups(self._offsets, bounds, self._window_limit)
        first_records = np.union1d(self._records[cells], self._first_record)  # only single cells are divided
        starts = np.searchsorted(first_records, np.append(self._first_record, self.num_records))
        cell_ends = np.append(cells[1:], len(self._offsets) - 1)
        which = np.searchsorted(self._records[cells], first_records, side="right") - 1
        shifts = self._shifts[np.searchsorted(self._shard_cells, cells, side="right") - 1].T
        begins, ends = (np.stack([self._records[at], self._offsets[at]]) + shifts for at in (cells, cell_ends))
        begins[:, cells == 0] = np.reshape(self._head, (2, 1))
        ends[:, cell_ends == len(self._offsets) - 1] = np.reshape(self._tail, (2, 1))
        cell_records, cell_sizes = (ends - begins)[:, which]
        counts = np.diff(np.append(first_records, self.num_records))
        return _SpanColumns(first_records, cell_sizes * counts // cell_records, starts)

    def _windows(self, segments: Ints) -> Iterator[WindowPlan]:
        """Cut segments longer than a window along cells and join shorter ones, in order."""
        spans: list[Span] = []
        size = 0
        for span in self._spans(segments):
            if spans and size + span.raw_bytes > self._window_limit:
                yield _window(spans)
                spans, size = [], 0
            spans.append(span)
            size += span.raw_bytes
        yield _window(spans)

    def _spans(self, segments: Ints) -> Iterator[Span]:
        columns = (self._first_cell, self._stop_cell, self._first_record, self._stop_record)
        for first, stop, *records in zip(*(column[segments].tolist() for column in columns), strict=True):
            size = int(self._offsets[stop] - self._offsets[first])
            if stop - first == 1 or size <= self._window_limit:
                yield self._span(first, stop, *records)
                continue
            starts = greedy_groups(self._offsets, np.array([first, stop]), self._window_limit).tolist()
            for a, b in itertools.pairwise([*starts, stop]):
                yield self._span(a, b, int(self._records[a]), int(self._records[b]))

    def _span(self, first: int, stop: int, first_record: int, stop_record: int) -> Span:
        """Make a span of records, numbered in the concatenation of all shards, in cells of one shard."""
        shard = int(np.searchsorted(self._shard_cells, first, side="right")) - 1
        (cells_record, start), (cells_stop, end) = (
            (int(self._records[cell] + self._shifts[shard, 0]), int(self._offsets[cell] + self._shifts[shard, 1]))
            for cell in (first, stop)
        )
        if first == 0:
            cells_record, start = self._head
        if stop == len(self._offsets) - 1:
            cells_stop, end = self._tail
        skipped = int(self._skipped[shard] - self._shard_ends[shard, 0])
        return Span(
            shard=shard,
            first_record=first_record + skipped,
            num_records=stop_record - first_record,
            cells_record=cells_record,
            cells_records=cells_stop - cells_record,
            start=start,
            stop=end,
        )


def _window(spans: list[Span]) -> WindowPlan:
    ordered = tuple(sorted(spans, key=lambda span: (span.shard, span.first_record)))  # so each shard is read forward
    return WindowPlan(ordered, sum(span.num_records for span in ordered), sum(span.raw_bytes for span in ordered))
