"""Reading a shard from anywhere in it: raw bytes from an offset, a document by its number.

shard_index, decoders -> random_access.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from shards.config import DEFAULT_MAX_DECODER_WINDOW, MIB, SourceConfig
from shards.errors import ShardError
from shards.index.decoders import Decoders
from shards.index.shard_index import ShardIndex, find, obtain
from shards.records.json_lines import Document, parser_for
from shards.storage import files
from shards.storage.block_cache import BlockCache


def open_at(
    path: str | Path,
    raw_offset: int = 0,
    index_dir: Path | None = None,
    max_decoder_window: int = DEFAULT_MAX_DECODER_WINDOW,
) -> io.BufferedReader[RawShard]:
    """Open a shard's raw bytes, whatever its compression, at any of them; the file that it gives can seek, too.

    Decoding starts at the nearest entry, some 64 MiB before at most, and what is read is compared with the index. A
    shard without an index is indexed first, which reads all of it once.

    Args:
        path: of a shard, local or remote.
        raw_offset: of the first byte to read, in the unpacked shard.
        index_dir: where indexes are kept, if not beside the shards.
        max_decoder_window: bytes.
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
        path: of a shard, local or remote.
        n: number of its line in the unpacked shard, counted from 1.
        source: which keys to read, and the name the document carries; None = Pile and Dolma keys, the shard's name.
        index_dir, max_decoder_window: as in `open_at`.
        cache: of remote shards.
        strict: as for a RecordParser.
    Raises: ShardError as `open_at`, and if there is no such line, or no document in it.
    """
    path = str(path)
    index = _index(path, index_dir, max_decoder_window, cache)
    if not 1 <= n <= index.num_records:
        raise ShardError(f"{path}: has no line {n}; its lines are 1 to {index.num_records}")
    table = index.table()
    cell = int(np.searchsorted(table[:, 0], n - 1, side="right")) - 1
    (first, start), (_, stop) = table[cell].tolist(), table[cell + 1].tolist()
    decoders = Decoders(max_decoder_window, cache, index_dir, index.cell_bytes)
    raw = decoders.read(index.raw_range(path, start, stop))
    decoders.close()
    parser = parser_for(source, strict)
    records = parser.parse(raw, first + 1)
    if n not in records.lines:
        reasons = [bad.reason for bad in records.bad if bad.line == n]
        raise ShardError(f"{path}, line {n}: {reasons[0] if reasons else 'blank'}")
    i = records.lines.index(n)
    name = source.name if source else Path(path).name.split(".")[0]
    return Document(records.texts[i], records.sub_sources[i] or name, path, n, records.ids[i])


class RawShard(io.RawIOBase):
    """The raw bytes of a shard as a file, read and checked a cell at a time."""

    def __init__(self, path: str, index_dir: Path | None, max_decoder_window: int) -> None:
        """Args, Raises: as `open_at`."""
        self._path = path
        self._index = _index(path, index_dir, max_decoder_window, None)
        self._bounds = self._index.table()[:, 1]
        self._decoders = Decoders(max_decoder_window, None, index_dir, self._index.cell_bytes)
        self._position = 0
        self._cell, self._raw = -1, b""  # the cell read last

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
        """Read up to the cell's end."""
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
    """Get a shard's index: the one that a run made, whatever its cells, or a new one."""
    if files.is_column(path):
        raise ShardError(f"{path}: is a column of an Arrow file, which has no raw bytes")
    # One that is only touched will do: each cell that is read is compared with its hash.
    stored = find(path, index_dir, files.stat(path))
    return stored or obtain(path, index_dir, MIB, max_decoder_window, cache=cache)
