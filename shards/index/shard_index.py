"""One pass over a shard -> its index: size, content hash, record table, entries.

formats, record_table, splice_points -> shard_index -> manifest, segments.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

import msgspec
import numpy as np
import xxhash

from shards import formats
from shards.arrays import Ints, greedy_groups
from shards.config import MIB
from shards.errors import ShardError
from shards.formats import Chunk
from shards.index.decoders import CellCheck, RawRange
from shards.index.paths import history_path, index_path, index_paths, store, written_meanwhile
from shards.index.record_table import RecordTable
from shards.index.splice_points import Splice, SpliceCounts, Splicer
from shards.records import arrow, parquet
from shards.storage import files, remote
from shards.storage.block_cache import BlockCache
from shards.storage.content_hash import hash_stream

INDEX_VERSION = 2

Progress = Callable[[str, int], None]  # (shard, compressed bytes read since the last call)


class ShardIndex(msgspec.Struct, frozen=True):
    """The result of one pass over a shard. `cells` and `frames` are int64 tables, little-endian, of two columns."""

    version: int
    cell_bytes: int
    stat: files.Stat
    content_hash: str  # xxh3-128 of the compressed file
    compression: str
    decoder_window: int  # bytes that one open decoder holds
    raw_bytes: int
    num_records: int  # number of lines, including a last one without line feed
    num_documents: int  # number of records that are not blank; bad ones count, since nothing is parsed here
    cells: bytes  # [cells + 1]: (record, raw offset) where each begins, and the shard's end
    checks: bytes  # [cells]: xxh3-64 of each cell's raw bytes, one uint64 each; empty for a column
    # [frames]: (compressed offset, raw offset) where frames or members begin, the shard's start first; of a Parquet
    # file (row, raw offset) where row groups begin
    frames: bytes = msgspec.field(name="entries")
    splices: tuple[Splice, ...] = ()  # entries inside them, in order
    splice_counts: SpliceCounts = SpliceCounts()

    def table(self) -> Ints:
        """Return int64 [cells + 1, 2]: (record, raw offset) where each cell begins, and the shard's end."""
        return np.frombuffer(self.cells, "<i8").reshape(-1, 2)

    @property
    def num_frames(self) -> int:
        """Return the number of frames or members, at least 1."""
        return len(self.frames) // 16

    def raw_range(self, path: str, start: int, stop: int) -> RawRange:
        """Describe raw bytes [start, stop) of this shard, to be decoded from the last entry at or before them."""
        frame, splice = (start, start), None  # every byte of a plain file is an entry
        if self.compression != "plain":
            frames = np.frombuffer(self.frames, "<i8").reshape(-1, 2)
            offset, raw_offset = frames[int(np.searchsorted(frames[:, 1], start, side="right")) - 1].tolist()
            frame = (offset, raw_offset)
            number = bisect_right(self.splices, start, key=lambda splice: splice.raw_offset) - 1
            splice = self.splices[number] if number >= 0 and self.splices[number].raw_offset > raw_offset else None
        return RawRange(
            path=path,
            stat=self.stat,
            content_hash=self.content_hash,
            compression=self.compression,
            decoder_window=self.decoder_window,
            frame=frame,
            splice=splice,
            start=start,
            stop=stop,
            checks=self._checks(start, stop),
        )

    def _checks(self, start: int, stop: int) -> tuple[CellCheck, ...]:
        """List the checks of the whole cells within raw bytes [start, stop)."""
        if not self.checks:
            return ()
        bounds, hashes = self.table()[:, 1], np.frombuffer(self.checks, "<u8")
        first, last = int(np.searchsorted(bounds, start)), int(np.searchsorted(bounds, stop, side="right")) - 1
        return tuple(
            CellCheck(int(bounds[cell]), int(bounds[cell + 1]), int(hashes[cell])) for cell in range(first, last)
        )


class _Watched:
    """A file that hashes what is read from it and reports its size."""

    def __init__(self, path: str, file: formats.Readable, progress: Progress | None) -> None:
        self._path, self._file, self._progress = path, file, progress
        self.hash = xxhash.xxh3_128()

    def read(self, size: int, /) -> bytes:
        try:
            data = self._file.read(size)
        except OSError as error:
            raise ShardError(f"{self._path}: cannot be read: {error.strerror}") from None
        self.hash.update(data)
        if self._progress:
            self._progress(self._path, len(data))
        return data


