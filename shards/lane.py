"""A lane: one of V logical streams of rows, drawn from the sources by weight. source -> lane -> {prefetch, loader}.

A lane asks for its windows by name and does not know how they are made in time.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from shards.config import MaxOverflow
from shards.errors import ShardError
from shards.plan.cursor import Carried, Cursor, LaneCursor
from shards.plan.mixing import Mix, mix_of
from shards.plan.segments import Deal, WindowId
from shards.source import Source
from shards.windows.window import SkippedRecord, Window

# In a row, at most 1 GiB: even if half of all deals had no row, a streak this long has a chance of 1 in 10^19. Of a
# source that keeps a share of its documents, so many times more
_MAX_FRUITLESS_DEALS = 64
_RARER_BY_LENGTH = 16  # and of one whose documents are chosen by their length, whose share is not known

Take = Callable[[int, WindowId], Window]  # takes each stream's windows in order, once each; a stream's lane, a name
Passed = tuple[int, SkippedRecord]  # the number of a source, and a record of it that was skipped


class Row(NamedTuple):
    """One row of a window."""

    name: WindowId
    window: Window
    number: int


class Draw(NamedTuple):
    """What a lane yields for a row of the run."""

    row: Row | None  # None = the lane is exhausted, and the row is empty
    skipped: tuple[Passed, ...]  # records skipped in the windows that were entered to get to this row


class Stream:
    """One source as one lane reads it: window after window, row after row."""

    def __init__(
        self, source: Source, lane: int, cursor: Cursor, records_before: int, carried: Sequence[Carried] = ()
    ) -> None:
        """Resume at a cursor.

        Args:
            records_before: number of records in the segments before the cursor's.
            carried: windows that the stage before has left, to be read first.
        """
        self.source, self.number, self.lane, self.cursor = source, source.number, lane, cursor
        self._carried = [
            WindowId(source.number, left.lane, left.segment, left.window, left.stage, left.cuts) for left in carried
        ]
        self._passed = 0  # number of carried windows that were read to their end
        self._limit = source.segments_of_lane(lane)
        low, high = source.config.hash_range or (0.0, 1.0)
        rarer = _RARER_BY_LENGTH if source.config.has_length_bounds else 1
        self._most_fruitless = math.ceil(_MAX_FRUITLESS_DEALS * rarer / (high - low))
        self._window: Window | None = None  # the cursor's window, once needed
        # Number of records in the windows already passed, and in what stages before have drawn of carried ones
        self._records: float = records_before
        if cursor.window:
            self._records += sum(window.num_records for window in self._deal().windows[: cursor.window])
        self._records -= sum(self._share(name) for name in self._carried)

    @property
    def exhausted(self) -> bool:
        """True once the lane has drawn all that max_epochs grants, which only a draw without a row discovers."""
        own = self._limit is not None and self.cursor.segment >= self._limit
        return own and self._passed == len(self._carried)

    @property
    def carried(self) -> tuple[Carried, ...]:
        """Return the windows of an earlier stage that are left to read, the current one included."""
        left = self._carried[self._passed :]
        return tuple(Carried(name.stage, name.lane, name.segment, name.window, name.cuts) for name in left)

    @property
    def position(self) -> WindowId | None:
        """Return the window of the next row, unless no row is left in it; None if the source is exhausted."""
        if self._passed < len(self._carried):
            return self._carried[self._passed]
        return self._name(self.cursor.segment, self.cursor.window)

    @property
    def rows_left(self) -> int:
        """Return the number of rows left to draw in the last window taken."""
        return self._window.rows.num_rows - self.cursor.row if self._window else 0

    def after(self, name: WindowId) -> WindowId | None:
        """Return the window that follows one of this stream; None if the source has no more for this lane."""
        if name in self._carried:
            place = self._carried.index(name) + 1
            own = self._name(self.cursor.segment, self.cursor.window)  # the cursor does not move before these are read
            return self._carried[place] if place < len(self._carried) else own
        return self._name(*self._after(name.segment, name.window))

    def _name(self, segment: int, window: int) -> WindowId | None:
        is_granted = self._limit is None or segment < self._limit
        return WindowId(self.number, self.lane, segment, window, self.source.stage) if is_granted else None

    def _after(self, segment: int, window: int) -> tuple[int, int]:
        deal = self.source.deal(self.lane, segment)
        return (segment, window + 1) if window + 1 < len(deal.windows) else (deal.next, 0)

    def draw(self, take: Take, skipped: list[Passed]) -> Row | None:
        """Draw the next row; None if the source has no more for this lane. Add skipped records to `skipped`.

        Raises: ShardError if a window cannot be made, or if neither a whole pass over the source nor
            too many deals in a row give a row.
        """
        fruitless: list[Deal] = []
        begun: int | None = None  # the segment of the deal that this draw begins
        while (name := self.position) is not None:
            cursor = self.cursor
            if cursor.window == cursor.row == 0 and self._passed == len(self._carried):
                begun = cursor.segment
            if self._window is None:
                self._window = take(self.lane, name)
            window = self._window
            if cursor.row == 0:
                cursor = cursor._replace(skipped=cursor.skipped + sum(not bad.contaminated for bad in window.skipped))
                skipped += ((self.number, bad) for bad in window.skipped)
            if cursor.row < window.rows.num_rows:
                self.cursor = cursor._replace(
                    row=cursor.row + 1, rows_drawn=cursor.rows_drawn + 1, window_rows=window.rows.num_rows
                )
                return Row(name, window, cursor.row)
            self.cursor = cursor._replace(row=0, window_rows=0)
            self._window = None
            self._records += self._share(name)
            if self._passed < len(self._carried):
                self._passed += 1
                continue
            deal = self._deal()
            segment, number = self._after(cursor.segment, cursor.window)
            self.cursor = self.cursor._replace(segment=segment, window=number)
            if segment > cursor.segment == begun:
                fruitless.append(deal)
                self._check_fruitless(fruitless, skipped)
        return None

    def _check_fruitless(self, deals: list[Deal], skipped: list[Passed]) -> None:
        """Check deals that gave no row. Raises: ShardError if they are the whole source, or too many in a row."""
        seen = {segment for deal in deals for segment in deal.segments}
        whole_pass = len(seen) == self.source.plan.num_segments
        if not whole_pass and len(deals) < self._most_fruitless:
            return
        config = self.source.config
        what = "a whole pass over it gives" if whole_pass else f"{len(deals)} consecutive parts of it give"
        last = f": the last, line {skipped[-1][1].line} of its shard, {skipped[-1][1].reason}" if skipped else ""
        parts = "".join(f", or none is in {text}" for text in config.selection_texts.values())
        if isinstance(packing := self.source.packing, MaxOverflow):
            parts += f", or longer than data.packing.max_overflow={packing.max_overflow} allows"
        raise ShardError(
            f"source {config.name!r}: {what} no row; its lines are blank or bad{last}{parts}; is {config.content_key} "
            "right?"
        )

    def progress(self) -> float:
        """Count the records drawn so far, including blank and bad ones and a fraction of the current window's."""
        cursor, name = self.cursor, self.position
        if name is None or not cursor.window_rows:
            return float(self._records)
        return self._records + cursor.row / cursor.window_rows * self._share(name)

    def _share(self, name: WindowId) -> float:
        """Count a window's records, less the fraction that stages before have drawn."""
        left = math.prod(1 - cut.rows / cut.of for cut in name.cuts)
        return left * self.source.window(name).num_records

    def _deal(self) -> Deal:
        return self.source.deal(self.lane, self.cursor.segment)


