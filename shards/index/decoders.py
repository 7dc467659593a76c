"""Open decoders of shards, which read raw byte ranges forward and stay open for the next range.

formats, splice_points -> decoders -> cells.
"""

from __future__ import annotations

import contextlib
import logging
import shlex
from pathlib import Path
from typing import NamedTuple

import msgspec
import xxhash

from shards import formats
from shards.config import MIB
from shards.errors import DamageError, ShardError
from shards.formats import Start
from shards.index.paths import history_path, index_command, index_paths
from shards.index.splice_points import Splice, read_history
from shards.storage import files
from shards.storage.block_cache import BlockCache

MAX_OPEN = 32
MAX_OPEN_BYTES = 256 << 20

_logger = logging.getLogger(__name__)


class CellCheck(NamedTuple):
    """The hash that a cell's raw bytes must have."""

    start: int  # raw offset
    stop: int  # raw offset
    hash: int  # xxh3-64


class RawRange(msgspec.Struct, frozen=True):
    """Consecutive raw bytes of an indexed shard, and where to start decoding to reach them."""

    path: str
    stat: files.Stat  # stat of the file when it was indexed
    compression: str
    decoder_window: int  # bytes that one open decoder of this shard holds
    frame: tuple[int, int]  # (compressed offset, raw offset) of a frame's or member's start, no later than `start`
    start: int  # raw offset
    stop: int  # raw offset
    splice: Splice | None = None  # a nearer splice point inside that frame or member
    checks: tuple[CellCheck, ...] = ()  # checks of the whole cells in the range
    content_hash: str = ""  # hash of the file when it was indexed


class _Decoder:
    """One open file, decoded forward from an entry."""

    def __init__(
        self, wanted: RawRange, splice: Splice | None, start: Start, max_window: int, cache: BlockCache | None
    ) -> None:
        """Open the file at `start`, which is `splice`'s place unless that is None."""
        files.check_size(wanted.path, wanted.stat)
        self.path, self.splice = wanted.path, splice
        self.position = start.raw_offset  # raw offset of the next byte
        self.held_bytes = wanted.decoder_window + len(start.history)
        self._file = files.open_shard(wanted.path, start.offset, cache)
        self._chunks = formats.decode(self._file, wanted.compression, wanted.path, max_window, start)
        self._left = b""

    def read(self, start: int, stop: int) -> bytes:
        parts = []
        while self.position < stop:
            if not self._left:
                self._left = next(self._chunks, b"")
                if not self._left:
                    break
            skip = max(0, min(start - self.position, len(self._left)))
            part = self._left[skip : skip + stop - max(start, self.position)] if self.position + skip >= start else b""
            parts.append(part)
            self._left = self._left[skip + len(part) :]
            self.position += skip + len(part)
        return b"".join(parts)

    def close(self) -> None:
        self._file.close()


