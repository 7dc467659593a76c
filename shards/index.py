"""One pass over a shard -> its index: size, content hash, record table, entries.

files, formats -> index -> manifest, plan.

Cells are what the record table marks: a new one begins at a record where the cell before it, not empty, would grow
beyond `cell_bytes` with that record. So a longer record is a cell of its own, and all bounds that a run uses come
from the table.
"""

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from shards import arrow, durable, files, formats
from shards.cache import BlockCache
from shards.decoders import RawRange
from shards.errors import ShardError
from shards.plan import Ints, greedy_groups

INDEX_VERSION = 1
INDEX_SUFFIX = ".index.json"
LINE_FEED, SPACE = 10, 32
WHITE_SPACE = np.zeros(256, np.bool_)  # what bytes.strip() takes away
WHITE_SPACE[list(b" \t\n\r\x0b\x0c")] = True
SLICE_BYTES = 1 << 16  # what is looked at in one go: fits the cache, and needs no fresh memory from the system

Progress = Callable[[str, int], None]  # (shard, compressed bytes read since the last call)


class ShardIndex(msgspec.Struct, frozen=True):
    """What one pass over a shard found. Tables are int64, little-endian, two columns."""

    version: int
    cell_bytes: int
    stat: files.Stat
    content_hash: str  # xxh3-128 of the compressed file
    compression: str
    decoder_window: int  # bytes that one open decoder holds
    raw_bytes: int
    num_records: int  # lines, a last one without line feed counted
    num_documents: int  # records that are not blank; bad ones are among them, since nothing is parsed here
    cells: bytes  # [cells + 1]: (record, raw offset) where each begins, and the shard's end
    entries: bytes  # [entries]: (compressed offset, raw offset), the shard's start first

    def table(self) -> Ints:
        """int64 [cells + 1, 2]: (record, raw offset) where each cell begins; the last row is the shard's end."""
        return np.frombuffer(self.cells, "<i8").reshape(-1, 2)

    @property
    def num_entries(self) -> int:
        """Places from which decoding can start."""
        return len(self.entries) // 16

    def raw_range(self, path: str, start: int, stop: int) -> RawRange:
        """Raw bytes [start, stop) of this shard, to be decoded from the last entry at or before them."""
        entry = (start, start)  # every byte of a plain file is an entry
        if self.compression != "plain":
            entries = np.frombuffer(self.entries, "<i8").reshape(-1, 2)
            offset, raw_offset = entries[int(np.searchsorted(entries[:, 1], start, side="right")) - 1].tolist()
            entry = (offset, raw_offset)
        return RawRange(path, self.stat, self.compression, self.decoder_window, entry, start, stop)


class RecordTable:
    """Finds records and cells in raw bytes that come in chunks; keeps no bytes."""

    def __init__(self, cell_bytes: int) -> None:
        self._cell_bytes = cell_bytes
        self.raw_bytes = self.num_records = self.num_documents = 0
        self.cells: list[tuple[int, int]] = []
        self._cell = (0, 0)  # (record, raw offset) where the open cell begins
        self._last_end = 0  # raw offset after the last whole record
        self._blank = True  # the record that the next chunk goes on with has held only white space so far

    def feed(self, chunk: bytes) -> None:
        """Takes the next raw bytes, at least one."""
        whole = np.frombuffer(chunk, np.uint8)
        for start in range(0, len(whole), SLICE_BYTES):
            array = whole[start : start + SLICE_BYTES]
            hits = array == LINE_FEED
            count = int(np.count_nonzero(hits))
            stop = self.raw_bytes + len(array)
            # Counting is several times cheaper than finding; most slices hold no cell's end and no blank line.
            crosses = stop > self._cell[1] + self._cell_bytes
            suspect = self._blank or bool(((array[1:] <= SPACE) & hits[:-1]).any())
            ends = np.flatnonzero(hits) + 1 if crosses or suspect else None
            if suspect:
                assert ends is not None
                self._count_documents(array, ends)
            else:
                self.num_documents += count
                self._blank = bool(hits[-1])
            if crosses:
                assert ends is not None
                self._extend(ends + self.raw_bytes)
            elif count:
                self.num_records += count
                self._last_end = self.raw_bytes + chunk.rfind(b"\n", start, start + len(array)) - start + 1
            self.raw_bytes = stop

    def finish(self) -> None:
        """Takes note that no more bytes come: a last record without line feed ends here."""
        if self._last_end < self.raw_bytes:
            self.num_documents += not self._blank
            self._extend(np.array([self.raw_bytes]))
        if self._cell[1] < self.raw_bytes:
            self.cells.append(self._cell)
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
            self.cells.append(self._cell)
            if start > self._cell[1]:
                self._cell = (first + fit, start)
            else:  # the cell is empty, so the record is longer than a cell: it makes one
                self._cell = (first + fit + 1, int(ends[fit]))
                fit += 1
            last = fit
        if len(ends):
            self._last_end = int(ends[-1])