def build(
    path: str,
    cell_bytes: int,
    max_window: int,
    progress: Progress | None = None,
    cache: BlockCache | None = None,
    histories: Path | None = None,
    verify_entries: bool = True,
) -> ShardIndex:
    """Read a shard once, from its first byte to its last.

    Args:
        cell_bytes: raw bytes per cell.
        max_window: bytes of decoder window.
        progress: called with the compressed bytes as they are read.
        cache: cache of remote shards.
        histories: file for the histories of splice points; None = no splice points.
        verify_entries: verify each splice point up to the next one, not only at its start.
    Raises: ShardError if the shard is missing, empty, damaged or truncated, or changes while it is read.
    """
    if files.is_column(path):
        return (_build_of_parquet if files.is_parquet(path) else _build_of_column)(path, cell_bytes, progress, cache)
    before = files.stat(path, fresh=True)
    with (
        files.open_shard(path, cache=cache) as file,
        written_meanwhile(histories) if histories else nullcontext() as file_of_histories,
    ):
        watched = _Watched(path, file, progress)
        peeked = formats.Peeked(watched, formats.MAX_HEADER_BYTES)
        compression = formats.detect(peeked.head, path)
        splicer = None
        if file_of_histories and compression in formats.WITH_SPLICES:
            splicer = Splicer(compression, before.size, verify_entries, file_of_histories)
        table, frames, decoder_bytes = _scan(formats.chunks(peeked, compression, path, max_window), cell_bytes, splicer)
        splices, counts = splicer.finish() if splicer else ((), SpliceCounts())
        after = files.stat(path, fresh=True)
        # Only content decides: a shard may have been touched, or its mirrors may give the same content other stamps.
        if after != before and (after.size != before.size or content_hash(path, cache) != watched.hash.hexdigest()):
            raise ShardError(f"{path}: changed while it was indexed; start again when it is complete")
    return ShardIndex(
        version=INDEX_VERSION,
        cell_bytes=cell_bytes,
        stat=after,
        content_hash=watched.hash.hexdigest(),
        compression=compression,
        decoder_window=decoder_bytes,
        raw_bytes=table.raw_bytes,
        num_records=table.num_records,
        num_documents=table.num_documents,
        cells=np.array(table.cells, "<i8").tobytes(),
        checks=np.array(table.checks, "<u8").tobytes(),
        frames=np.array(frames or [(0, 0)], "<i8").tobytes(),
        splices=splices,
        splice_counts=counts,
    )


def _scan(
    chunks: Iterator[Chunk], cell_bytes: int, splicer: Splicer | None
) -> tuple[RecordTable, list[tuple[int, int]], int]:
    """Take in all chunks of a shard: (its records, where its frames or members begin, bytes that a decoder holds)."""
    table = RecordTable(cell_bytes)
    frames: list[tuple[int, int]] = []
    decoder_bytes = formats.MIN_DECODER_BYTES
    for chunk in chunks:
        if splicer:
            splicer.see(chunk)
        if chunk.begins:
            frames.append((chunk.offset, chunk.raw_offset))
            decoder_bytes = max(decoder_bytes, chunk.history_bytes)
        elif chunk.raw:
            table.feed(chunk.raw)
    table.finish()
    return table, frames, decoder_bytes


def _build_of_parquet(path: str, cell_bytes: int, progress: Progress | None, cache: BlockCache | None) -> ShardIndex:
    """Index a column of a Parquet file, as `build` does a shard; lengths of texts stand in for raw bytes."""
    before = files.stat(path, fresh=True)
    # Shares of the file, since how many bytes were read depends on the columns
    shares = (lambda share: progress(path, int(share * before.size))) if progress else None
    found = parquet.measure(path, cell_bytes, cache, shares)
    after = files.stat(path, fresh=True)
    if after != before and (after.size != before.size or content_hash(path, cache) != found.content_hash):
        raise ShardError(f"{path}: changed while it was indexed; start again when it is complete")
    num_records, raw_bytes = found.cells[-1]
    return ShardIndex(
        version=INDEX_VERSION,
        cell_bytes=cell_bytes,
        stat=after,
        content_hash=found.content_hash,
        compression="parquet",
        decoder_window=0,
        raw_bytes=raw_bytes,
        num_records=num_records,
        num_documents=found.num_documents,
        cells=np.array(found.cells, "<i8").tobytes(),
        checks=np.array(found.checks, "<u8").tobytes(),
        frames=np.array(found.groups or [(0, 0)], "<i8").tobytes(),
    )