class Decoders:
    """Decoders kept open for later windows, bounded in number and in the bytes they hold."""

    def __init__(
        self,
        max_window: int,
        cache: BlockCache | None = None,
        index_dir: Path | None = None,
        cell_bytes: int = MIB,
    ) -> None:
        """Create an empty set of decoders.

        Args:
            max_window: bytes of decoder window that a shard may need.
            cache: cache of remote shards.
            index_dir: folder of the indexes, if not beside the shards.
            cell_bytes: cell size of the indexes, for the commands that messages suggest.
        """
        self._max_window, self._cache, self._index_dir, self._cell_bytes = max_window, cache, index_dir, cell_bytes
        self._open: list[_Decoder] = []  # least recently used first
        self._distrusted: set[tuple[str, Splice]] = set()

    @property
    def replays(self) -> int:
        """Return the number of splice points that gave other bytes than indexed, so that decoding began before them."""
        return len(self._distrusted)

    def read(self, wanted: RawRange) -> bytes:
        """Read the bytes of `wanted` and compare each whole cell among them with its hash in the index.

        Raises: ShardError if the file changed, is damaged, or ends before the range does.
        """
        decoder = self._decoder_for(wanted)
        try:
            raw = decoder.read(wanted.start, wanted.stop)
            _check(wanted, raw, decoder.position)
        except ShardError as error:
            decoder.close()
            if decoder.splice is None or not isinstance(error, DamageError):
                raise self._explained(wanted, error) from None
            self._distrust(wanted.path, decoder.splice, error)
            return self.read(wanted)
        except BaseException:
            decoder.close()
            raise
        self._keep(decoder)
        return raw

    def close(self) -> None:
        """Close all files."""
        for decoder in self._open:
            decoder.close()
        self._open.clear()

    def _decoder_for(self, wanted: RawRange) -> _Decoder:
        """Remove and return the open decoder nearest before the range; if an entry is nearer, open a new one there."""
        splice = None if (wanted.path, wanted.splice) in self._distrusted else wanted.splice
        nearest = splice.raw_offset if splice else wanted.frame[1]
        usable = [one for one in self._open if one.path == wanted.path and nearest <= one.position <= wanted.start]
        if usable:
            decoder = max(usable, key=lambda one: one.position)
            self._open.remove(decoder)
            return decoder
        start = Start(*wanted.frame)
        if splice:
            try:
                history = self._history(wanted.path, splice)
                start = Start(splice.offset, splice.raw_offset, history, splice.state)
            except (OSError, *formats.DECODE_ERRORS) as error:
                self._distrust(wanted.path, splice, error)
                splice = None
        return _Decoder(wanted, splice, start, self._max_window, self._cache)

    def _history(self, path: str, splice: Splice) -> bytes:
        """Read a splice point's history from beside any of the index's possible places. Raises: as `read_history`."""
        first, *others = [history_path(place) for place in index_paths(path, self._index_dir)]
        for place in others if not first.exists() else ():
            with contextlib.suppress(OSError, *formats.DECODE_ERRORS):
                return read_history(place, splice)
        return read_history(first, splice)

    def _distrust(self, path: str, splice: Splice, error: Exception) -> None:
        self._distrusted.add((path, splice))
        _logger.warning(
            "%s: its entry at raw byte %d is not used, since it cannot be decoded from (%s); decoding from the start "
            "of the frame instead, which takes longer; to rebuild its entries: rm -f %s; %s",
            path,
            splice.raw_offset,
            error,
            shlex.join(str(place) for place in index_paths(path, self._index_dir) if place.exists()),
            index_command([path], self._index_dir, self._cell_bytes, self._max_window),
        )

    def _explained(self, wanted: RawRange, error: ShardError) -> ShardError:
        """Explain why a shard differs from what was indexed; return any other error unchanged."""
        if not isinstance(error, DamageError):
            return error
        now, path = files.stat(wanted.path, fresh=True), wanted.path
        reason = str(error).removeprefix(f"{path}: ")
        if now == wanted.stat:
            said = f"{reason}; size and modification time are as they were when it was indexed, so it is damaged, or "
            said += "another file has taken its place"
        else:
            said = f"changed after it was indexed (modification time {wanted.stat.stamp} -> {now.stamp}): {reason}"
        command = index_command([path], self._index_dir, self._cell_bytes, self._max_window, verify=True)
        return ShardError(f"{path}: {said}; put the old file back, or rebuild its index for a new run: {command}")

    def _keep(self, decoder: _Decoder) -> None:
        self._open.append(decoder)
        held = sum(one.held_bytes for one in self._open)
        # One always stays open, or each window of a --long=29 shard would be decoded from the frame's start.
        while len(self._open) > 1 and (len(self._open) > MAX_OPEN or held > MAX_OPEN_BYTES):
            oldest = self._open.pop(0)
            held -= oldest.held_bytes
            oldest.close()


def _check(wanted: RawRange, raw: bytes, reached: int) -> None:
    """Check what was read of a range, up to raw offset `reached`. Raises: ShardError if it contradicts the index."""
    if len(raw) != wanted.stop - wanted.start:
        raise DamageError(f"{wanted.path}: ends at raw byte {reached}, but its index says it reaches {wanted.stop}")
    view = memoryview(raw)
    for cell in wanted.checks:
        if xxhash.xxh3_64_intdigest(view[cell.start - wanted.start : cell.stop - wanted.start]) != cell.hash:
            raise DamageError(f"{wanted.path}: raw bytes {cell.start} to {cell.stop} are not those that were indexed")
