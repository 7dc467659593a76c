"""Columns of Parquet files as shards: a row is a record. arrow, files -> parquet -> shard_index, parquet_rows, texts.

The path of such a shard is FILE.parquet#COLUMN. Its values are counted and hashed as those of the Arrow files of a data
set. Only the columns asked for are decoded, in batches, so that a row group of any size takes little memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from shards.arrays import Ints, greedy_groups
from shards.config import SourceConfig
from shards.errors import ShardError
from shards.records import arrow, parquet_pages
from shards.storage import files
from shards.storage.block_cache import BlockCache

MAX_BATCH_ROWS = 1024
BATCH_BYTES = 1 << 20  # values per batch, judging by the mean of its row group
STREAM_BYTES = 1 << 20  # compressed bytes read of a column at a time
MIN_SKIPPED_BYTES = 8 << 20  # decompressed bytes before a place for which pages are looked up, which takes a while


class Measure(NamedTuple):
    """The result of one pass over a column."""

    cells: list[tuple[int, int]]  # (row, raw offset) where each begins, and the column's end
    checks: list[int]  # of each cell, as `check_of`
    num_documents: int  # rows that are not null
    content_hash: str  # as that of an Arrow file with these values
    groups: list[tuple[int, int]]  # (row, raw offset) where each row group begins


class ParquetFile:
    """An open Parquet file."""

    def __init__(self, path: str, cache: BlockCache | None = None, pages: parquet_pages.Pages | None = None) -> None:
        """Open the file of a column and read its footer.

        Args:
            pages: what is known of its pages, so that decoding may begin inside a row group; None = it may not.
        Raises: ShardError if it is missing or not Parquet.
        """
        self.path, self._pages = path, pages
        self._file: BinaryIO = files.open_seekable(path, cache)
        try:
            self._parquet = _open(self._file)
            self.schema: pa.Schema = self._parquet.schema_arrow
        except (OSError, pa.ArrowException) as error:
            self._file.close()
            raise _damaged(path, error) from None
        meta = self._parquet.metadata
        counts = [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
        self.firsts: Ints = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])  # each row group's; the end

    @property
    def num_rows(self) -> int:
        return int(self.firsts[-1])

    def group_of(self, row: int) -> int:
        """Return the number of the row group that holds a row."""
        return int(np.searchsorted(self.firsts, row, side="right")) - 1

    def entry(self, columns: Sequence[str], row: int) -> int:
        """Return the row at or before another from which `batches` would decode to reach it."""
        group = self.group_of(row)
        first = int(self.firsts[group])
        chunks = self._chunks(columns, row)
        return first if chunks is None else first + chunks[0].rows[chunks[0].page_of(row - first)]

    def page_bytes(self, columns: Sequence[str], row: int) -> int:
        """Return the mean decompressed size of a page of some columns together; 0 if pages are not looked up."""
        group, chunks = self.group_of(row), self._chunks(columns, row) or []
        return sum(
            self._bytes_of(self._parquet, group, column) // max(1, len(chunk.offsets))
            for column, chunk in zip(columns, chunks, strict=False)
        )

    def batches(self, columns: Sequence[str], row: int = 0) -> Iterator[pa.RecordBatch]:
        """Yield rows to the file's end, at most MAX_BATCH_ROWS at a time.

        Args:
            columns: the columns to decode, with dots for those in structs, by which the batches name them; that of the
                texts or token ids first.
            row: the first row; decoding begins at `entry`.
        Raises: ShardError if they cannot be decoded.
        """
        for number in range(self.group_of(row), len(self.firsts) - 1):
            first, stop = int(self.firsts[number]), int(self.firsts[number + 1])
            left = stop - max(row, first)
            try:
                chunks = self._chunks(columns, row) if row > first else None
                if chunks is None:
                    found = _without(self._rows(self._parquet, number, columns), max(0, row - first))
                else:
                    found = _side_by_side(
                        [
                            self._tail(number, chunk, row - first, name)
                            for name, chunk in zip(columns, chunks, strict=True)
                        ]
                    )
                for batch in found:
                    left -= batch.num_rows
                    yield batch
                if left:
                    raise pa.ArrowInvalid(f"its footer says that {left} rows follow where it ends")
            except (OSError, pa.ArrowException) as error:
                raise _damaged(self.path, error, f"row group {number}") from None

    def _rows(self, parquet: pq.ParquetFile, group: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a row group. Args: parquet: this file, or one that begins with a page of the group."""
        rows = int(parquet.metadata.row_group(group).num_rows)
        if rows:
            mean = max(1, self._bytes_of(parquet, group, columns[0])) / rows
            size = max(1, min(MAX_BATCH_ROWS, int(BATCH_BYTES / mean)))
            for batch in parquet.iter_batches(size, [group], list(columns), use_threads=False):
                yield pa.RecordBatch.from_arrays([arrow.column_of(batch, name) for name in columns], list(columns))

    def _tail(self, group: int, chunk: parquet_pages.Chunk, row: int, column: str) -> Iterator[pa.RecordBatch]:
        """Yield one column from a row of a row group on, decoded from the page that holds the row."""
        assert self._pages is not None
        page = chunk.page_of(row)
        file = self._pages.tail(self._file, group, chunk, page)
        return _without(self._rows(_open(file), 0, [column]), row - chunk.rows[page])

    def _chunks(self, columns: Sequence[str], row: int) -> list[parquet_pages.Chunk] | None:
        """Return the pages of each column where decoding may begin to reach a row; None = at its row group's start."""
        group = self.group_of(row)
        rows = max(1, int(self.firsts[group + 1] - self.firsts[group]))
        share = (row - int(self.firsts[group])) / rows
        if self._pages is None or share * self._bytes_of(self._parquet, group, columns[0]) < MIN_SKIPPED_BYTES:
            return None
        found = []
        for column in columns:
            leaves = _leaves(self._parquet, column)
            if len(leaves) != 1:  # bounds of pages differ among those of a struct
                return None
            is_flat = self._parquet.schema.column(leaves[0]).max_repetition_level == 0
            chunk = self._pages.chunk(self._file, group, leaves[0], is_flat)
            if chunk is None:
                return None
            found.append(chunk)
        return found

    def present(self, columns: Sequence[str]) -> list[str]:
        """Return those of some columns that the file has, in their order."""
        return [name for name in columns if arrow.type_of(self.schema, name) is not None]

    def close(self) -> None:
        self._parquet.close(force=True)
        self._file.close()

    def _bytes_of(self, parquet: pq.ParquetFile, group: int, column: str) -> int:
        """Return the bytes that a row group's column takes when decompressed."""
        meta = parquet.metadata.row_group(group)
        return sum(meta.column(leaf).total_uncompressed_size for leaf in _leaves(parquet, column))


