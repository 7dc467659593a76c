"""Open Parquet files: consecutive rows -> records, checked against the index.

parquet, decoders -> parquet_rows -> window, reader, random_access.

Rows are decoded forward from the beginning of their row group; a reader stays open where it stopped, so that windows
which follow each other decode nothing twice.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from shards.config import SourceConfig
from shards.errors import ShardError
from shards.index.decoders import RawRange
from shards.records import arrow, parquet
from shards.records.arrow_rows import records_of
from shards.records.json_lines import Records
from shards.storage import files, ranges, remote
from shards.storage.block_cache import BlockCache

MAX_OPEN = 32
MAX_OPEN_BYTES = 256 << 20
_CACHED_BYTES = 32 << 20  # raw bytes of cells kept per process


class Rows(NamedTuple):
    """Consecutive rows of a file."""

    columns: pa.Table
    texts: pa.Array  # large_binary [rows]


class _Reader:
    """An open file, read forward by rows."""

    def __init__(self, path: str, columns: tuple[str, ...], cache: BlockCache | None) -> None:
        self.path, self.columns = path, columns
        self.file = parquet.ParquetFile(path, cache)
        parquet.check_column(self.file.schema, path)
        self._present = self.file.present(columns)
        self.position = 0  # row that is read next
        self._batches = self.file.batches(self._present)
        self._left: pa.RecordBatch | None = None
        per_column = parquet.STREAM_BYTES + parquet.BATCH_BYTES  # buffered, and a page of about that size
        of_blocks = ranges.KEPT_BLOCKS * remote.BLOCK_BYTES if remote.is_remote(path) else 0
        self.held_bytes = 2 * len(self._present) * per_column + of_blocks

    def group_start(self, row: int) -> int:
        """Return the first row of the row group that holds a row."""
        return int(self.file.firsts[np.searchsorted(self.file.firsts, row, side="right") - 1])

    def read(self, first: int, stop: int) -> Rows:
        """Read rows [first, stop). Raises: ShardError if they cannot be decoded, or the file has fewer."""
        if stop > self.file.num_rows:
            raise ShardError(f"{self.path}: has {self.file.num_rows} rows, fewer than its index says")
        if not self.position <= first or self.group_start(first) > self.position:
            self.position = self.group_start(first)
            group = int(np.searchsorted(self.file.firsts, first, side="right")) - 1
            self._batches, self._left = self.file.batches(self._present, group), None
        parts = []
        while self.position < stop:
            batch = self._left if self._left is not None else next(self._batches)
            taken = min(batch.num_rows, stop - self.position)
            skip = min(max(0, first - self.position), taken)
            if taken > skip:
                parts.append(batch.slice(skip, taken - skip))
            self._left = batch.slice(taken) if taken < batch.num_rows else None
            self.position += taken
        column = files.column_of(self.path)
        texts = pa.concat_arrays([parquet.texts_of(part, column) for part in parts])
        return Rows(pa.Table.from_batches(parts), texts)


class ParquetRows:
    """Readers kept open for later windows, bounded in number and in the bytes they hold, and cells read last."""

    def __init__(self, cache: BlockCache | None = None) -> None:
        """Create an empty set of readers. Args: `cache`: of remote shards."""
        self._cache = cache
        self._open: list[_Reader] = []  # least recently used first
        self._cells: OrderedDict[tuple[str, tuple[str, ...], int, int], Rows] = OrderedDict()
        self._cells_bytes = 0

    def records(self, wanted: RawRange, cells: tuple[int, int], rows: tuple[int, int], source: SourceConfig) -> Records:
        """Return consecutive rows as records of their source.

        Args:
            wanted: the whole cells that hold the rows.
            cells: (first row, number of rows) of those cells, counted from 0.
            rows: (first row, number of rows) to return.
        Raises: ShardError if the file is damaged, or is not what was indexed.
        """
        columns = parquet.columns_of(source)
        found = (self._read if rows == cells else self._kept)(wanted, cells, columns)
        skip, (first, count) = rows[0] - cells[0], rows
        return records_of(found.columns.slice(skip, count), found.texts.slice(skip, count), first, source)

    def close(self) -> None:
        """Close all files."""
        for reader in self._open:
            reader.file.close()
        self._open.clear()
        self._cells.clear()
        self._cells_bytes = 0

    def _kept(self, wanted: RawRange, cells: tuple[int, int], columns: tuple[str, ...]) -> Rows:
        """Read cells of which only a part is wanted, so that the rest will be soon, or return them as read before."""
        key = (wanted.path, columns, wanted.start, wanted.stop)
        if key not in self._cells:
            self._cells[key] = self._read(wanted, cells, columns)
            self._cells_bytes += wanted.stop - wanted.start
            while self._cells_bytes > _CACHED_BYTES and len(self._cells) > 1:
                (_, _, start, stop), _ = self._cells.popitem(last=False)
                self._cells_bytes -= stop - start
        self._cells.move_to_end(key)
        return self._cells[key]

    def _read(self, wanted: RawRange, cells: tuple[int, int], columns: tuple[str, ...]) -> Rows:
        first, count = cells
        reader = self._reader_for(wanted, first, columns)
        try:
            found = reader.read(first, first + count)
            _check(wanted, found.texts)
        except ShardError as error:
            reader.file.close()
            raise _explained(wanted, error) from None
        except BaseException:
            reader.file.close()
            raise
        self._keep(reader)
        return found

    def _reader_for(self, wanted: RawRange, first: int, columns: tuple[str, ...]) -> _Reader:
        """Remove and return the open reader nearest before a row, or open one."""
        same = [one for one in self._open if one.path == wanted.path and one.columns == columns]
        usable = [one for one in same if one.group_start(first) <= one.position <= first]
        if usable:
            reader = max(usable, key=lambda one: one.position)
            self._open.remove(reader)
            return reader
        files.check_size(wanted.path, wanted.stat)
        return _Reader(wanted.path, columns, self._cache)

    def _keep(self, reader: _Reader) -> None:
        self._open.append(reader)
        held = sum(one.held_bytes for one in self._open)
        while len(self._open) > 1 and (len(self._open) > MAX_OPEN or held > MAX_OPEN_BYTES):
            oldest = self._open.pop(0)
            held -= oldest.held_bytes
            oldest.file.close()


def _check(wanted: RawRange, texts: pa.Array) -> None:
    """Compare cells with their hashes. Raises: ShardError if one differs."""
    lengths, values = arrow.lengths_and_bytes(texts)
    offsets = np.concatenate([[0], np.cumsum(np.maximum(lengths, 0) + 1)]) + wanted.start
    view = memoryview(values)
    bounds = [int(np.searchsorted(offsets, cell.start)) for cell in wanted.checks] + [len(lengths)]
    for cell, (first, stop) in zip(wanted.checks, itertools.pairwise(bounds), strict=True):
        part = view[int(offsets[first]) - wanted.start - first : int(offsets[stop]) - wanted.start - stop]
        if int(offsets[stop]) != cell.stop or parquet.check_of(lengths[first:stop], part) != cell.hash:
            raise ShardError(f"{wanted.path}: rows {first + 1} to {stop} of a window are not those that were indexed")


def _explained(wanted: RawRange, error: ShardError) -> ShardError:
    """Say whether a file was changed or is damaged."""
    now, reason = files.stat(wanted.path, fresh=True), str(error).removeprefix(f"{wanted.path}: ")
    if now == wanted.stat:
        return ShardError(
            f"{wanted.path}: {reason}; size and modification time are as they were when it was indexed, so it is "
            "damaged, or another file has taken its place; put the old file back"
        )
    return ShardError(f"{files.changed(wanted.path, wanted.stat, now)} ({reason})")
