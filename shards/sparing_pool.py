"""A pool that makes a window only where that cannot be avoided. worker_pool -> sparing_pool -> history.

A lane must know of a window how many rows it has, to draw the right one next, and the states that a run recorded say
that of most. Only what holds documents that are asked for has to be read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from shards.errors import CheckpointError
from shards.plan.cursor import LoaderState
from shards.plan.segments import WindowId
from shards.source import Source
from shards.windows.packing import Rows
from shards.windows.window import Window
from shards.windows.worker_pool import NOW, Pool, WindowRequest

_LINE_BITS = 40  # of a number that names a record by shard and line


class Piece(NamedTuple):
    """A stretch of a document in a row of a window."""

    document: int  # number among those that are asked for
    row: int
    start: int  # its first token in the document, BOS counted
    stop: int  # one past its last
    forgotten: bool  # there is padding in its place, since data.forget names the document


class Drop(NamedTuple):
    """A record that was read and gave no document."""

    document: int  # number among those that are asked for
    reason: str
    contaminated: bool  # it shares text with a suite; else it is a bad record


class Contents(NamedTuple):
    """What a window has of the documents that are asked for."""

    pieces: dict[int, list[Piece]]  # by row
    drops: list[Drop]


class SparingPool:
    """A pool whose windows have a number of rows and nothing else; `contents` says what is sought in them.

    Args:
        pool: makes windows, none of them ahead.
        numbers: of the documents that are asked for, by (source, shard, line).
    """

    ahead = 0

    def __init__(self, pool: Pool, numbers: Mapping[tuple[int, int, int], int]) -> None:
        self._pool, self._numbers = pool, numbers
        self._keys = {
            source: np.array([shard << _LINE_BITS | line for other, shard, line in numbers if other == source])
            for source, _, _ in numbers
        }
        self._contents: dict[WindowId, Contents] = {}
        self._num_rows: dict[WindowId, int] = {}
        self.num_made = 0

    def learn(self, state: LoaderState) -> None:
        """Learn from a state how many rows the windows have that its lanes are in. Raises: as `contents`."""
        for number, lane in state.lanes.items():
            for source, cursor in enumerate(lane.sources):
                if not cursor.window_rows:
                    continue
                name = WindowId(source, int(number), cursor.segment, cursor.window, state.stage)
                if left := lane.carried.get(str(source)):
                    name = WindowId(source, left[0].lane, left[0].segment, left[0].window, left[0].stage, left[0].cuts)
                self._settle(name, cursor.window_rows)

    def _settle(self, name: WindowId, num_rows: int) -> None:
        """Note how many rows a window has. Raises: CheckpointError if another number is known."""
        if self._num_rows.setdefault(name, num_rows) != num_rows:
            raise CheckpointError(
                f"made again, a window has {num_rows} rows where the run recorded {self._num_rows[name]}, or the "
                "reverse; the shards, the tokenizer or the program are not those that the run was trained with"
            )

    def contents(self, name: WindowId, source: Source) -> Contents:
        """Return what a window has of the documents.

        Args:
            source: as the stage deals it that reads the window.
        Raises: ShardError if the window cannot be made; CheckpointError if it is not the one that was trained on.
        """
        if name not in self._contents:
            self._make(WindowRequest(name, source.task(name), NOW))
        return self._contents[name]

    def submit(self, request: WindowRequest) -> None:
        """Do nothing, since nothing is made ahead."""

    def wait_for(self, request: WindowRequest) -> Window:
        """Return a window without content. Raises: ShardError if it must be made and cannot."""
        if request.name not in self._num_rows:
            self._make(request)
        nothing, starts = np.zeros(0, np.int32), np.zeros(self._num_rows[request.name] + 1, np.int64)
        rows = Rows(0, nothing, starts, starts, nothing, nothing, nothing)
        return Window(rows, nothing.astype(np.int64), nothing, (), nothing, nothing.astype(np.bool_), ())

    def clear(self) -> None:
        """Do nothing, since no request waits."""

    def close(self) -> None:
        """Close open shards."""
        self._pool.close()

    def _make(self, request: WindowRequest) -> None:
        """Make a window, and keep what is sought in it."""
        self._pool.submit(request)
        window, source = self._pool.wait_for(request), request.name.source
        self.num_made += 1
        rows = window.rows
        self._settle(request.name, rows.num_rows)
        keys = window.shards.astype(np.int64) << _LINE_BITS | window.lines
        sought = np.isin(keys, self._keys.get(source, ()))
        pieces: dict[int, list[Piece]] = defaultdict(list)
        for piece in np.flatnonzero(sought[rows.documents]).tolist():
            document = int(rows.documents[piece])
            name = source, int(window.shards[document]), int(window.lines[document])
            row = int(np.searchsorted(rows.row_pieces, piece, side="right")) - 1
            start, forgotten = int(rows.starts[piece]), bool(window.forgotten[document])
            pieces[row].append(Piece(self._numbers[name], row, start, start + int(rows.lengths[piece]), forgotten))
        drops = [
            Drop(self._numbers[source, record.shard, record.line], record.reason, record.contaminated)
            for record in window.skipped
            if (source, record.shard, record.line) in self._numbers
        ]
        self._contents[request.name] = Contents(dict(pieces), drops)