class Lane:
    """One lane with its streams, one per source."""

    def __init__(self, number: int, streams: list[Stream], rows: int, mixing_rows: int, version: int) -> None:
        """Resume at a number of rows.

        Args:
            number: the lane's number, 0 .. V - 1.
            streams: one per source, in the config's order.
            rows: rows yielded since the number of lanes was chosen, including empty ones.
            mixing_rows: rows drawn since weights last changed or a source was exhausted.
            version: plan version.
        """
        self.number, self.streams = number, streams
        self.rows, self._mixing_rows = rows, mixing_rows
        self._version = version

    def draw(self, weights: Sequence[float], changed: bool, take: Take) -> Draw:
        """Draw the lane's next row, which is empty if no source has any left.

        Args:
            weights: weights of the sources at this row's step, exhausted or not.
            changed: True if they differ from those of the lane's previous row.
            take: returns the windows that are reached.
        """
        if changed:
            self._mixing_rows = 0
        skipped: list[Passed] = []
        row = None
        while row is None and (mix := self._mix(weights)) is not None:
            source = mix.source_of(self.number, self._mixing_rows)
            row = self.streams[source].draw(take, skipped)
            # A source without a row leaves the mix, and the others' counts and phases start anew.
            self._mixing_rows = self._mixing_rows + 1 if row else 0
        self.rows += 1
        return Draw(row, tuple(skipped))

    def _mix(self, weights: Sequence[float]) -> Mix | None:
        """Return the mix of the remaining sources; None if none of them has a weight."""
        left = tuple(0.0 if stream.exhausted else weight for stream, weight in zip(self.streams, weights, strict=True))
        return mix_of(left, self._version)

    def is_dry(self, weightings: Sequence[Sequence[float]]) -> bool:
        """Return whether no source is left with a weight in any of these weightings."""
        return all(self._mix(weights) is None for weights in weightings)

    def row_of_use(self, source: int, uses: int, weightings: Sequence[tuple[int, Sequence[float]]]) -> int | None:
        """Find the row at which the lane has drawn `uses` more rows of a source and reaches the next; None = never.

        Args:
            weightings: (row of this lane from which they apply, weights), in order.
        """
        row, mixing_rows = self.rows, self._mixing_rows
        ends = [first for first, _ in weightings[1:]]
        for (first, weights), end in zip(weightings, [*ends, sys.maxsize], strict=True):
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
        """Return the lane's cursor."""
        carried = {str(stream.number): left for stream in self.streams if (left := stream.carried)}
        return LaneCursor(self.rows, self._mixing_rows, tuple(stream.cursor for stream in self.streams), carried)
