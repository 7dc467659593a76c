"""A lane: one of V logical streams of rows, drawn from the sources by weight. source -> lane -> {prefetch, loader}.

A lane takes its windows by their names, and does not know how they come to be made in time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from shards.errors import ShardError
from shards.plan.cursor import Cursor, LaneCursor
from shards.plan.mixing import Mix, mix_of
from shards.plan.segments import Deal, WindowId
from shards.source import Source
from shards.windows.window import SkippedRecord, Window

# In turn, at most 1 GiB: with half of all deals without a row, chance gives none in 10^19
_MAX_FRUITLESS_DEALS = 64

Take = Callable[[WindowId], Window]  # each stream's windows are taken in their order, once each
Passed = tuple[int, SkippedRecord]  # number of the source, and a record of it that was passed over


class Row(NamedTuple):
    """One row of a window."""

    name: WindowId
    window: Window
    number: int


class Draw(NamedTuple):
    """What a lane gives out for a row of the run."""

    row: Row | None  # None: the lane has run dry, and the row is empty
    skipped: tuple[Passed, ...]  # in the windows that were entered to get to this row


class Stream:
    """One source as one lane reads it: window after window, row after row."""

    def __init__(self, source: Source, lane: int, cursor: Cursor, records_before: int) -> None:
        """
        Args:
            records_before: in the segments before that of the cursor.
        """
        self.source, self.number, self.lane, self.cursor = source, source.number, lane, cursor
        self._limit = source.segments_of_lane(lane)
        self._window: Window | None = None  # that of the cursor, once it was needed
        self._records = records_before  # of the windows that were left behind
        if cursor.window:
            self._records += sum(window.num_records for window in self._deal().windows[: cursor.window])

    @property
    def exhausted(self) -> bool:
        """Whether the lane has drawn all that max_epochs grants it. Known only once a draw has found nothing."""
        return self._limit is not None and self.cursor.segment >= self._limit

    @property
    def position(self) -> WindowId | None:
        """The window that the next row is of, unless that has no row left; None when the source is exhausted."""
        return self._name(self.cursor.segment, self.cursor.window)

    @property
    def rows_left(self) -> int:
        """Rows left to draw of the window that was taken last."""
        return self._window.rows.num_rows - self.cursor.row if self._window else 0

    def after(self, name: WindowId) -> WindowId | None:
        """Return the window that follows one of this stream; None when the source has no more for this lane."""
        return self._name(*self._after(name.segment, name.window))

    def _name(self, segment: int, window: int) -> WindowId | None:
        is_granted = self._limit is None or segment < self._limit
        return WindowId(self.number, self.lane, segment, window) if is_granted else None

    def _after(self, segment: int, window: int) -> tuple[int, int]:
        deal = self.source.deal(self.lane, segment)
        return (segment, window + 1) if window + 1 < len(deal.windows) else (deal.next, 0)

    def draw(self, take: Take, skipped: list[Passed]) -> Row | None:
        """Draw the next row; None when the source has no more for this lane. Skipped records are added to `skipped`.

        Raises: ShardError if a window cannot be made, or if neither the whole source nor MAX_FRUITLESS_DEALS in turn
            give a row.
        """
        whole = self.cursor.window == self.cursor.row == 0  # this deal is read from its beginning here
        fruitless: list[Deal] = []
        while (name := self.position) is not None:
            cursor = self.cursor
            if self._window is None:
                self._window = take(name)
            window = self._window
            if cursor.row == 0:
                cursor = cursor._replace(skipped=cursor.skipped + sum(not bad.contaminated for bad in window.skipped))
                skipped += ((self.number, bad) for bad in window.skipped)
            if cursor.row < window.rows.num_rows:
                self.cursor = cursor._replace(
                    row=cursor.row + 1, rows_drawn=cursor.rows_drawn + 1, window_rows=window.rows.num_rows
                )
                return Row(name, window, cursor.row)
            deal = self._deal()
            segment, number = self._after(cursor.segment, cursor.window)
            self.cursor = cursor._replace(segment=segment, window=number, row=0, window_rows=0)
            self._window = None
            self._records += deal.windows[cursor.window].num_records
            if segment > cursor.segment:
                if whole:
                    fruitless.append(deal)
                    self._check_fruitless(fruitless, skipped)
                whole = True
        return None

    def _check_fruitless(self, deals: list[Deal], skipped: list[Passed]) -> None:
        """Raises: ShardError if deals without a row are all of the source, or too many in turn."""
        seen = {segment for deal in deals for segment in deal.segments}
        whole_pass = len(seen) == self.source.plan.num_segments
        if not whole_pass and len(deals) < _MAX_FRUITLESS_DEALS:
            return
        what = "a whole pass over it gives" if whole_pass else f"{len(deals)} parts of it in turn give"
        last = f": the last, line {skipped[-1][1].line} of its shard, {skipped[-1][1].reason}" if skipped else ""
        raise ShardError(
            f"source {self.source.config.name!r}: {what} no row; its lines are blank or bad{last}; is text_key right?"
        )

    def progress(self) -> float:
        """Count the records drawn so far, blank and bad ones too, those of the present window in part."""
        cursor = self.cursor
        if not cursor.window_rows:
            return float(self._records)
        return self._records + cursor.row / cursor.window_rows * self._deal().windows[cursor.window].num_records

    def _deal(self) -> Deal:
        return self.source.deal(self.lane, self.cursor.segment)


class Lane:
    """One lane with its streams, one per source."""

    def __init__(self, number: int, streams: list[Stream], rows: int, mixing_rows: int, version: int) -> None:
        """
        Args:
            number: of the lane, 0 .. V - 1.
            streams: one per source, in the config's order.
            rows: given out since the run's start, empty ones counted.
            mixing_rows: drawn since weights last changed or a source was exhausted.
            version: of the plan.
        """
        self.number, self.streams = number, streams
        self.rows, self._mixing_rows = rows, mixing_rows
        self._version = version

    def draw(self, weights: Sequence[float], changed: bool, take: Take) -> Draw:
        """Draw the lane's next row, an empty one when no source has any left.

        Args:
            weights: of the sources at this row's step, exhausted or not.
            changed: they differ from those of the lane's row before.
            take: hands over the windows that are come to.
        """
        if changed:
            self._mixing_rows = 0
        skipped: list[Passed] = []
        row = None
        while row is None and (mix := self._mix(weights)) is not None:
            source = mix.source_of(self.number, self._mixing_rows)
            row = self.streams[source].draw(take, skipped)
            # Where it has none, the source leaves the mix: the others' counts and phases start anew.
            self._mixing_rows = self._mixing_rows + 1 if row else 0
        self.rows += 1
        return Draw(row, tuple(skipped))

    def _mix(self, weights: Sequence[float]) -> Mix | None:
        """Return the mix of the sources that are left; None if there are none with a weight."""
        left = tuple(0.0 if stream.exhausted else weight for stream, weight in zip(self.streams, weights, strict=True))
        return mix_of(left, self._version)

    def is_dry(self, stages: Sequence[Sequence[float]]) -> bool:
        """Tell whether no source is left that has a weight in any of these stages."""
        return all(self._mix(weights) is None for weights in stages)

    def row_of_use(self, source: int, uses: int, stages: Sequence[tuple[int, Sequence[float]]]) -> int | None:
        """Find the row at which the lane has drawn `uses` more from a source and comes to the next; None = never.

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
            if mix := self._mix(weights):
                found = mix.row_of_use(self.number, source, mixing_rows, uses)
                if found is not None and row + found - mixing_rows < end:
                    return row + found - mixing_rows
                last = mixing_rows + end - row
                uses -= mix.drawn(self.number, source, last) - mix.drawn(self.number, source, mixing_rows)
        return None

    def cursor(self) -> LaneCursor:
        """Return where the lane stands."""
        return LaneCursor(self.rows, self._mixing_rows, tuple(stream.cursor for stream in self.streams))
