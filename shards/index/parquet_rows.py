"""Open Parquet files: consecutive rows -> records, checked against the index.

parquet, decoders -> parquet_rows -> window, reader, random_access.

Rows are decoded forward from a page before them, or the beginning of their row group; a reader stays open where it
stopped, so that windows which follow each other decode nothing twice.
"""

from __future__ import annotations

import itertools
import logging
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
from shards.records.parquet_pages import Pages
from shards.storage import files, ranges, remote
from shards.storage.block_cache import BlockCache

MAX_OPEN = 32
MAX_OPEN_BYTES = 256 << 20
_CACHED_BYTES = 32 << 20  # raw bytes of cells kept per process

_logger = logging.getLogger(__name__)


class Rows(NamedTuple):
    """Consecutive rows of a file."""

    columns: pa.Table
    values: arrow.Values  # of the column that is checked


class _Reader:
    """An open file, read forward by rows."""

    def __init__(self, path: str, source: SourceConfig, cache: BlockCache | None, pages: Pages | None) -> None:
        self.path, self.columns = path, (columns := parquet.columns_of(source))
        self.file = parquet.ParquetFile(path, cache, pages)
        arrow.check_column(self.file.schema, path, source)
        self._present = self.file.present(columns)
        self.position = 0  # row that is read next
        self.began_inside = False  # decoding began at a page inside a row group
        self._batches = self.file.batches(self._present)
        self._left: pa.RecordBatch | None = None
        self._page_bytes = 0  # of the pages that are decoded, as far as they are known

    @property
    def held_bytes(self) -> int:
        """Bytes that it holds, about."""
        per_column = parquet.STREAM_BYTES + parquet.BATCH_BYTES  # buffered, and a page of about that size
        of_blocks = ranges.KEPT_BLOCKS * remote.BLOCK_BYTES if remote.is_remote(self.path) else 0
        return 2 * (len(self._present) * per_column + self._page_bytes) + of_blocks

    def entry(self, row: int) -> int:
        """Return the row from which decoding would begin to reach another."""
        return self.file.entry(self._present, row)

    def read(self, first: int, stop: int) -> Rows:
        """Read rows [first, stop). Raises: ShardError if they cannot be decoded, or the file has fewer."""
        if stop > self.file.num_rows:
            raise ShardError(f"{self.path}: has {self.file.num_rows} rows, fewer than its index says")
        if not self.entry(first) <= self.position <= first:
            self.position = first
            self._page_bytes = self.file.page_bytes(self._present, first)
            self.began_inside = self.entry(first) not in self.file.firsts
            self._batches, self._left = self.file.batches(self._present, first), None
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
        values = arrow.joined([arrow.values_of(arrow.column_of(part, column), self.path) for part in parts])
        return Rows(pa.Table.from_batches(parts), values)


