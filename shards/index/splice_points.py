"""Splice points: entries inside a frame or member, chosen, thinned and verified while a shard is indexed.

formats, thinning -> splice_points -> shard_index, decoders.

Decoding can resume at a splice point, given the raw bytes before it, its *history*, which is kept beside the index,
thinned. Whether a place will do is not proven from the structure of the data but tried: while the whole shard is being
decoded, it is also decoded from there up to the next entry, and the results are compared. Later readers compare again,
with the record table's hashes; so a bad entry can never cause a wrong byte to be read, only cost time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec
import zstandard

from shards import formats
from shards.config import MIB
from shards.formats import Chunk, Start, deflate, gzip, zstd, zstd_blocks
from shards.index.thinning import Follower, thinned

SPACING_BYTES = 64 * MIB  # raw bytes from one entry to the next, where affordable
_MIN_ENTRIES = 8  # entries per shard to aim for, so that several readers can share a small one
SHARE = 0.02  # fraction of the shard's compressed size that all its histories may take
SMALL_SHARE = 0.1  # that fraction while there are fewer than _MIN_ENTRIES
MIN_GAP_BYTES = 4 * MIB  # raw bytes that an entry must save: some milliseconds of decoding
HISTORIES_PER_GAP = 4  # opening handles a history twice, so entries closer together would save nothing
_MAX_HISTORY_BYTES = 128 * MIB  # larger histories are not handled: a pass holds several times their size
TRIAL_BYTES = MIB  # zstd: raw bytes to try a place with, or its history's length if that is more
_TURN_BYTES = 16 * MIB  # raw bytes compared per turn: alternating decoders evict each other's histories from the cache
GATHERED_BYTES = 192 << 10  # gzip data: a block's start is sought in the first third and tried with the rest
_GATHERED_RAW_BYTES = 16 * MIB  # raw limit for gzip data that unpacks to more


class Splice(msgspec.Struct, frozen=True):
    """One splice point, and the place of its packed history in the file of histories."""

    offset: int  # in the compressed file
    raw_offset: int
    state: int
    position: int  # bytes
    packed_bytes: int


class SpliceCounts(msgspec.Struct, frozen=True):
    """How many of the places that were examined, where an entry was due, passed each test."""

    looked_at: int = 0
    qualified: int = 0  # passed by their block's headers (zstd), or by decoding a few blocks from them (gzip)
    failed: int = 0  # could not be decoded from
    too_large: int = 0  # had histories that exceed the shard's budget


class _Trial(NamedTuple):
    """A splice point from which the shard is decoded on trial, beside the decoding of the whole."""

    offset: int
    raw_offset: int
    state: int
    packed: bytes  # its history
    follower: Follower


class Splicer:
    """Chooser of splice points among the chunks of a shard, given to it in order."""

    def __init__(self, compression: str, size: int, verify: bool, histories: BinaryIO) -> None:
        """Begin a shard.

        Args:
            compression: the shard's: zstd or gzip.
            size: compressed bytes of the shard.
            verify: compare up to the next entry, not only what a place is tried with.
            histories: file for the packed histories, written consecutively.
        """
        self._compression, self._size, self._verify, self._file = compression, size, verify, histories
        self._splices: list[Splice] = []
        self._stored_bytes = 0
        self._looked_at = self._qualified = self._failed = self._too_large = 0
        self._failed_in_turn = 0
        self._packer = zstandard.ZstdCompressor(level=1, write_checksum=True)
        self._last = (0, 0)  # (compressed offset, raw offset) of the last settled entry
        self._state = 0  # `Start.state` of the current frame
        self._held: deque[bytes] = deque()  # the last raw bytes of the frame or member, at least one history
        self._held_bytes = 0
        self._gathered: list[Chunk] = []  # chunks from where an entry is due, until it can be tried
        self._before = b""  # the history before them
        self._trial: _Trial | None = None  # the newest entry, until it has held up to the next
        self._waiting: list[Chunk] = []  # chunks to compare with what it gives
        self._waiting_bytes = 0

    def see(self, chunk: Chunk) -> None:
        """Take in a chunk; where an entry is due, gather it and its successors to try one."""
        if chunk.begins:
            self._begin(chunk)
            return
        if self._trial:
            self._waiting.append(chunk)
            self._waiting_bytes += len(chunk.raw)
            if self._waiting_bytes >= _TURN_BYTES:
                self._compare()
        self._gather(chunk)
        if chunk.history_bytes <= _MAX_HISTORY_BYTES:
            self._hold(chunk)

    def finish(self) -> tuple[tuple[Splice, ...], SpliceCounts]:
        """Return the chosen splice points, once there are no more chunks."""
        self._end_frame()
        return tuple(self._splices), SpliceCounts(self._looked_at, self._qualified, self._failed, self._too_large)

    def _begin(self, chunk: Chunk) -> None:
        self._end_frame()
        self._last = (chunk.offset, chunk.raw_offset)
        self._failed_in_turn = 0
        self._state = zstd.restart_state(chunk.data) if self._compression == "zstd" else 0
        self._held.clear()
        self._held_bytes = 0

    def _end_frame(self) -> None:
        """Settle the current trial at the end of the frame or member."""
        if self._gathered:
            self._try_gathered()
        self._compare()
        self._settle()

    def _due(self, chunk: Chunk) -> bool:
        """Return whether an entry at this chunk is far enough from the last one and its history already affordable."""
        offset, raw_offset = (self._trial.offset, self._trial.raw_offset) if self._trial else self._last
        gap, raw_gap = chunk.offset - offset, chunk.raw_offset - raw_offset
        # Where places keep failing, they are tried less often: an attempt costs the decoding of several histories.
        nearest = max(MIN_GAP_BYTES, (HISTORIES_PER_GAP + self._failed_in_turn**2) * chunk.history_bytes)
        if raw_gap < nearest or chunk.history_bytes > _MAX_HISTORY_BYTES:
            return False
        if raw_gap < SPACING_BYTES and gap * (_MIN_ENTRIES + 1) < self._size:
            return False
        # Part of the budget is free from the start, so that the first entries need not wait; by the end all of it is.
        free = chunk.offset + (self._size - chunk.offset) / (_MIN_ENTRIES + 1)
        return self._affordable(0, free)

    def _affordable(self, packed_bytes: int, size: float) -> bool:
        """Return whether all histories and one more take no more than their share of `size` compressed bytes."""
        count = len(self._splices) + (self._trial is not None)
        spent = self._stored_bytes + (len(self._trial.packed) if self._trial else 0)
        return spent + packed_bytes <= (SHARE if count >= _MIN_ENTRIES else SMALL_SHARE) * size

    def _gather(self, chunk: Chunk) -> None:
        """Gather a chunk in which to look for an entry; the first one only where an entry is due and possible."""
        if not self._gathered:
            if not self._due(chunk):
                return
            self._looked_at += 1
            if self._compression == "zstd" and not zstd_blocks.stands_alone(chunk.data):
                return
            self._before = b"".join(self._held)[-chunk.history_bytes :]
        self._gathered.append(chunk)
        if self._enough_gathered(chunk):
            self._try_gathered()

    def _enough_gathered(self, last: Chunk) -> bool:
        if self._compression == "zstd":
            return last.raw_offset + len(last.raw) - self._gathered[0].raw_offset >= max(
                last.history_bytes, TRIAL_BYTES
            )
        if len(last.raw) >= gzip.MAX_OUTPUT_BYTES:
            return False  # the decoder still holds raw bytes of this chunk's data, so the count would miss them
        first = self._gathered[0]
        gathered, raw = last.offset + len(last.data) - first.offset, last.raw_offset + len(last.raw) - first.raw_offset
        return gathered >= GATHERED_BYTES or raw >= _GATHERED_RAW_BYTES

    def _try_gathered(self) -> None:
        """Try the places for an entry among the gathered chunks until one holds."""
        self._compare()  # the trial before this one has taken in the same chunks
        self._failed_in_turn += 1
        for start, chunks in self._candidates():
            self._qualified += 1
            if self._try(start, chunks):
                self._failed_in_turn = 0
                break
        self._gathered = []

    def _candidates(self) -> Iterator[tuple[Start, Sequence[Chunk]]]:
        """Yield places for an entry, each with the chunks that follow it."""
        first = self._gathered[0]
        if self._compression == "zstd":
            yield Start(first.offset, first.raw_offset, self._before, self._state), self._gathered
            return
        data = b"".join(chunk.data for chunk in self._gathered)
        raw = b"".join(chunk.raw for chunk in self._gathered)
        for start in deflate.find_starts(
            data, raw, self._before, first.offset, first.raw_offset, search_bytes=len(data) // 3
        ):
            at, raw_at = start.offset - first.offset, start.raw_offset - first.raw_offset
            yield start, [Chunk(start.offset, start.raw_offset, data[at:], raw[raw_at:], first.history_bytes, False)]

    def _try(self, start: Start, chunks: Sequence[Chunk]) -> bool:
        """Return whether decoding from a place gives the chunks' raw bytes and its history is affordable."""
        try:
            history = thinned(self._compression, start, chunks)
        except formats.DECODE_ERRORS:
            self._failed += 1
            return False
        packed = self._packer.compress(history)
        if not self._affordable(len(packed), self._size):
            self._too_large += 1
            return False
        follower = Follower(self._compression, start._replace(history=history))
        if not follower.holds(chunks):
            self._failed += 1
            return False
        self._settle()  # the previous one has held up to here
        self._trial = _Trial(start.offset, start.raw_offset, start.state, packed, follower)
        if not self._verify:
            self._settle()
        return True

    def _compare(self) -> None:
        """Decode the waiting chunks from the splice point on trial, and drop it if they differ."""
        if self._trial and not self._trial.follower.holds(self._waiting):
            self._failed += 1
            self._trial = None
        self._waiting.clear()
        self._waiting_bytes = 0

    def _settle(self) -> None:
        """Keep the splice point on trial for good."""
        if self._trial is None:
            return
        trial, self._trial = self._trial, None
        self._file.write(trial.packed)
        self._splices.append(Splice(trial.offset, trial.raw_offset, trial.state, self._stored_bytes, len(trial.packed)))
        self._stored_bytes += len(trial.packed)
        self._last = (trial.offset, trial.raw_offset)

    def _hold(self, chunk: Chunk) -> None:
        self._held.append(chunk.raw)
        self._held_bytes += len(chunk.raw)
        while self._held_bytes - len(self._held[0]) >= chunk.history_bytes:
            self._held_bytes -= len(self._held.popleft())


