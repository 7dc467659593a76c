"""zstd frames (RFC 8878, section 3) -> raw bytes. formats -> zstd.

One decompressor per frame, because the library's streaming readers end silently on a truncated file and stop after the
first frame; a frame is complete only if its decompressor says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import zstandard

from shards.errors import ShardError

if TYPE_CHECKING:
    from shards.formats import OnEntry, Readable

MAGIC = b"\x28\xb5\x2f\xfd"
SKIPPABLE_MAGICS = tuple(bytes([low, 0x2A, 0x4D, 0x18]) for low in range(0x50, 0x60))  # section 3.1.2
MAX_HEADER_BYTES = 18  # magic and frame header, section 3.1.1
CHUNK_BYTES = 1 << 17
FIRST_FEED_BYTES = 1 << 14  # grows while the frame lasts: a small frame ends within it
MAX_OUTPUT_BYTES = 1 << 22  # feed less at a time where more comes out: repeats unpack ten-thousandfold
MIN_WINDOW_BYTES = 1 << 10


def starts_frame(head: bytes) -> bool:
    """True if `head` begins a zstd frame or a skippable frame."""
    return head.startswith((MAGIC, *SKIPPABLE_MAGICS))


def window_bytes(head: bytes) -> int:
    """Bytes of decoded data that the frame beginning with `head` may refer back to.

    Raises: zstandard.ZstdError if the header is cut short, or asks for more than any decoder grants.
    """
    return max(MIN_WINDOW_BYTES, zstandard.get_frame_parameters(head).window_size)


class _Input:
    """Compressed bytes with a position, read in chunks."""

    def __init__(self, file: Readable, offset: int) -> None:
        self._file = file
        self.offset = offset  # in the file, of the next byte that `take` gives
        self._data = b""
        self._next = 0  # position in _data: small frames must not copy what follows them again and again

    def peek(self, size: int) -> bytes:
        """The next `size` bytes without taking them; fewer only at the file's end."""
        while len(self._data) - self._next < size and (more := self._file.read(CHUNK_BYTES)):
            self._data = self._data[self._next :] + more
            self._next = 0
        return self._data[self._next : self._next + size]

    def take(self, size: int) -> bytes:
        """Up to `size` bytes; none only at the file's end."""
        self.peek(1)
        taken = self._data[self._next : self._next + size]
        self._next += len(taken)
        self.offset += len(taken)
        return taken

    def give_back(self, size: int) -> None:
        """Undoes the last `size` bytes of the latest `take`."""
        self._next -= size
        self.offset -= size


def decode(
    file: Readable, path: str, max_window: int, entry: tuple[int, int], on_entry: OnEntry | None
) -> Iterator[bytes]:
    """Yields raw bytes of all frames from `entry` (a frame's start) on. See `formats.decode`."""
    source = _Input(file, entry[0])
    raw_offset = entry[1]
    while head := source.peek(MAX_HEADER_BYTES):
        if head.startswith(SKIPPABLE_MAGICS):
            _skip(source, path, raw_offset)
            continue
        if not head.startswith(MAGIC):
            raise ShardError(
                f"{path}: byte {source.offset} should begin a zstd frame but holds {head[:4].hex(' ')}; "
                f"the file is damaged or cut short after raw byte {raw_offset}, copy it again"
            )
        window = _window(source, path, max_window, raw_offset)
        if on_entry:
            on_entry(source.offset, raw_offset, window)
        for raw in _decode_frame(source, path, window, raw_offset):
            raw_offset += len(raw)
            yield raw


def _window(source: _Input, path: str, max_window: int, raw_offset: int) -> int:
    """Bytes of window of the frame that comes next. Raises: ShardError if it is more than allowed."""
    head = source.peek(MAX_HEADER_BYTES)
    try:
        window = window_bytes(head)
    except zstandard.ZstdError as error:
        if len(head) < MAX_HEADER_BYTES:
            raise _truncated(source, path, raw_offset) from None
        raise ShardError(
            f"{path}: the header of the zstd frame at byte {source.offset} cannot be used ({error}); windows of up to "
            f"2 GiB can be decoded (zstd --long=31, with data.max_decoder_window: {1 << 31}); the file is damaged, "
            "or has to be compressed again"
        ) from None
    if window > max_window:
        raise ShardError(
            f"{path}: the zstd frame at byte {source.offset} needs a window of {window} bytes; "
            f"data.max_decoder_window is {max_window}; raise it to {window} (that much memory per open shard)"
        )
    return window


def _decode_frame(source: _Input, path: str, window: int, raw_offset: int) -> Iterator[bytes]:
    frame = zstandard.ZstdDecompressor(max_window_size=window).decompressobj()
    feed = FIRST_FEED_BYTES
    while not frame.eof:
        data = source.take(feed)
        if not data:
            raise _truncated(source, path, raw_offset)
        try:
            raw = frame.decompress(data)
        except zstandard.ZstdError as error:
            raise ShardError(
                f"{path}: damaged zstd data near byte {source.offset}, raw byte {raw_offset} ({error}); copy it again"
            ) from None
        if len(raw) > MAX_OUTPUT_BYTES:
            feed = max(1, feed // 8)
        elif feed < CHUNK_BYTES:
            feed *= 2
        raw_offset += len(raw)
        if raw:
            yield raw
    source.give_back(len(frame.unused_data))


def _skip(source: _Input, path: str, raw_offset: int) -> None:
    """Passes over a skippable frame: magic, 4 bytes of size (little-endian), that many bytes."""
    header = source.take(8)
    left = int.from_bytes(header[4:8], "little")
    if len(header) < 8:
        raise _truncated(source, path, raw_offset)
    while left:
        taken = source.take(left)
        if not taken:
            raise _truncated(source, path, raw_offset)
        left -= len(taken)


def _truncated(source: _Input, path: str, raw_offset: int) -> ShardError:
    return ShardError(
        f"{path}: the file ends at byte {source.offset} inside a zstd frame, after raw byte {raw_offset}; "
        "it is truncated, copy it again"
    )
