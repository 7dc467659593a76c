"""Random access to a shard: raw bytes from an offset, a document by its number.

shard_index, decoders, parquet_rows -> random_access.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np

from shards.config import DEFAULT_MAX_DECODER_WINDOW, DEFAULT_TEXT_KEY, MIB, SourceConfig
from shards.errors import ShardError
from shards.index.decoders import Decoders
from shards.index.parquet_rows import ParquetRows
from shards.index.shard_index import ShardIndex, find, obtain
from shards.records.json_lines import Document, parser_for
from shards.records.texts import source_of_column
from shards.storage import files
from shards.storage.block_cache import BlockCache


def open_at(
    path: str | Path,
    raw_offset: int = 0,
    index_dir: Path | None = None,
    max_decoder_window: int = DEFAULT_MAX_DECODER_WINDOW,
) -> io.BufferedReader[RawShard]:
    """Open a shard's raw bytes at an offset, whatever its compression; the file returned can seek.

    Decoding starts at the nearest entry, at most some 64 MiB earlier, and what is read is compared with the index. A
    shard without an index is indexed first, which reads it once in full.

    Args:
        path: a shard, local or remote.
        raw_offset: offset of the first byte to read, in the unpacked shard.
        index_dir: folder of the indexes, if not beside the shards.
        max_decoder_window: in bytes.
    Raises: ShardError if the shard is missing, damaged or changed; reading raises it too.
    """
    file = io.BufferedReader(RawShard(str(path), index_dir, max_decoder_window))
    file.seek(raw_offset)
    return file


def document(
    path: str | Path,
    n: int,
    source: SourceConfig | None = None,
    index_dir: Path | None = None,
    max_decoder_window: int = DEFAULT_MAX_DECODER_WINDOW,
    cache: BlockCache | None = None,
    strict: bool = True,
) -> Document:
    """Read one document of a shard from the nearest entry.

    Args:
        path: a shard, local or remote; of a Parquet file FILE#COLUMN, or the file if the source names the column.
        n: line number in the unpacked shard, or the row's, counted from 1.
        source: the keys to read and the document's source; None = keys of the Pile and Dolma, named after the shard.
        index_dir, max_decoder_window: as in `open_at`.
        cache: cache of remote shards.
        strict: as for a RecordParser.
    Raises: ShardError as `open_at`, and if there is no such line, or no document in it, or only token ids.
    """
    (path,) = files.with_columns([str(path)], source.column if source else DEFAULT_TEXT_KEY)
    if source and source.input_ids_key is not None:
        raise ShardError(f"{path}: holds token ids, no texts to read")
    index = _index(path, index_dir, max_decoder_window, cache)
    if not 1 <= n <= index.num_records:
        raise ShardError(f"{path}: has no line {n}; its lines are 1 to {index.num_records}")
    table = index.table()
    cell = int(np.searchsorted(table[:, 0], n - 1, side="right")) - 1
    (first, start), (_, stop) = table[cell].tolist(), table[cell + 1].tolist()
    wanted = index.raw_range(path, start, stop)
    if files.is_parquet(path):
        with contextlib.closing(ParquetRows(cache)) as rows:
            cells = (first, int(table[cell + 1, 0]) - first)
            records = rows.records(wanted, cells, cells, source or source_of_column(path))
    else:
        with contextlib.closing(Decoders(max_decoder_window, cache, index_dir, index.cell_bytes)) as decoders:
            records = parser_for(source, strict).parse(decoders.read(wanted), first + 1)
    if n not in records.lines:
        reasons = [bad.reason for bad in records.bad if bad.line == n]
        raise ShardError(f"{path}, line {n}: {reasons[0] if reasons else 'blank'}")
    i = records.lines.index(n)
    name = source.name if source else Path(path).name.split(".")[0]
    parts = records.parts[i] if records.parts else None
    return Document(records.texts[i], records.sub_sources[i] or name, path, n, records.ids[i], parts)


class RawShard(io.RawIOBase):
    """The raw bytes of a shard as a file, read and checked one cell at a time."""

    def __init__(self, path: str, index_dir: Path | None, max_decoder_window: int) -> None:
        """Open a shard. Args, Raises: as `open_at`."""
        if files.is_parquet(path):
            raise ShardError(f"{path}: a Parquet file has no raw bytes to read; read its documents by their numbers")
        self._path = path
        self._index = _index(path, index_dir, max_decoder_window, None)
        self._bounds = self._index.table()[:, 1]
        self._decoders = Decoders(max_decoder_window, None, index_dir, self._index.cell_bytes)
        self._position = 0
        self._cell, self._raw = -1, b""  # the last cell read

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._index.raw_bytes}[whence]
        if base + offset < 0:
            raise ValueError(f"raw offset {base + offset} is before the shard's start")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: memoryview[int] | bytearray) -> int:  # type: ignore[override]
        """Read up to the end of the current cell."""
        if self._position >= self._index.raw_bytes:
            return 0
        cell = int(np.searchsorted(self._bounds, self._position, side="right")) - 1
        start, stop = int(self._bounds[cell]), int(self._bounds[cell + 1])
        if cell != self._cell:
            self._raw = self._decoders.read(self._index.raw_range(self._path, start, stop))
            self._cell = cell
        count = min(len(buffer), stop - self._position)
        buffer[:count] = self._raw[self._position - start : self._position - start + count]
        self._position += count
        return count

    def close(self) -> None:
        if not self.closed:
            self._decoders.close()
        super().close()


def _index(path: str, index_dir: Path | None, max_decoder_window: int, cache: BlockCache | None) -> ShardIndex:
    """Return a shard's index: the one that a run made, whatever its cell size, or a new one."""
    if files.is_column(path) and not files.is_parquet(path):
        raise ShardError(f"{path}: is a column of an Arrow file, which is read only as part of its data set")
    # An index of a touched shard will do, since each cell that is read is compared with its hash.
    stored = find(path, index_dir, files.stat(path))
    return stored or obtain(path, index_dir, MIB, max_decoder_window, cache=cache)