def explain(size: int, raw_bytes: int, decoder_window: int, splices: tuple[Splice, ...], counts: SpliceCounts) -> str:
    """Explain to a user why a shard has the splice points it has.

    Args:
        size: compressed bytes of the shard.
        decoder_window: bytes that one open decoder of it holds.
    """
    if splices:
        packed = sum(splice.packed_bytes for splice in splices)
        gap = raw_bytes / (len(splices) + 1) / MIB
        return f"{len(splices)}, about one every {gap:,.0f} MiB raw; they take {packed / size:.2%} of the shard's size"
    nearest = max(MIN_GAP_BYTES, HISTORIES_PER_GAP * decoder_window)
    if decoder_window > _MAX_HISTORY_BYTES:
        size_text = f"{decoder_window // MIB} MiB"
        return f"none: a decoder window of {size_text} is too large to handle, so it is decoded from frames' starts"
    if raw_bytes < nearest:
        return f"none: too short to gain from them, at less than {nearest / MIB:,.4g} MiB raw"
    if counts.too_large:
        return f"none: one splice point would take more than {SMALL_SHARE:.0%} of the shard"
    if counts.looked_at:
        return f"none: of {counts.looked_at} places, none could be decoded from; it is decoded from frames' starts"
    return "none needed: its frames are short"


def read_history(path: Path, splice: Splice) -> bytes:
    """Read a splice point's history from its file. Raises: OSError or zstandard.ZstdError if it is missing."""
    with path.open("rb") as file:
        file.seek(splice.position)
        return zstandard.ZstdDecompressor().decompress(file.read(splice.packed_bytes))
