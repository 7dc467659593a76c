"""Find records and cells in a shard's raw bytes and hash each cell. formats -> record_table -> shard_index.

The record table marks where cells begin: at a record with which the current cell, if not empty, would exceed
`cell_bytes`. So a longer record is a cell of its own, and all bounds that a run uses come from the table.
"""

from __future__ import annotations

from collections import deque

import xxhash

TABLE_VERSION = 1  # raise it whenever the same bytes would give other cells; runs do not resume across versions
SPACE = 32  # no greater byte is white space


class RecordTable:
    """A table built from chunks of raw bytes; it holds back those of an incomplete record, whose cell is unknown."""

    def __init__(self, cell_bytes: int) -> None:
        self._cell_bytes = cell_bytes
        self.raw_bytes = self.num_records = self.num_documents = 0
        self.cells: list[tuple[int, int]] = []
        self.checks: list[int] = []  # xxh3-64 of each closed cell
        self._cell = (0, 0)  # (record, raw offset) where the open cell begins
        self._last_end = 0  # raw offset after the last complete record
        self._filled = False  # the incomplete record has held more than white space
        self._hash = xxhash.xxh3_64()  # hash of the open cell, up to the raw offset `_hashed`
        self._hashed = 0
        self._unhashed: deque[memoryview] = deque()

    def feed(self, chunk: bytes) -> None:
        """Take in the next raw bytes, at least one."""
        self._unhashed.append(memoryview(chunk))
        start, documents, filled = 0, 0, self._filled
        cell_stop = self._cell[1] + self._cell_bytes - self.raw_bytes  # offset in the chunk
        while stop := chunk.find(b"\n", start) + 1:
            documents += filled or chunk[start] > SPACE or not chunk[start:stop].isspace()
            filled = False
            if stop > cell_stop:
                cell_stop = self._end_cells(self.raw_bytes + stop) - self.raw_bytes
            self.num_records += 1
            self._last_end = self.raw_bytes + stop
            start = stop
        self._filled = start < len(chunk) and (filled or chunk[start] > SPACE or not chunk[start:].isspace())
        self.num_documents += documents
        self.raw_bytes += len(chunk)
        self._hash_to(self._last_end)

    def finish(self) -> None:
        """Close the table, ending a last record that has no line feed."""
        if self._last_end < self.raw_bytes:
            self.num_documents += self._filled
            if self.raw_bytes > self._cell[1] + self._cell_bytes:
                self._end_cells(self.raw_bytes)
            self.num_records += 1
        if self._cell[1] < self.raw_bytes:
            self._close_cell((self.num_records, self.raw_bytes))
        self.cells.append((self.num_records, self.raw_bytes))

    def _end_cells(self, stop: int) -> int:
        """End the open cell before a record that would make it too long, and that record's own cell if it is too long.

        Args:
            stop: raw offset after the record.
        Returns:
            The raw offset up to which the cell that is now open may reach.
        """
        if self._last_end > self._cell[1]:
            self._close_cell((self.num_records, self._last_end))
        if stop > self._cell[1] + self._cell_bytes:
            self._close_cell((self.num_records + 1, stop))
        return self._cell[1] + self._cell_bytes

    def _close_cell(self, following: tuple[int, int]) -> None:
        """End the open cell where the next one begins."""
        self.cells.append(self._cell)
        self._cell = following
        self._hash_to(following[1])
        self.checks.append(self._hash.intdigest())
        self._hash.reset()

    def _hash_to(self, stop: int) -> None:
        while self._hashed < stop:
            part = self._unhashed[0][: stop - self._hashed]
            self._hash.update(part)
            self._hashed += len(part)
            self._unhashed[0] = self._unhashed[0][len(part) :]
            if not self._unhashed[0]:
                self._unhashed.popleft()
