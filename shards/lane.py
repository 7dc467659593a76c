"""A lane: one of V logical streams of rows, drawn from the sources by weight. sources, pool -> lane -> loader."""

import sys
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from shards.cursor import Cursor, LaneCursor
from shards.errors import ShardError
from shards.plan import Ints, integer_weights, lane_phase, mixing_sequence, source_of_row
from shards.pool import Pool, WindowId
from shards.reader import BadRecord
from shards.sources import Source
from shards.window import Window, WindowTask

# In turn, at most 1 GiB: with half of all segments without a row, chance gives none in 10^19
MAX_FRUITLESS_SEGMENTS = 64
BYTES_PER_TOKEN = 4  # of raw text, about: only to guess when a window will be needed


class Draw(NamedTuple):
    """A row as a lane gives it out."""

    name: WindowId
    window: Window
    row: int
    skipped: tuple[tuple[WindowId, BadRecord], ...]  # in the windows that were entered to get to this row


class Stream:
    """One source as one lane reads it: window after window, row after row."""

    def __init__(self, source: Source, number: int, lane: int, cursor: Cursor, row_tokens: int) -> None:
        """
        Args:
            number: of the source in the config.
            row_tokens: tokens per row, to guess how many rows a window will have.
        """
        self.source, self.number, self.lane, self.cursor = source, number, lane, cursor
        self._bytes_per_row = BYTES_PER_TOKEN * row_tokens
        self._limit = source.segments_of_lane(lane)
        self._window: Window | None = None  # that of the cursor, once it was needed
        self._num_windows: dict[int, int] = {}  # by segment, of the segments between the cursor and _next
        self._next: tuple[int, int] = (cursor.segment, cursor.window)  # first (segment, window) not yet requested
        self._requested: deque[int] = deque()  # guessed rows of the windows requested and not opened

    @property
    def exhausted(self) -> bool:
        """True when the lane has drawn all that max_epochs grants it. Known only once a draw has found nothing."""
        return self._limit is not None and self.cursor.segment >= self._limit

    def draw(self, pool: Pool, skipped: list[tuple[WindowId, BadRecord]]) -> tuple[WindowId, Window, int] | None:
        """The next row; None when the source has no more for this lane. Bad records passed over go to `skipped`.

        Raises: ShardError if a window cannot be made, or if neither the whole source nor MAX_FRUITLESS_SEGMENTS in
            turn give a row.
        """
        whole = self.cursor.window == self.cursor.row == 0  # this segment is read from its beginning here
        fruitless: list[int] = []
        while not self.exhausted:
            cursor = self.cursor
            name = WindowId(self.number, self.lane, cursor.segment, cursor.window)
            window = self._open(name, pool)
            if cursor.row == 0:
                cursor = cursor._replace(skipped=cursor.skipped + sum(not bad.contaminated for bad in window.skipped))
                skipped += ((name, bad) for bad in window.skipped)
            if cursor.row < window.rows.num_rows:
                self.cursor = cursor._replace(row=cursor.row + 1, rows_drawn=cursor.rows_drawn + 1)
                return name, window, cursor.row
            segment, number = self._after(cursor.segment, cursor.window)
            self.cursor = cursor._replace(segment=segment, window=number, row=0)
            self._window = None
            if segment > cursor.segment:
                if whole:
                    fruitless.append(self.source.plan.segment_of(self.lane, cursor.segment)[1])
                    self._check_fruitless(fruitless, skipped)
                whole = True
        return None

    def _check_fruitless(self, segments: list[int], skipped: list[tuple[WindowId, BadRecord]]) -> None:
        """Raises: ShardError if segments without a row are all of the source, or too many in turn."""
        whole_pass = len(set(segments)) == self.source.plan.num_segments
        if not whole_pass and len(segments) < MAX_FRUITLESS_SEGMENTS:
            return
        what = "a whole pass over it gives" if whole_pass else f"{len(segments)} segments in turn give"
        last = f": the last, line {skipped[-1][1].line} of its shard, {skipped[-1][1].reason}" if skipped else ""
        raise ShardError(
            f"source {self.source.config.name!r}: {what} no row; its lines are blank or bad{last}; is text_key right?"
        )

    def next_request(self) -> tuple[WindowId, WindowTask] | None:
        """The first window that was not requested yet; None at the source's end."""
        segment, window = self._next
        if self._limit is not None and segment >= self._limit:
            return None
        name = WindowId(self.number, self.lane, segment, window)
        return name, self.source.task(name)

    def requested(self, task: WindowTask) -> None:
        """Takes note that `next_request` was handed to the pool."""
        self._requested.append((task.raw.stop - task.raw.start) // self._bytes_per_row)
        self._next = self._after(*self._next)

    def rows_until_request(self) -> int:
        """How many more rows the lane draws from this source, about, before it needs `next_request`."""
        left = self._window.rows.num_rows - self.cursor.row if self._window else 0
        return left + sum(self._requested)

    def progress(self) -> float:
        """Segments drawn so far, the present one in part."""
        if self.exhausted:
            return float(self.cursor.segment)
        done = self.cursor.row / max(1, self._window.rows.num_rows) if self._window else 0.0
        return self.cursor.segment + (self.cursor.window + done) / self._windows_in(self.cursor.segment)

    def _open(self, name: WindowId, pool: Pool) -> Window:
        if self._window is None:
            if self._next == (name.segment, name.window):
                self._next = self._after(*self._next)
            elif self._requested:
                self._requested.popleft()
            self._window = pool.take(name, self.source.task(name))
        return self._window

    def _after(self, segment: int, window: int) -> tuple[int, int]:
        return (segment, window + 1) if window + 1 < self._windows_in(segment) else (segment + 1, 0)

    def _windows_in(self, segment: int) -> int:
        if segment not in self._num_windows:
            for old in [old for old in self._num_windows if old < self.cursor.segment]:
                del self._num_windows[old]
            self._num_windows[segment] = len(self.source.windows(self.lane, segment))
        return self._num_windows[segment]


class Lane:
    """One lane with its streams, one per source."""

    def __init__(self, number: int, streams: list[Stream], rows: int, mixing_rows: int) -> None:
        """
        Args:
            number: of the lane, 0 .. V - 1.
            streams: one per source, in the config's order.
            rows: drawn since the run's start.
            mixing_rows: drawn since weights last changed or a source was exhausted.
        """
        self.number, self.streams = number, streams
        self.rows, self._mixing_rows = rows, mixing_rows

    def draw(self, weights: Sequence[float], changed: bool, pool: Pool) -> Draw | None:
        """The lane's next row; None when no source has one left.

        Args:
            weights: of the sources at this row's step, exhausted or not.
            changed: they differ from those of the lane's row before.
        """
        if changed:
            self._mixing_rows = 0
        skipped: list[tuple[WindowId, BadRecord]] = []
        while (shares := self.shares(weights)) is not None:
            source = source_of_row(self.number, self._mixing_rows, shares)
            drawn = self.streams[source].draw(pool, skipped)
            if drawn is not None:
                self._mixing_rows += 1
                self.rows += 1
                return Draw(*drawn, tuple(skipped))
            self._mixing_rows = 0  # the source left the mix: the others' counts and phases start anew
        return None

    def shares(self, weights: Sequence[float]) -> tuple[int, ...] | None:
        """Integer shares of the sources that are left; None if there are none with a weight."""
        left = tuple(0.0 if stream.exhausted else weight for stream, weight in zip(self.streams, weights, strict=True))
        return _shares(left) if any(left) else None

    def row_of_use(self, source: int, uses: int, stages: Sequence[tuple[int, Sequence[float]]]) -> int | None:
        """The row at which the lane has drawn `uses` more from a source and comes to the next; None = never.

        Args:
            stages: (row of this lane from which they count, weights), in their order.
        """
        row, mixing_rows = self.rows, self._mixing_rows
        ends = [first for first, _ in stages[1:]]
        for (first, weights), end in zip(stages, [*ends, sys.maxsize], strict=True):
            if end <= row:
                continue
            if first >= row:
                row, mixing_rows = first, 0
            shares = self.shares(weights)
            places = _places(shares, source) if shares else np.zeros(0, np.int64)
            if shares and len(places):
                period = sum(shares)
                now = (lane_phase(self.number, period) + mixing_rows) % period
                passed = int(np.searchsorted(places, now))
                turns, place = divmod(passed + uses, len(places))
                found = row + turns * period + int(places[place]) - now
                if found < end:
                    return found
                turns, place = divmod(now + end - row, period)
                uses -= turns * len(places) + int(np.searchsorted(places, place)) - passed
        return None

    def cursor(self) -> LaneCursor:
        """Where the lane stands."""
        return LaneCursor(self.rows, self._mixing_rows, tuple(stream.cursor for stream in self.streams))


_shares = lru_cache(maxsize=256)(integer_weights)


@lru_cache(maxsize=256)
def _places(shares: tuple[int, ...], source: int) -> Ints:
    """Where a source stands in the mixing sequence, rising."""
    return np.flatnonzero(mixing_sequence(shares) == source)
