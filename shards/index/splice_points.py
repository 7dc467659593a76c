"""Splice points: entries inside a frame or member. Chosen, thinned and verified while a shard is indexed.

formats, thinning -> splice_points -> shard_index, decoders.

A splice point is where decoding goes on given the raw bytes before it, its *window*, which is kept beside the index,
thinned. Whether a place will do is not proven from the data's structure: it is decoded from, beside the decoding of the
whole shard, up to the next entry, and what comes out is compared. What reads from it later compares once more, with the
record table's hashes; so no entry can make a wrong byte be read, only cost time.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec
import zstandard

from shards import formats
from shards.config import MIB
from shards.formats import Piece, Start, deflate, gzip, zstd, zstd_blocks
from shards.index.thinning import Follower, thinned

SPACING_BYTES = 64 * MIB  # raw bytes from one entry to the next, where that is affordable
MIN_ENTRIES = 8  # of a shard, so that several readers can share a small one
SHARE = 0.02  # of the shard's compressed size, that all its windows may take
SMALL_SHARE = 0.1  # that they may take as long as there are fewer than MIN_ENTRIES
MIN_GAP_BYTES = 4 * MIB  # raw bytes that an entry must save at the least: some milliseconds
WINDOWS_PER_GAP = 4  # opening handles a window twice, so nearer entries would save nothing
MAX_WINDOW_BYTES = 128 * MIB  # beyond, no pass holds several times that many bytes for it
TRIAL_BYTES = MIB  # raw, of zstd: what a place is tried with at least; a window's length, if that is more
TURN_BYTES = 16 * MIB  # raw, compared in one go: two decoders in turns push each other's windows out of the cache
GATHERED_BYTES = 192 << 10  # of gzip data: to find a block's beginning in the first third, and try it with the rest
GATHERED_RAW_BYTES = 16 * MIB  # of gzip data that unpacks to more


class Splice(msgspec.Struct, frozen=True):
    """One splice point, and where its packed window lies in the file of windows."""

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
    too_large: int = 0  # of their windows, for what all of the shard's may take


class _Trial(NamedTuple):
    """A splice point that is being decoded from, beside the decoding of the whole shard."""

    offset: int
    raw_offset: int
    state: int
    packed: bytes  # its window
    follower: Follower


class Splicer:
    """Sees all pieces of a shard in turn, and chooses splice points among them."""

    def __init__(self, compression: str, size: int, verify: bool, windows: BinaryIO) -> None:
        """
        Args:
            compression: of the shard, zstd or gzip.
            size: compressed bytes of the shard.
            verify: compare up to the next entry, and not only what a place is tried with.
            windows: file for the packed windows, one after the other.
        """
        self._compression, self._size, self._verify, self._file = compression, size, verify, windows
        self._splices: list[Splice] = []
        self._stored_bytes = 0
        self._looked_at = self._qualified = self._failed = self._too_large = 0
        self._failed_in_turn = 0
        self._packer = zstandard.ZstdCompressor(level=1, write_checksum=True)
        self._last = (0, 0)  # (compressed offset, raw offset) of the last settled entry
        self._state = 0  # what `Start.state` is for the frame
        self._held: deque[bytes] = deque()  # the last raw bytes of the frame or member, a window at least
        self._held_bytes = 0
        self._gathered: list[Piece] = []  # from where an entry is due on, until it can be tried
        self._before = b""  # the window before them
        self._trial: _Trial | None = None  # the newest entry, until it has held to the next
        self._waiting: list[Piece] = []  # to be compared with what it gives
        self._waiting_bytes = 0

    def see(self, piece: Piece) -> None:
        """Takes note of a piece; where an entry is due, gathers it and those that follow to try one."""
        if piece.begins:
            self._begin(piece)
            return
        if self._trial:
            self._waiting.append(piece)
            self._waiting_bytes += len(piece.raw)
            if self._waiting_bytes >= TURN_BYTES:
                self._compare()
        self._gather(piece)
        if piece.window <= MAX_WINDOW_BYTES:
            self._hold(piece)

    def finish(self) -> tuple[tuple[Splice, ...], SpliceCounts]:
        """What was chosen, once there are no more pieces."""
        self._end_frame()
        return tuple(self._splices), SpliceCounts(self._looked_at, self._qualified, self._failed, self._too_large)

    def _begin(self, piece: Piece) -> None:
        self._end_frame()
        self._last = (piece.offset, piece.raw_offset)
        self._failed_in_turn = 0
        self._state = zstd.restart_state(piece.data) if self._compression == "zstd" else 0
        self._held.clear()
        self._held_bytes = 0

    def _end_frame(self) -> None:
        """What is being tried has held to the frame's or member's end."""
        if self._gathered:
            self._try_gathered()
        self._compare()
        self._settle()

    def _due(self, piece: Piece) -> bool:
        """True if an entry at this piece is far enough from the last one, and its window affordable by now."""
        offset, raw_offset = (self._trial.offset, self._trial.raw_offset) if self._trial else self._last
        gap, raw_gap = piece.offset - offset, piece.raw_offset - raw_offset
        # Where nothing holds, ever less is tried: an attempt costs what decoding several windows does.
        nearest = max(MIN_GAP_BYTES, (WINDOWS_PER_GAP + self._failed_in_turn**2) * piece.window)
        if raw_gap < nearest or piece.window > MAX_WINDOW_BYTES:
            return False
        if raw_gap < SPACING_BYTES and gap * (MIN_ENTRIES + 1) < self._size:
            return False
        # A part of the budget is free from the start, so that the first entries need not wait; all of it at the end.
        free = piece.offset + (self._size - piece.offset) / (MIN_ENTRIES + 1)
        return self._affordable(0, free)

    def _affordable(self, packed_bytes: int, size: float) -> bool:
        """True if all windows, with one more, take no more than their share of `size` compressed bytes."""
        count = len(self._splices) + (self._trial is not None)
        spent = self._stored_bytes + (len(self._trial.packed) if self._trial else 0)
        return spent + packed_bytes <= (SHARE if count >= MIN_ENTRIES else SMALL_SHARE) * size

    def _gather(self, piece: Piece) -> None:
        """Adds a piece to those that an entry is looked for in; the first only where one is due and may be."""
        if not self._gathered:
            if not self._due(piece):
                return
            self._looked_at += 1
            if self._compression == "zstd" and not zstd_blocks.stands_alone(piece.data):
                return
            self._before = b"".join(self._held)[-piece.window :]
        self._gathered.append(piece)
        if self._enough_gathered(piece):
            self._try_gathered()

    def _enough_gathered(self, last: Piece) -> bool:
        if self._compression == "zstd":
            return last.raw_offset + len(last.raw) - self._gathered[0].raw_offset >= max(last.window, TRIAL_BYTES)
        if len(last.raw) >= gzip.MAX_OUTPUT_BYTES:
            return False  # the decoder holds back raw bytes of this piece's data, which would be missed when counting
        first = self._gathered[0]
        gathered, raw = last.offset + len(last.data) - first.offset, last.raw_offset + len(last.raw) - first.raw_offset
        return gathered >= GATHERED_BYTES or raw >= GATHERED_RAW_BYTES

    def _try_gathered(self) -> None:
        """Tries the places for an entry in what was gathered, until one holds."""
        self._compare()  # the trial before has taken in the same pieces
        self._failed_in_turn += 1
        for start, pieces in self._candidates():
            self._qualified += 1
            if self._try(start, pieces):
                self._failed_in_turn = 0
                break
        self._gathered = []

    def _candidates(self) -> Iterator[tuple[Start, Sequence[Piece]]]:
        """Places for an entry, each with the pieces that follow it."""
        first = self._gathered[0]
        if self._compression == "zstd":
            yield Start(first.offset, first.raw_offset, self._before, self._state), self._gathered
            return
        data = b"".join(piece.data for piece in self._gathered)
        raw = b"".join(piece.raw for piece in self._gathered)
        for start in deflate.find_starts(
            data, raw, self._before, first.offset, first.raw_offset, search_bytes=len(data) // 3
        ):
            at, raw_at = start.offset - first.offset, start.raw_offset - first.raw_offset
            yield start, [Piece(start.offset, start.raw_offset, data[at:], raw[raw_at:], first.window, False)]

    def _try(self, start: Start, pieces: Sequence[Piece]) -> bool:
        """True if decoding from a place gives the pieces' raw bytes, and its window is affordable."""
        try:
            window = thinned(self._compression, start, pieces)
        except formats.DECODE_ERRORS:
            self._failed += 1
            return False
        packed = self._packer.compress(window)
        if not self._affordable(len(packed), self._size):
            self._too_large += 1
            return False
        follower = Follower(self._compression, start._replace(window=window))
        if not follower.holds(pieces):
            self._failed += 1
            return False
        self._settle()  # the one before has held up to this one
        self._trial = _Trial(start.offset, start.raw_offset, start.state, packed, follower)
        if not self._verify:
            self._settle()
        return True

    def _compare(self) -> None:
        """Decodes the pieces that wait from the splice point that is being tried."""
        if self._trial and not self._trial.follower.holds(self._waiting):
            self._failed += 1
            self._trial = None
        self._waiting.clear()
        self._waiting_bytes = 0

    def _settle(self) -> None:
        """Keeps the splice point that is being tried for good."""
        if self._trial is None:
            return
        trial, self._trial = self._trial, None
        self._file.write(trial.packed)
        self._splices.append(Splice(trial.offset, trial.raw_offset, trial.state, self._stored_bytes, len(trial.packed)))
        self._stored_bytes += len(trial.packed)
        self._last = (trial.offset, trial.raw_offset)

    def _hold(self, piece: Piece) -> None:
        self._held.append(piece.raw)
        self._held_bytes += len(piece.raw)
        while self._held_bytes - len(self._held[0]) >= piece.window:
            self._held_bytes -= len(self._held.popleft())