def _open(file: BinaryIO | parquet_pages.Tail) -> pq.ParquetFile:
    # Without a buffer, pyarrow would read a row group's column whole.
    return pq.ParquetFile(file, buffer_size=STREAM_BYTES, pre_buffer=False, page_checksum_verification=True)


def _leaves(parquet: pq.ParquetFile, column: str) -> list[int]:
    """Return the numbers of the columns that Parquet makes of one: several of a struct, the elements of a list."""
    paths = (parquet.schema.column(number).path for number in range(len(parquet.schema)))
    return [number for number, path in enumerate(paths) if path == column or path.startswith(f"{column}.")]


def _without(batches: Iterator[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """Leave out the first rows."""
    for batch in batches:
        if rows < batch.num_rows:
            yield batch.slice(rows)
        rows = max(0, rows - batch.num_rows)


def _side_by_side(columns: list[Iterator[pa.RecordBatch]]) -> Iterator[pa.RecordBatch]:
    """Join batches of single columns, whose bounds may differ; end with the column that ends first."""
    heads: list[pa.RecordBatch | None] = [None] * len(columns)
    while True:
        heads = [
            head if head is not None and head.num_rows else next(rows, None)
            for head, rows in zip(heads, columns, strict=True)
        ]
        there = [head for head in heads if head is not None]
        if len(there) < len(heads):
            return
        count = min(head.num_rows for head in there)
        arrays = [head.column(0).slice(0, count) for head in there]
        yield pa.RecordBatch.from_arrays(arrays, [head.schema.names[0] for head in there])
        heads = [head.slice(count) for head in there]


def columns_of(source: SourceConfig) -> tuple[str, ...]:
    """Return the columns that a source reads, that of the texts or token ids first."""
    names = source.column, source.id_key, source.source_from
    return tuple(dict.fromkeys(name for name in names if name is not None))


def measure(
    path: str, cell_bytes: int, cache: BlockCache | None = None, progress: Callable[[float], None] | None = None
) -> Measure:
    """Read a column once.

    Args:
        cell_bytes: raw bytes per cell.
        progress: called with the share of the rows that was read since the last call.
    Raises: ShardError if the file or the column is missing, or holds no texts, or is damaged.
    """
    file, column = ParquetFile(path, cache), files.column_of(path)
    content_hash = arrow.ContentHash(arrow.kind_of(file.schema, path))
    cells, nulls = _CellsBuilder(cell_bytes), 0
    groups = []
    for batch in file.batches([column]):
        if cells.num_rows in file.firsts:
            groups.append((cells.num_rows, cells.raw_bytes))
        values = arrow.values_of(arrow.column_of(batch, column), path)
        content_hash.update(values)
        nulls += int((values.lengths < 0).sum())
        cells.add(values)
        if progress:
            progress(batch.num_rows / file.num_rows)
    file.close()
    cells.finish()
    return Measure(cells.cells, cells.checks, cells.num_rows - nulls, content_hash.hexdigest(), groups)


def check_of(values: arrow.Values) -> int:
    """Hash the rows of a cell: xxh3-64."""
    found = xxhash.xxh3_64(values.lengths.astype("<i8").tobytes())
    found.update(values.data)
    return found.intdigest()


class _CellsBuilder:
    """Cells of rows that come in batches; a cell is as long as it stays within `cell_bytes`, or a single row."""

    def __init__(self, cell_bytes: int) -> None:
        self._cell_bytes = cell_bytes
        self.num_rows = self.raw_bytes = 0  # of all rows taken
        self.cells: list[tuple[int, int]] = []
        self.checks: list[int] = []
        self._closed = (0, 0)  # (row, raw offset) where the open cell begins
        self._open: arrow.Values | None = None  # the rows of the open cell

    def add(self, values: arrow.Values) -> None:
        """Take in the next rows."""
        if self._open is not None:
            values = arrow.joined([self._open, values])
        offsets = values.offsets()
        self.num_rows = self._closed[0] + len(values.lengths)
        self.raw_bytes = self._closed[1] + int(offsets[-1])
        # All but the last group are full: what follows cannot change where they end.
        stop = 0
        for first, stop in zip(*_groups(offsets, self._cell_bytes), strict=True):
            self._close(values.between(offsets, first, stop))
        self._open = values.between(offsets, stop, len(values.lengths))

    def finish(self) -> None:
        """Close the last cell."""
        if self._open is not None and len(self._open.lengths):
            self._close(self._open)
        self.cells.append((self.num_rows, self.raw_bytes))

    def _close(self, cell: arrow.Values) -> None:
        self.cells.append(self._closed)
        self.checks.append(check_of(cell))
        self._closed = self._closed[0] + len(cell.lengths), self._closed[1] + int(cell.row_bytes().sum())


def _groups(offsets: Ints, limit: int) -> tuple[list[int], list[int]]:
    """Return where all groups but the last begin and end."""
    firsts = greedy_groups(offsets, np.array([0, len(offsets) - 1]), limit).tolist()
    return firsts[:-1], firsts[1:]


def _damaged(path: str, error: Exception, where: str = "") -> ShardError:
    at = f", {where}" if where else ""
    reason = " ".join(str(error).split())
    return ShardError(
        f"{files.file_of(path)}{at}: cannot be read as Parquet ({reason}); it is truncated, damaged or another format: "
        "copy it again"
    )
