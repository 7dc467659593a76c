"""Finds records and cells in a shard's raw bytes, and hashes each cell. formats -> record_table -> index.

Cells are what the record table marks: a new one begins at a record where the cell before it, not empty, would grow
beyond `cell_bytes` with that record. So a longer record is a cell of its own, and all bounds that a run uses come
from the table.
"""

from collections import deque

import numpy as np
import numpy.typing as npt
import xxhash

from shards.plan import Ints

TABLE_VERSION = 1  # raise it whenever the same bytes would give other cells: runs do not continue across it
LINE_FEED, SPACE = 10, 32
WHITE_SPACE = np.zeros(256, np.bool_)  # what bytes.strip() takes away
WHITE_SPACE[list(b" \t\n\r\x0b\x0c")] = True
SLICE_BYTES = 1 << 17  # what is looked at in one go: fits the cache, and needs no fresh memory from the system


class RecordTable:
    """Takes raw bytes in chunks; keeps those of the record that is not whole yet, since its cell is not known."""

    def __init__(self, cell_bytes: int) -> None:
        self._cell_bytes = cell_bytes
        self.raw_bytes = self.num_records = self.num_documents = 0
        self.cells: list[tuple[int, int]] = []
        self.checks: list[int] = []  # xxh3-64 of each whole cell
        self._cell = (0, 0)  # (record, raw offset) where the open cell begins
        self._last_end = 0  # raw offset after the last whole record
        self._blank = True  # the record that the next chunk goes on with has held only white space so far
        self._hits = np.empty(SLICE_BYTES, np.bool_)
        self._hash = xxhash.xxh3_64()  # of the open cell, up to the raw offset `_hashed`
        self._hashed = 0
        self._unhashed: deque[npt.NDArray[np.uint8]] = deque()

    def feed(self, chunk: bytes) -> None:
        """Takes the next raw bytes, at least one."""
        whole = np.frombuffer(chunk, np.uint8)
        for start in range(0, len(whole), SLICE_BYTES):
            self._feed_slice(whole[start : start + SLICE_BYTES])

    def _feed_slice(self, array: npt.NDArray[np.uint8]) -> None:
        self._unhashed.append(array)
        ends = np.flatnonzero(np.equal(array, LINE_FEED, out=self._hits[: len(array)])) + 1
        count = len(ends)
        at_end = count and ends[-1] == len(array)
        if self._blank and array[0] > SPACE:
            self._blank = False
        # Where every line begins with something else than white space, as JSON lines do, none is blank.
        if self._blank or (array[ends[:-1] if at_end else ends] <= SPACE).any():
            self._count_documents(array, ends)
        elif count:
            self.num_documents += count
            self._blank = bool(at_end)
        stop = self.raw_bytes + len(array)
        if stop > self._cell[1] + self._cell_bytes:
            self._extend(ends + self.raw_bytes)
        elif count:
            self.num_records += count
            self._last_end = self.raw_bytes + int(ends[-1])
        self.raw_bytes = stop
        self._hash_to(self._last_end)

    def finish(self) -> None:
        """Takes note that no more bytes come: a last record without line feed ends here."""
        if self._last_end < self.raw_bytes:
            self.num_documents += not self._blank
            self._extend(np.array([self.raw_bytes]))
        if self._cell[1] < self.raw_bytes:
            self._close_cell((self.num_records, self.raw_bytes))
        self.cells.append((self.num_records, self.raw_bytes))

    def _count_documents(self, array: npt.NDArray[np.uint8], ends: npt.NDArray[np.intp]) -> None:
        """Counts the whole records that hold something, byte by byte."""
        bounds = np.concatenate([[0], ends if not len(ends) or ends[-1] < len(array) else ends[:-1]])
        filled = np.add.reduceat(~WHITE_SPACE[array], bounds, dtype=np.int64) > 0
        filled[0] |= not self._blank
        self.num_documents += int(filled[: len(ends)].sum())
        self._blank = not filled[-1] if len(filled) > len(ends) else True

    def _extend(self, ends: Ints) -> None:
        """Adds whole records by their raw ends."""
        first = self.num_records  # number of the record that ends[0] ends
        self.num_records += len(ends)
        last = 0  # ends[:last] are in cells already
        while True:
            fit = int(np.searchsorted(ends, self._cell[1] + self._cell_bytes, side="right"))
            if fit == len(ends):
                break
            start = int(ends[fit - 1]) if fit > last else self._last_end if fit == 0 else self._cell[1]
            if start > self._cell[1]:
                self._close_cell((first + fit, start))
            else:  # the cell is empty, so the record is longer than a cell: it makes one
                self._close_cell((first + fit + 1, int(ends[fit])))
                fit += 1
            last = fit
        if len(ends):
            self._last_end = int(ends[-1])

    def _close_cell(self, following: tuple[int, int]) -> None:
        """Ends the open cell where the following one begins."""
        self.cells.append(self._cell)
        self._cell = following
        self._hash_to(following[1])
        self.checks.append(self._hash.intdigest())
        self._hash.reset()

    def _hash_to(self, stop: int) -> None:
        while self._hashed < stop:
            part = self._unhashed[0][: stop - self._hashed]
            self._hash.update(part.data)
            self._hashed += len(part)
            self._unhashed[0] = self._unhashed[0][len(part) :]
            if not len(self._unhashed[0]):
                self._unhashed.popleft()