class ParquetRows:
    """Readers kept open for later windows, bounded in number and in the bytes they hold, and cells read last."""

    def __init__(self, cache: BlockCache | None = None) -> None:
        """Create an empty set of readers. Args: `cache`: of remote shards."""
        self._cache = cache
        self._open: list[_Reader] = []  # least recently used first
        self._cells: OrderedDict[tuple[str, tuple[str, ...], int, int], Rows] = OrderedDict()
        self._cells_bytes = 0
        self._pages: OrderedDict[str, Pages] = OrderedDict()  # of the files that were opened last
        self._distrusted: set[str] = set()  # files whose pages are not used

    def records(self, wanted: RawRange, cells: tuple[int, int], rows: tuple[int, int], source: SourceConfig) -> Records:
        """Return consecutive rows as records of their source.

        Args:
            wanted: the whole cells that hold the rows.
            cells: (first row, number of rows) of those cells, counted from 0.
            rows: (first row, number of rows) to return.
        Raises: ShardError if the file is damaged, or is not what was indexed.
        """
        found = (self._read if rows == cells else self._kept)(wanted, cells, source)
        skip, (first, count) = rows[0] - cells[0], rows
        return records_of(found.columns.slice(skip, count).to_batches(), first, source, wanted.path)

    def close(self) -> None:
        """Close all files."""
        for reader in self._open:
            reader.file.close()
        self._open.clear()
        self._cells.clear()
        self._cells_bytes = 0

    def _kept(self, wanted: RawRange, cells: tuple[int, int], source: SourceConfig) -> Rows:
        """Read cells of which only a part is wanted, so that the rest will be soon, or return them as read before."""
        key = (wanted.path, parquet.columns_of(source), wanted.start, wanted.stop)
        if key not in self._cells:
            self._cells[key] = self._read(wanted, cells, source)
            self._cells_bytes += wanted.stop - wanted.start
            while self._cells_bytes > _CACHED_BYTES and len(self._cells) > 1:
                (_, _, start, stop), _ = self._cells.popitem(last=False)
                self._cells_bytes -= stop - start
        self._cells.move_to_end(key)
        return self._cells[key]

    def _read(self, wanted: RawRange, cells: tuple[int, int], source: SourceConfig) -> Rows:
        first, count = cells
        reader = self._reader_for(wanted, first, source)
        try:
            found = reader.read(first, first + count)
            _check(wanted, found.values)
        except ShardError as error:
            reader.file.close()
            if not reader.began_inside:
                raise _explained(wanted, error) from None
            self._distrust(wanted.path, error)
            return self._read(wanted, cells, source)
        except BaseException:
            reader.file.close()
            raise
        self._keep(reader)
        return found

    def _reader_for(self, wanted: RawRange, first: int, source: SourceConfig) -> _Reader:
        """Remove and return the open reader nearest before a row, or open one."""
        columns = parquet.columns_of(source)
        same = [one for one in self._open if one.path == wanted.path and one.columns == columns]
        entry = same[0].entry(first) if same else 0
        usable = [one for one in same if entry <= one.position <= first]
        if usable:
            reader = max(usable, key=lambda one: one.position)
            self._open.remove(reader)
            return reader
        files.check_size(wanted.path, wanted.stat)
        return _Reader(wanted.path, source, self._cache, self._pages_of(wanted.path))

    def _pages_of(self, path: str) -> Pages | None:
        """Return what is known of a file's pages; None if they are not used."""
        if path in self._distrusted:
            return None
        # To walk through a remote file would be to fetch all of a column
        pages = self._pages.setdefault(path, Pages(walk=not remote.is_remote(path)))
        self._pages.move_to_end(path)
        while len(self._pages) > MAX_OPEN:  # a few thousand numbers for each row group of 1 GB
            self._pages.popitem(last=False)
        return pages

    def _distrust(self, path: str, error: ShardError) -> None:
        """Decode a file's row groups from their beginnings from now on."""
        self._distrusted.add(path)
        for one in [one for one in self._open if one.path == path]:
            self._open.remove(one)
            one.file.close()
        _logger.warning(
            "%s: its pages are not used, since decoding from one of them failed (%s); decoding from the start of "
            "the row group instead, which takes longer",
            path,
            error,
        )

    def _keep(self, reader: _Reader) -> None:
        self._open.append(reader)
        held = sum(one.held_bytes for one in self._open)
        while len(self._open) > 1 and (len(self._open) > MAX_OPEN or held > MAX_OPEN_BYTES):
            oldest = self._open.pop(0)
            held -= oldest.held_bytes
            oldest.file.close()


def _check(wanted: RawRange, values: arrow.Values) -> None:
    """Compare cells with their hashes. Raises: ShardError if one differs."""
    offsets = values.offsets()
    begins = [int(np.searchsorted(offsets, cell.start - wanted.start)) for cell in wanted.checks]
    bounds = itertools.pairwise([*begins, len(values.lengths)])
    for cell, (first, stop) in zip(wanted.checks, bounds, strict=True):
        ends = int(offsets[stop]) + wanted.start
        if ends != cell.stop or parquet.check_of(values.between(offsets, first, stop)) != cell.hash:
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
