"""Splice points: entries inside a frame or member. Chosen, thinned and verified while a shard is indexed.

formats, thinning -> splice_points -> shard_index, decoders.

A splice point is where decoding goes on given the raw bytes before it, its *history*, which is kept beside the index,
thinned. Whether a place will do is not proven from the data's structure: it is decoded from, beside the decoding of the
whole shard, up to the next entry, and what comes out is compared. What reads from it later compares once more, with the
record table's hashes; so no entry can make a wrong byte be read, only cost time.
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

SPACING_BYTES = 64 * MIB  # raw bytes from one entry to the next, where that is affordable
_MIN_ENTRIES = 8  # of a shard, so that several readers can share a small one
SHARE = 0.02  # of the shard's compressed size, that all its histories may take
SMALL_SHARE = 0.1  # that they may take as long as there are fewer than MIN_ENTRIES
MIN_GAP_BYTES = 4 * MIB  # raw bytes that an entry must save at the least: some milliseconds
HISTORIES_PER_GAP = 4  # opening handles a history twice, so nearer entries would save nothing
_MAX_HISTORY_BYTES = 128 * MIB  # beyond, no pass holds several times that many bytes for it
TRIAL_BYTES = MIB  # raw, of zstd: what a place is tried with at least; a history's length, if that is more
_TURN_BYTES = 16 * MIB  # raw, compared in one go: two decoders in turns push each other's histories out of the cache
GATHERED_BYTES = 192 << 10  # of gzip data: to find a block's beginning in the first third, and try it with the rest
_GATHERED_RAW_BYTES = 16 * MIB  # of gzip data that unpacks to more


class Splice(msgspec.Struct, frozen=True):
    """One splice point, and where its packed history lies in the file of histories."""

    offset: int  # in the compressed file
    raw_offset: int
    state: int
    position: int  # bytes
    packed_bytes: int


class SpliceCounts(msgspec.Struct, frozen=True):
    """What became of the places that were looked at, where an entry was due."""

    looked_at: int = 0
    qualified: int = 0  # as their block's headers tell (zstd), or as decoding a few blocks from them tells (gzip)
    failed: int = 0  # in decoding from them
    too_large: int = 0  # histories, for what all of the shard's may take


class _Trial(NamedTuple):
    """A splice point that is being decoded from, beside the decoding of the whole shard."""

    offset: int
    raw_offset: int
    state: int
    packed: bytes  # its history
    follower: Follower


class Splicer:
    """Chooses splice points among the chunks of a shard, which it sees in turn."""

    def __init__(self, compression: str, size: int, verify: bool, histories: BinaryIO) -> None:
        """
        Args:
            compression: of the shard, zstd or gzip.
            size: compressed bytes of the shard.
            verify: compare up to the next entry, and not only what a place is tried with.
            histories: file for the packed histories, one after the other.
        """
        self._compression, self._size, self._verify, self._file = compression, size, verify, histories
        self._splices: list[Splice] = []
        self._stored_bytes = 0
        self._looked_at = self._qualified = self._failed = self._too_large = 0
        self._failed_in_turn = 0
        self._packer = zstandard.ZstdCompressor(level=1, write_checksum=True)
        self._last = (0, 0)  # (compressed offset, raw offset) of the last settled entry
        self._state = 0  # what `Start.state` is for the frame
        self._held: deque[bytes] = deque()  # the last raw bytes of the frame or member, a history at least
        self._held_bytes = 0
        self._gathered: list[Chunk] = []  # from where an entry is due on, until it can be tried
        self._before = b""  # the history before them
        self._trial: _Trial | None = None  # the newest entry, until it has held to the next
        self._waiting: list[Chunk] = []  # to be compared with what it gives
        self._waiting_bytes = 0

    def see(self, chunk: Chunk) -> None:
        """Take in a chunk; where an entry is due, gather it and those that follow to try one."""
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
        """Return what was chosen, once there are no more chunks."""
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
        """Settle what is being tried, which has held to the frame's or member's end."""
        if self._gathered:
            self._try_gathered()
        self._compare()
        self._settle()

    def _due(self, chunk: Chunk) -> bool:
        """Tell whether an entry at this chunk is far enough from the last one, and its history affordable by now."""
        offset, raw_offset = (self._trial.offset, self._trial.raw_offset) if self._trial else self._last
        gap, raw_gap = chunk.offset - offset, chunk.raw_offset - raw_offset
        # Where nothing holds, ever less is tried: an attempt costs what decoding several histories does.
        nearest = max(MIN_GAP_BYTES, (HISTORIES_PER_GAP + self._failed_in_turn**2) * chunk.history_bytes)
        if raw_gap < nearest or chunk.history_bytes > _MAX_HISTORY_BYTES:
            return False
        if raw_gap < SPACING_BYTES and gap * (_MIN_ENTRIES + 1) < self._size:
            return False
        # A part of the budget is free from the start, so that the first entries need not wait; all of it at the end.
        free = chunk.offset + (self._size - chunk.offset) / (_MIN_ENTRIES + 1)
        return self._affordable(0, free)

    def _affordable(self, packed_bytes: int, size: float) -> bool:
        """Tell whether all histories, with one more, take no more than their share of `size` compressed bytes."""
        count = len(self._splices) + (self._trial is not None)
        spent = self._stored_bytes + (len(self._trial.packed) if self._trial else 0)
        return spent + packed_bytes <= (SHARE if count >= _MIN_ENTRIES else SMALL_SHARE) * size

    def _gather(self, chunk: Chunk) -> None:
        """Add a chunk to those that an entry is looked for in; the first only where one is due and may be."""
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
            return False  # the decoder holds back raw bytes of this chunk's data, which would be missed when counting
        first = self._gathered[0]
        gathered, raw = last.offset + len(last.data) - first.offset, last.raw_offset + len(last.raw) - first.raw_offset
        return gathered >= GATHERED_BYTES or raw >= _GATHERED_RAW_BYTES

    def _try_gathered(self) -> None:
        """Try the places for an entry in what was gathered, until one holds."""
        self._compare()  # the trial before has taken in the same chunks
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
        """Tell whether decoding from a place gives the chunks' raw bytes, and its history is affordable."""
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
        self._settle()  # the one before has held up to this one
        self._trial = _Trial(start.offset, start.raw_offset, start.state, packed, follower)
        if not self._verify:
            self._settle()
        return True

    def _compare(self) -> None:
        """Decode the chunks that wait from the splice point that is being tried."""
        if self._trial and not self._trial.follower.holds(self._waiting):
            self._failed += 1
            self._trial = None
        self._waiting.clear()
        self._waiting_bytes = 0

    def _settle(self) -> None:
        """Keep the splice point that is being tried for good."""
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
        return f"none: too short to gain by them, being below {nearest / MIB:,.4g} MiB raw"
    if counts.too_large:
        return f"none: one splice point would take more than {SMALL_SHARE:.0%} of the shard"
    if counts.looked_at:
        return f"none: of {counts.looked_at} places, none could be decoded from; it is decoded from frames' starts"
    return "none needed: its frames are short"


def read_history(path: Path, splice: Splice) -> bytes:
    """Read a splice point's history from its file. Raises: OSError or zstandard.ZstdError if it is not there."""
    with path.open("rb") as file:
        file.seek(splice.position)
        return zstandard.ZstdDecompressor().decompress(file.read(splice.packed_bytes))
