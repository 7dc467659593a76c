"""String columns of Parquet files as shards: a row is a record. files -> parquet -> shard_index, parquet_rows, texts.

The path of such a shard is FILE.parquet#COLUMN, with dots for a column in a struct. Lengths stand in for raw bytes: a
text counts its bytes in UTF-8, and each row 1 more, as a line feed would, just as in the Arrow files of a data set.
Only the columns asked for are decoded, in batches, so that a row group of any size takes little memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from shards.arrays import Ints, greedy_groups
from shards.config import SourceConfig
from shards.errors import ShardError
from shards.records import arrow
from shards.storage import files
from shards.storage.block_cache import BlockCache

MAX_BATCH_ROWS = 1024
BATCH_BYTES = 1 << 20  # text per batch, judging by the mean of its row group
STREAM_BYTES = 1 << 20  # compressed bytes read of a column at a time


class Measure(NamedTuple):
    """The result of one pass over a column."""

    cells: list[tuple[int, int]]  # (row, raw offset) where each begins, and the column's end
    checks: list[int]  # of each cell, as `check_of`
    num_documents: int  # rows that are not null
    content_hash: str  # as that of an Arrow file with these texts
    groups: list[tuple[int, int]]  # (row, raw offset) where each row group begins


class ParquetFile:
    """An open Parquet file."""

    def __init__(self, path: str, cache: BlockCache | None = None) -> None:
        """Open the file of a column and read its footer. Raises: ShardError if it is missing or not Parquet."""
        self.path = path
        self._file: BinaryIO = files.open_seekable(path, cache)
        try:
            # Without a buffer, pyarrow would read a row group's column whole.
            self._parquet = pq.ParquetFile(
                self._file, buffer_size=STREAM_BYTES, pre_buffer=False, page_checksum_verification=True
            )
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

    def batches(self, columns: Sequence[str], group: int = 0) -> Iterator[pa.RecordBatch]:
        """Yield rows from the beginning of a row group to the file's end, at most MAX_BATCH_ROWS at a time.

        Args:
            columns: the columns to decode, with dots for those in structs; the first is the text.
        Raises: ShardError if they cannot be decoded.
        """
        for number in range(group, len(self.firsts) - 1):
            rows = int(self.firsts[number + 1] - self.firsts[number])
            if not rows:
                continue
            size = max(1, min(MAX_BATCH_ROWS, BATCH_BYTES * rows // max(1, self._bytes_of(number, columns[0]))))
            left = rows
            try:
                for batch in self._parquet.iter_batches(size, [number], list(columns), use_threads=False):
                    left -= batch.num_rows
                    yield batch
                if left:
                    raise pa.ArrowInvalid(f"it has {rows - left} rows, but its footer says {rows}")
            except (OSError, pa.ArrowException) as error:
                raise _damaged(self.path, error, f"row group {number}") from None

    def present(self, columns: Sequence[str]) -> list[str]:
        """Return those of some columns that the file has, in their order."""
        return [name for name in columns if type_of(self.schema, name) is not None]

    def close(self) -> None:
        self._parquet.close(force=True)
        self._file.close()

    def _bytes_of(self, group: int, column: str) -> int:
        """Return the bytes that a row group's column takes when decompressed."""
        meta = self._parquet.metadata.row_group(group)
        chunks = (meta.column(number) for number in range(meta.num_columns))
        return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)


def columns_of(source: SourceConfig) -> tuple[str, ...]:
    """Return the columns that a source reads, that of the texts first."""
    names = source.text_key, source.id_key, source.source_from
    return tuple(dict.fromkeys(name for name in names if name is not None))


def check_column(schema: pa.Schema, path: str) -> None:
    """Check that a file has the column of a path, and texts in it. Raises: ShardError naming what is there."""
    column, file = files.column_of(path), files.file_of(path)
    kind = type_of(schema, column)
    if kind is None:
        names = [name for field in schema for name in _names(field)]
        raise ShardError(f"{file}: has no column {column!r}; its columns are {', '.join(names)}: set text_key to one")
    if not _is_text(kind):
        raise ShardError(f"{file}: column {column!r} holds {kind}, not texts; set text_key to a column of strings")


def type_of(schema: pa.Schema, column: str) -> pa.DataType | None:
    """Return the type of a column, with dots for one in a struct; None if there is no such column."""
    if column in schema.names:
        return schema.field(column).type
    first, *inner = column.split(".")
    kind = schema.field(first).type if first in schema.names else None
    for name in inner:
        if kind is None or not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
            return None
        kind = kind.field(kind.get_field_index(name)).type
    return kind


