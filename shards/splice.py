"""Splice points: entries inside a frame or member. Chosen, verified and packed while a shard is indexed.

formats -> splice -> index, decoders.

A splice point is where decoding goes on given the raw bytes before it, its *window*, which is kept beside the index.
Whether a place will do is not proven from the data's structure: it is decoded from, beside the decoding of the whole
shard, up to the next entry, and what comes out is compared. What reads from it later compares once more, with the
record table's hashes; so no entry can make a wrong byte be read, only cost time.
"""

from collections import deque
from pathlib import Path
from typing import NamedTuple

import msgspec
import zstandard

from shards import formats
from shards.config import MIB
from shards.formats import Piece, Start, blocks, deflate, zstd

SPACING_BYTES = 64 * MIB  # raw bytes from one entry to the next, where that is affordable
MIN_ENTRIES = 8  # of a shard, so that several readers can share a small one
SHARE = 0.02  # of the shard's compressed size, that all its windows may take
SMALL_SHARE = 0.2  # where MIN_ENTRIES would not fit into SHARE
MIN_GAP_BYTES = 4 * MIB  # raw bytes that an entry must save at the least: some milliseconds
WINDOWS_PER_GAP = 4  # opening handles a window twice, so nearer entries would save nothing
MAX_WINDOW_BYTES = 128 * MIB  # beyond, no pass holds that many bytes for it
TRIAL_BYTES = MIB  # what is compared in any case
TURN_BYTES = 16 * MIB  # raw, compared in one go: two decoders in turns push each other's windows out of the cache
GATHERED_BYTES = 192 << 10  # of gzip data, to find a block's beginning in the first third of


class Splice(msgspec.Struct, frozen=True):
    """One splice point, and where its packed window lies in the file of windows."""

    offset: int  # in the compressed file
    raw_offset: int
    state: int
    position: int  # bytes
    packed_bytes: int


class SpliceCounts(msgspec.Struct, frozen=True):
    """What became of the block boundaries that were looked at, where an entry was due."""

    looked_at: int = 0
    qualified: int = 0  # as their block's headers tell (zstd), or as decoding a few blocks from them tells (gzip)
    failed: int = 0  # in decoding from them


class Splices(NamedTuple):
    """The splice points of a shard, as the pass over it leaves them."""

    splices: tuple[Splice, ...]
    counts: SpliceCounts
    windows: bytes  # packed, one after the other


class _Trial:
    """Decoding from a splice point, beside that of the whole shard."""

    def __init__(self, compression: str, start: Start) -> None:
        self.start = start
        self._decompressor = formats.restart(compression, start)
        self._ahead = b""  # decoded, and not yet compared
        self.compared = 0  # raw bytes

    def agrees(self, piece: Piece) -> bool:
        """Decodes the next piece; False if that does not give its raw bytes."""
        try:
            got = self._ahead + self._decompressor.decompress(piece.data)
        except formats.DECODE_ERRORS:
            return False
        self._ahead = got[len(piece.raw) :]
        self.compared += len(piece.raw)
        return got.startswith(piece.raw)


