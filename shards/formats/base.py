"""Types shared by the formats: the file to read, the place to start, the chunks to yield. base -> zstd, gzip, plain."""

from __future__ import annotations

from typing import NamedTuple, Protocol, cast

import zstandard
from isal import isal_zlib

READ_BYTES = 1 << 17  # bytes per read
# isal's stub declares this class as an instance.
DECODE_ERRORS = (zstandard.ZstdError, cast(type[Exception], isal_zlib.error))


class Readable(Protocol):
    """The one method that decoding needs of a file."""

    def read(self, size: int, /) -> bytes: ...


class Start(NamedTuple):
    """A place where decoding can start: on its own at the start of a frame, elsewhere with the history before it."""

    offset: int = 0  # in the compressed file
    raw_offset: int = 0
    history: bytes | memoryview = b""  # raw bytes before it that later data may refer to; b"" at the start of a frame
    state: int = 0  # what else the format must know inside a frame or member: an argument of `restart`


class Chunk(NamedTuple):
    """Compressed bytes that follow the previous chunk's, and what they decode to."""

    offset: int  # offset of `data` in the compressed file
    raw_offset: int  # offset of `raw` in the decoded file
    data: bytes
    raw: bytes  # at most 1 MiB; b"" for the header of a frame or member
    history_bytes: int  # raw bytes that the frame or member may refer back
    begins: bool  # True if `data` begins a frame or member, so that decoding can start here


class Input:
    """Compressed bytes with a position, read in chunks."""

    def __init__(self, file: Readable, offset: int) -> None:
        self._file = file
        self.offset = offset  # position in the file of the next byte to take
        self._data = b""
        self._next = 0  # position in _data, so that small frames do not copy the rest again and again

    def available(self) -> bytes:
        """Return the buffered next bytes without taking them; empty only at the file's end."""
        return self._data[self._next :] or (self.peek(1) and self._data[self._next :])

    def peek(self, size: int, skip: int = 0) -> bytes:
        """Return `size` bytes after the next `skip`, without taking them; fewer only at the file's end."""
        while len(self._data) - self._next < skip + size and (more := self._file.read(READ_BYTES)):
            self._data = self._data[self._next :] + more
            self._next = 0
        return self._data[self._next + skip : self._next + skip + size]

    def has(self, size: int) -> bool:
        """Return whether at least `size` bytes are left."""
        return len(self._data) - self._next >= size or len(self.peek(size)) == size

    def take(self, size: int) -> bytes:
        """Take the next `size` bytes; fewer only at the file's end."""
        taken = self.peek(size)
        self.pass_over(len(taken))
        return taken

    def pass_over(self, size: int) -> None:
        """Skip `size` bytes that `peek` has returned."""
        self._next += size
        self.offset += size