def texts_of(rows: pa.RecordBatch, column: str) -> pa.Array:
    """Return a column as bytes, large_binary [rows]; null where the text, or a struct around it, is null."""
    if column in rows.schema.names:
        found = rows.column(column)
    else:
        first, *inner = column.split(".")
        found = pc.struct_field(rows.column(first), inner)
    return found.cast(pa.large_binary())


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
    check_column(file.schema, path)
    of_lengths, of_values = xxhash.xxh3_128(), xxhash.xxh3_128()
    cells, nulls = _CellsBuilder(cell_bytes), 0
    groups = []
    for batch in file.batches([column]):
        if cells.num_rows in file.firsts:
            groups.append((cells.num_rows, cells.raw_bytes))
        texts = texts_of(batch, column)
        lengths, values = arrow.lengths_and_bytes(texts)
        of_lengths.update(lengths.tobytes())
        of_values.update(values)
        nulls += texts.null_count
        cells.add(lengths, values)
        if progress:
            progress(len(lengths) / file.num_rows)
    file.close()
    cells.finish()
    digest = xxhash.xxh3_128_hexdigest(b"text" + of_lengths.digest() + of_values.digest())
    return Measure(cells.cells, cells.checks, cells.num_rows - nulls, digest, groups)


def check_of(lengths: Ints, values: bytes | memoryview) -> int:
    """Hash the texts of a cell, given as by `arrow.lengths_and_bytes`: xxh3-64."""
    found = xxhash.xxh3_64(lengths.astype("<i8").tobytes())
    found.update(values)
    return found.intdigest()


class _CellsBuilder:
    """Cells of rows that come in batches; a cell is as long as it stays within `cell_bytes`, or a single row."""

    def __init__(self, cell_bytes: int) -> None:
        self._cell_bytes = cell_bytes
        self.num_rows = self.raw_bytes = 0  # of all rows taken
        self.cells: list[tuple[int, int]] = []
        self.checks: list[int] = []
        self._closed = (0, 0)  # (row, raw offset) where the open cell begins
        self._lengths = np.zeros(0, np.int64)  # of the rows of the open cell
        self._values = b""

    def add(self, lengths: Ints, values: bytes) -> None:
        """Take in the next rows, given as by `arrow.lengths_and_bytes`."""
        self._lengths, self._values = np.concatenate([self._lengths, lengths]), self._values + values
        self.num_rows += len(lengths)
        self.raw_bytes += int(np.maximum(lengths, 0).sum()) + len(lengths)
        offsets = np.concatenate([[0], np.cumsum(np.maximum(self._lengths, 0) + 1)])
        # All but the last group are full: what follows cannot change where they end.
        for first, stop in zip(*_groups(offsets, self._cell_bytes), strict=True):
            self._close(offsets, first, stop)
        kept = self._closed[0] - (self.num_rows - len(self._lengths))
        self._values = self._values[int(offsets[kept]) - kept :]
        self._lengths = self._lengths[kept:]

    def finish(self) -> None:
        """Close the last cell."""
        if len(self._lengths):
            self.cells.append(self._closed)
            self.checks.append(check_of(self._lengths, self._values))
        self.cells.append((self.num_rows, self.raw_bytes))

    def _close(self, offsets: Ints, first: int, stop: int) -> None:
        values = memoryview(self._values)[int(offsets[first]) - first : int(offsets[stop]) - stop]
        self.cells.append(self._closed)
        self.checks.append(check_of(self._lengths[first:stop], values))
        self._closed = self._closed[0] + stop - first, self._closed[1] + int(offsets[stop] - offsets[first])


def _groups(offsets: Ints, limit: int) -> tuple[list[int], list[int]]:
    """Return where all groups but the last begin and end."""
    firsts = greedy_groups(offsets, np.array([0, len(offsets) - 1]), limit).tolist()
    return firsts[:-1], firsts[1:]


def _is_text(kind: pa.DataType) -> bool:
    """Return whether a type holds texts; bytes count, since older writers do not mark a column as UTF-8."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return arrow.is_text(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _names(field: pa.Field) -> list[str]:
    """List a field's columns as `text_key` would name them."""
    if not pa.types.is_struct(field.type):
        return [field.name]
    return [f"{field.name}.{name}" for inner in field.type for name in _names(inner)]


def _damaged(path: str, error: Exception, where: str = "") -> ShardError:
    at = f", {where}" if where else ""
    reason = " ".join(str(error).split())
    return ShardError(
        f"{files.file_of(path)}{at}: cannot be read as Parquet ({reason}); it is truncated, damaged or another format: "
        "copy it again"
    )