def _build_of_column(path: str, cell_bytes: int, progress: Progress | None, cache: BlockCache | None) -> ShardIndex:
    """Index a column of an Arrow file, as `build` does a shard; lengths of values stand in for raw bytes."""
    assert not remote.is_remote(path), path  # `datasets` keeps its Arrow files on this machine
    before = files.stat(path)
    found = arrow.measure(path)
    if progress:
        progress(path, before.size)
    num_records = len(found.row_bytes)
    offsets = np.concatenate([[0], np.cumsum(found.row_bytes)])
    firsts = np.append(greedy_groups(offsets, np.array([0, num_records]), cell_bytes), num_records)
    return ShardIndex(
        version=INDEX_VERSION,
        cell_bytes=cell_bytes,
        stat=before,
        content_hash=found.content_hash,
        compression="arrow",
        decoder_window=0,
        raw_bytes=int(offsets[-1]),
        num_records=num_records,
        num_documents=found.num_documents,
        cells=np.stack([firsts, offsets[firsts]], axis=1).astype("<i8").tobytes(),
        checks=b"",
        frames=np.zeros((1, 2), "<i8").tobytes(),
    )


def content_hash(path: str, cache: BlockCache | None = None) -> str:
    """Hash a file's bytes (a column's values): xxh3-128, in hex. Raises: ShardError if it cannot be read."""
    if files.is_parquet(path):
        return parquet.measure(path, MIB, cache).content_hash
    if files.is_column(path):
        return arrow.measure(path).content_hash
    with files.open_shard(path, cache=cache) as file:
        return hash_stream(file)


def obtain(
    path: str,
    index_dir: Path | None,
    cell_bytes: int,
    max_window: int,
    verify: bool = False,
    progress: Progress | None = None,
    cache: BlockCache | None = None,
    verify_entries: bool = True,
) -> ShardIndex:
    """Return the index of a shard: the stored one if it is still valid, else a new one, which is stored.

    Args:
        index_dir: folder of the indexes, if not beside the shards; histories of splice points are kept beside them.
        verify: hash the file even if its size and modification time agree with the stored index.
        cache: cache of remote shards.
        verify_entries: see `build`.
    """
    place, now = index_path(path, index_dir), files.stat(path, fresh=True)
    stored = find(path, index_dir, now, cell_bytes)
    if stored and stored.stat == now and not verify:
        return stored
    if stored and content_hash(path, cache) == stored.content_hash:
        index = msgspec.structs.replace(stored, stat=now)
    else:
        index = build(path, cell_bytes, max_window, progress, cache, history_path(place), verify_entries)
    store(place, msgspec.json.encode(index))
    return index


def find(path: str, index_dir: Path | None, now: files.Stat, cell_bytes: int | None = None) -> ShardIndex | None:
    """Find a stored index of a shard whose size is the shard's present size.

    Args:
        now: the shard's present stat; an index with the same stamp is preferred to one of a touched shard.
        cell_bytes: None = any.
    Returns: None if there is none. If its stamp is not `now`'s, only the content can show whether it is valid.
    """
    touched = None
    for place in index_paths(path, index_dir):
        stored = load(place, cell_bytes)
        if stored and stored.stat == now:
            return stored
        if stored and stored.stat.size == now.size:
            touched = touched or stored
    return touched


def hash_tables(indexes: Iterable[ShardIndex]) -> str:
    """Hash the parts of indexes that batches depend on, contents and record tables: xxh3-128, in hex."""
    found = xxhash.xxh3_128()
    for index in indexes:
        found.update(f"{index.content_hash} {len(index.cells)} ".encode())
        found.update(index.cells)
    return found.hexdigest()


def load(index_path: Path, cell_bytes: int | None = None) -> ShardIndex | None:
    """Load a shard's stored index, valid or not; None if there is none of this version and cell size.

    Args:
        cell_bytes: None = any.
    """
    try:
        stored = msgspec.json.decode(index_path.read_bytes(), type=ShardIndex)
    except (OSError, msgspec.MsgspecError):
        return None
    return stored if stored.version == INDEX_VERSION and cell_bytes in (None, stored.cell_bytes) else None