class _Watched:
    """A file that hashes what is read from it and tells how much that was."""

    def __init__(self, path: str, file: formats.Readable, progress: Progress | None) -> None:
        self._path, self._file, self._progress = path, file, progress
        self.hash = xxhash.xxh3_128()

    def read(self, size: int, /) -> bytes:
        data = self._file.read(size)
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
) -> ShardIndex:
    """Reads a shard once, from its first byte to its last.

    Args:
        cell_bytes: raw bytes per cell.
        max_window: bytes of decoder window.
        progress: is told the compressed bytes as they are read.
        cache: of remote shards.
    Raises: ShardError if the shard is missing, empty, damaged, cut short, or changes meanwhile.
    """
    if arrow.is_column(path):
        return _build_of_column(path, cell_bytes, progress)
    before = files.stat(path)
    table = RecordTable(cell_bytes)
    entries: list[tuple[int, int]] = []
    window = formats.MIN_DECODER_BYTES

    def on_entry(offset: int, raw_offset: int, frame_window: int) -> None:
        nonlocal window
        entries.append((offset, raw_offset))
        window = max(window, frame_window)

    with files.open_shard(path, cache=cache) as file:
        watched = _Watched(path, file, progress)
        peeked = formats.Peeked(watched, formats.zstd.MAX_HEADER_BYTES)
        compression = formats.detect(peeked.head, path)
        for chunk in formats.decode(peeked, compression, path, max_window, on_entry=on_entry):
            table.feed(chunk)
        table.finish()
    if files.stat(path) != before:
        raise ShardError(f"{path}: changed while it was indexed; start again when it is complete")
    return ShardIndex(
        version=INDEX_VERSION,
        cell_bytes=cell_bytes,
        stat=before,
        content_hash=watched.hash.hexdigest(),
        compression=compression,
        decoder_window=window,
        raw_bytes=table.raw_bytes,
        num_records=table.num_records,
        num_documents=table.num_documents,
        cells=np.array(table.cells, "<i8").tobytes(),
        entries=np.array(entries or [(0, 0)], "<i8").tobytes(),
    )


def _build_of_column(path: str, cell_bytes: int, progress: Progress | None) -> ShardIndex:
    """`build` for a column of an Arrow file; raw bytes are the lengths that stand in for them."""
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
        entries=np.zeros((1, 2), "<i8").tobytes(),
    )


def content_hash(path: str, cache: BlockCache | None = None) -> str:
    """xxh3-128 of a file's bytes (a column's values), in hex. Raises: ShardError if it cannot be read."""
    if arrow.is_column(path):
        return arrow.measure(path).content_hash
    with files.open_shard(path, cache=cache) as file:
        return durable.hash_stream(file)


def obtain(
    path: str,
    index_path: Path,
    cell_bytes: int,
    max_window: int,
    verify: bool = False,
    progress: Progress | None = None,
    cache: BlockCache | None = None,
) -> ShardIndex:
    """The index of a shard: the stored one if it is still true, else a new one, which is stored.

    Args:
        index_path: file where it is kept.
        verify: hash the file even if its size and modification time agree with the stored index.
        cache: of remote shards.
    """
    stored = load(index_path, cell_bytes)
    if stored is None or stored.stat.size != files.stat(path).size:
        index = build(path, cell_bytes, max_window, progress, cache)
    elif stored.stat == files.stat(path) and not verify:
        return stored
    elif content_hash(path, cache) == stored.content_hash:
        index = msgspec.structs.replace(stored, stat=files.stat(path))
    else:
        index = build(path, cell_bytes, max_window, progress, cache)
    store(index_path, msgspec.json.encode(index))
    return index


def load(index_path: Path, cell_bytes: int) -> ShardIndex | None:
    """The stored index of a shard, whether true or not; None if there is none of this version and cell size."""
    try:
        stored = msgspec.json.decode(index_path.read_bytes(), type=ShardIndex)
    except (OSError, msgspec.MsgspecError):
        return None
    return stored if (stored.version, stored.cell_bytes) == (INDEX_VERSION, cell_bytes) else None


def store(path: Path, data: bytes) -> None:
    """Writes an index or a manifest. Raises: ShardError if the folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_atomically(path, data)
    except OSError as error:
        raise ShardError(
            f"{path}: cannot be written: {error.strerror}; set data.index_dir to a folder you own"
        ) from None
