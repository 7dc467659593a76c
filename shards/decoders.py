"""Open decoders of shards: raw byte ranges, read forward, with the last used kept open.

formats -> decoders -> window.
"""

from collections import OrderedDict

import msgspec

from shards import files, formats
from shards.cache import BlockCache
from shards.errors import ShardError

MAX_OPEN = 32
MAX_OPEN_BYTES = 256 << 20


class RawRange(msgspec.Struct, frozen=True):
    """Consecutive raw bytes of an indexed shard, and where to start decoding to reach them."""

    path: str
    stat: files.Stat  # of the file when it was indexed
    compression: str
    decoder_window: int  # bytes that one open decoder of this shard holds
    entry: tuple[int, int]  # (compressed offset, raw offset), at or before start
    start: int  # raw offset
    stop: int  # raw offset


class _Decoder:
    """One open file, decoded forward from an entry."""

    def __init__(self, wanted: RawRange, max_window: int, cache: BlockCache | None) -> None:
        files.check_unchanged(wanted.path, wanted.stat)
        offset, self.position = wanted.entry  # position: raw offset of the next byte
        self._file = files.open_shard(wanted.path, offset, cache)
        self._chunks = formats.decode(self._file, wanted.compression, wanted.path, max_window, wanted.entry)
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
    """Decoders kept open for the windows that follow, bounded in number and in bytes of decoder window."""

    def __init__(self, max_window: int, cache: BlockCache | None = None) -> None:
        self._max_window, self._cache = max_window, cache
        self._open: OrderedDict[int, tuple[RawRange, _Decoder]] = OrderedDict()  # least recently used first
        self._next_id = 0

    def read(self, wanted: RawRange) -> bytes:
        """The bytes of `wanted`.

        Raises: ShardError if the file changed, is damaged, or ends before the range does.
        """
        decoder = self._take(wanted)
        try:
            raw = decoder.read(wanted.start, wanted.stop)
        except BaseException:
            decoder.close()
            raise
        if len(raw) != wanted.stop - wanted.start:
            decoder.close()
            raise ShardError(
                f"{wanted.path}: ends at raw byte {decoder.position}, its index says that it reaches {wanted.stop}; "
                "it changed after it was indexed: put the old file back, or start a new run"
            )
        self._keep(wanted, decoder)
        return raw

    def close(self) -> None:
        for _, decoder in self._open.values():
            decoder.close()
        self._open.clear()

    def _take(self, wanted: RawRange) -> _Decoder:
        """The open decoder that is nearest before the range, if no entry is nearer; else a new one."""
        best, best_position = None, wanted.entry[1]
        for number, (opened, decoder) in self._open.items():
            if opened.path == wanted.path and best_position <= decoder.position <= wanted.start:
                best, best_position = number, decoder.position
        return _Decoder(wanted, self._max_window, self._cache) if best is None else self._open.pop(best)[1]

    def _keep(self, wanted: RawRange, decoder: _Decoder) -> None:
        self._open[self._next_id] = (wanted, decoder)
        self._next_id += 1
        held = sum(opened.decoder_window for opened, _ in self._open.values())
        # One stays whatever it holds: else each window of a --long=29 shard would be decoded from the frame's start.
        while len(self._open) > 1 and (len(self._open) > MAX_OPEN or held > MAX_OPEN_BYTES):
            _, (opened, oldest) = self._open.popitem(last=False)
            held -= opened.decoder_window
            oldest.close()