class Splicer:
    """Sees all pieces of a shard in turn, and chooses splice points among them."""

    def __init__(self, compression: str, size: int, verify: bool) -> None:
        """
        Args:
            compression: of the shard; those of other than zstd and gzip have no splice points.
            size: compressed bytes of the shard.
            verify: compare up to the next entry, and not only TRIAL_BYTES.
        """
        self._compression, self._size, self._verify = compression, size, verify
        self._splices: list[Splice] = []
        self._windows: list[bytes] = []
        self._stored_bytes = 0
        self._looked_at = self._qualified = self._failed = 0
        self._packer = zstandard.ZstdCompressor(level=1, write_checksum=True)
        self._last = (0, 0)  # (compressed offset, raw offset) of the last entry
        self._state = 0  # what `Start.state` is for the frame
        self._held: deque[bytes] = deque()  # the last raw bytes of the frame or member, a window at least
        self._held_bytes = 0
        self._gathered: list[Piece] = []  # gzip data that a block's beginning is to be looked for in
        self._before = b""  # the window before it
        self._waiting: list[Piece] = []  # to be compared
        self._waiting_bytes = 0
        self._trials: list[_Trial] = []  # that of the last entry, until a newer one has held for TRIAL_BYTES

    def see(self, piece: Piece) -> None:
        """Takes note of a piece, and of what an entry at its beginning would give."""
        if self._compression not in ("zstd", "gzip"):
            return
        if piece.begins:
            self._begin(piece)
            return
        if self._trials:
            self._waiting.append(piece)
            self._waiting_bytes += len(piece.raw)
            if self._waiting_bytes >= TURN_BYTES or self._trials[-1].compared < TRIAL_BYTES:
                self._compare()
        if self._gathered or self._due(piece):
            self._compare()  # what is tried now begins with this piece, or has taken it in
            if self._compression == "zstd":
                self._try_block(piece)
            else:
                self._gather(piece)
        if piece.window <= MAX_WINDOW_BYTES:
            self._hold(piece)

    def finish(self) -> Splices:
        """What was chosen, once there are no more pieces."""
        self._settle_all()
        counts = SpliceCounts(self._looked_at, self._qualified, self._failed)
        return Splices(tuple(self._splices), counts, b"".join(self._windows))

    def _begin(self, piece: Piece) -> None:
        """A frame or member begins: what is being tried has held to the last one's end."""
        self._settle_all()
        self._last = (piece.offset, piece.raw_offset)
        self._state = zstd.restart_state(piece.data) if self._compression == "zstd" else 0
        self._held.clear()
        self._held_bytes = 0
        self._gathered.clear()

    def _due(self, piece: Piece) -> bool:
        """True if an entry at this piece is far enough from the last one, and its window affordable by now."""
        offset, raw_offset = self._trials[-1].start[:2] if self._trials else self._last
        gap, raw_gap = piece.offset - offset, piece.raw_offset - raw_offset
        if raw_gap < max(MIN_GAP_BYTES, WINDOWS_PER_GAP * piece.window) or piece.window > MAX_WINDOW_BYTES:
            return False
        if raw_gap < SPACING_BYTES and gap * (MIN_ENTRIES + 1) < self._size:
            return False
        guess = piece.window * piece.offset / piece.raw_offset
        spent = self._stored_bytes + guess * len(self._trials)
        # A part of the budget is free from the start, so that the first entry need not wait; all of it only at the end.
        free = piece.offset + (self._size - piece.offset) / (MIN_ENTRIES + 1)
        return spent + guess <= share(self._size, guess) * free

    def _try_block(self, piece: Piece) -> None:
        """Tries the bound of a zstd block, if the block's headers refer to nothing before it."""
        self._looked_at += 1
        if blocks.stands_alone(piece.data):
            window = b"".join(self._held)[-piece.window :]
            start = Start(piece.offset, piece.raw_offset, window, self._state)
            self._try(start, piece)

    def _gather(self, piece: Piece) -> None:
        """Looks for a block's beginning in gzip data, once there is enough to tell one."""
        if not self._gathered:
            self._before = b"".join(self._held)[-piece.window :]
        self._gathered.append(piece)
        data = b"".join(part.data for part in self._gathered)
        if len(data) < GATHERED_BYTES:
            return
        raw = b"".join(part.raw for part in self._gathered)
        first = self._gathered[0]
        self._gathered = []
        self._looked_at += 1
        search = (data, raw, self._before, first.offset, first.raw_offset, GATHERED_BYTES // 3)
        for start in deflate.find_starts(*search):
            at, raw_at = start.offset - first.offset, start.raw_offset - first.raw_offset
            rest = Piece(start.offset, start.raw_offset, data[at:], raw[raw_at:], piece.window, False)
            if self._try(start, rest):
                return

    def _try(self, start: Start, piece: Piece) -> bool:
        self._qualified += 1
        trial = _Trial(self._compression, start)
        if trial.agrees(piece):
            self._trials.append(trial)
            return True
        self._failed += 1
        return False

    def _compare(self) -> None:
        """Decodes the pieces that wait from each splice point that is being tried."""
        agreeing = [trial for trial in self._trials if all(trial.agrees(piece) for piece in self._waiting)]
        self._waiting.clear()
        self._waiting_bytes = 0
        self._failed += len(self._trials) - len(agreeing)
        self._trials = agreeing
        if not self._trials or self._trials[-1].compared < TRIAL_BYTES:
            return
        # The newest has held: the one before it has reached the next entry.
        while len(self._trials) > self._verify:
            self._settle(self._trials.pop(0))

    def _settle_all(self) -> None:
        self._compare()
        for trial in self._trials:
            self._settle(trial)
        self._trials.clear()

    def _settle(self, trial: _Trial) -> None:
        """Keeps a splice point for good, with its window packed."""
        start = trial.start
        packed = self._packer.compress(start.window)
        self._last = (start.offset, start.raw_offset)
        if self._stored_bytes + len(packed) <= share(self._size, len(packed)) * self._size:
            self._splices.append(Splice(start.offset, start.raw_offset, start.state, self._stored_bytes, len(packed)))
            self._windows.append(packed)
            self._stored_bytes += len(packed)

    def _hold(self, piece: Piece) -> None:
        self._held.append(piece.raw)
        self._held_bytes += len(piece.raw)
        while self._held_bytes - len(self._held[0]) >= piece.window:
            self._held_bytes -= len(self._held.popleft())


def share(size: int, packed_bytes: float) -> float:
    """The share of a shard's compressed size that its windows may take, if one takes `packed_bytes`."""
    return SHARE if MIN_ENTRIES * packed_bytes <= SHARE * size else SMALL_SHARE


def explain(size: int, raw_bytes: int, window: int, splices: tuple[Splice, ...]) -> str:
    """Why a shard has the splice points it has, in words.

    Args:
        size: compressed bytes of the shard.
        window: bytes that its frames may refer back, the largest of them.
    """
    if splices:
        packed = sum(found.packed_bytes for found in splices)
        return f"{len(splices)}, their windows {packed / size:.1%} of the shard"
    guess = window / raw_bytes
    if window > MAX_WINDOW_BYTES:
        return f"none: windows of {window // MIB} MiB are too large to keep, so it is decoded from frames' starts"
    if raw_bytes < max(MIN_GAP_BYTES, WINDOWS_PER_GAP * window):
        return f"none: too short to gain by them, with windows of {window / MIB:.2g} MiB"
    if guess > SMALL_SHARE:
        return f"none: one window would be {guess:.0%} of the shard, more than {SMALL_SHARE:.0%}"
    return "none needed: its frames are short"


def read_window(path: Path, splice: Splice) -> bytes:
    """A splice point's window, from the file of windows. Raises: OSError or zstandard.ZstdError if it is not there."""
    with path.open("rb") as file:
        file.seek(splice.position)
        return zstandard.ZstdDecompressor().decompress(file.read(splice.packed_bytes))