def explain(size: int, raw_bytes: int, window: int, splices: tuple[Splice, ...], counts: SpliceCounts) -> str:
    """Why a shard has the splice points it has, in words.

    Args:
        size: compressed bytes of the shard.
        window: bytes that one open decoder of it holds.
    """
    if splices:
        packed = sum(splice.packed_bytes for splice in splices)
        gap = raw_bytes / (len(splices) + 1) / MIB
        return f"{len(splices)}, about one every {gap:,.0f} MiB raw; their windows are {packed / size:.2%} of the shard"
    nearest = max(MIN_GAP_BYTES, WINDOWS_PER_GAP * window)
    if window > MAX_WINDOW_BYTES:
        return f"none: windows of {window // MIB} MiB are too large to handle, so it is decoded from frames' starts"
    if raw_bytes < nearest:
        return f"none: too short to gain by them, being below {nearest / MIB:,.4g} MiB raw"
    if counts.too_large:
        return f"none: one window, though thinned, would be more than {SMALL_SHARE:.0%} of the shard"
    if counts.looked_at:
        return f"none: of {counts.looked_at} places, none could be decoded from; it is decoded from frames' starts"
    return "none needed: its frames are short"


def read_window(path: Path, splice: Splice) -> bytes:
    """A splice point's window, from the file of windows. Raises: OSError or zstandard.ZstdError if it is not there."""
    with path.open("rb") as file:
        file.seek(splice.position)
        return zstandard.ZstdDecompressor().decompress(file.read(splice.packed_bytes))
