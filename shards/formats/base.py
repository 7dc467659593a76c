"""What the formats share: the file they read, where they start, the chunks they give. base -> zstd, gzip, plain."""

from __future__ import annotations

from typing import NamedTuple, Protocol, cast

import zstandard
from isal import isal_zlib

READ_BYTES = 1 << 17  # read at a time
# The stub of isal calls the class an instance.
DECODE_ERRORS = (zstandard.ZstdError, cast(type[Exception], isal_zlib.error))


class Readable(Protocol):
    """The one method that decoding needs of a file."""

    def read(self, size: int, /) -> bytes: ...


class Start(NamedTuple):
    """A place from which decoding can start: by itself where a frame begins, else with what stands before it."""

    offset: int = 0  # in the compressed file
    raw_offset: int = 0
    history: bytes | memoryview = b""  # raw bytes before it, that what follows may refer to; b"" where a frame begins
    state: int = 0  # inside a frame or member, what else its format must know: for `restart`


class Chunk(NamedTuple):
    """Compressed bytes that follow those of the chunk before, and what they decode to."""

    offset: int  # in the compressed file, of `data`
    raw_offset: int  # of `raw`
    data: bytes
    raw: bytes  # at most 1 MiB; b"" for a frame's or member's header
    history_bytes: int  # how far back the frame or member may refer, raw
    begins: bool  # `data` begins a frame or member, so that decoding can start here


class Input:
    """Compressed bytes with a position, read in chunks."""

    def __init__(self, file: Readable, offset: int) -> None:
        self._file = file
        self.offset = offset  # in the file, of the next byte that `take` gives
        self._data = b""
        self._next = 0  # position in _data: small frames must not copy what follows them again and again

    def available(self) -> bytes:
        """Return the next bytes without taking them, as many as are at hand; none only at the file's end."""
        return self._data[self._next :] or (self.peek(1) and self._data[self._next :])

    def peek(self, size: int, skip: int = 0) -> bytes:
        """Return `size` bytes after the next `skip`, without taking them; fewer only at the file's end."""
        while len(self._data) - self._next < skip + size and (more := self._file.read(READ_BYTES)):
            self._data = self._data[self._next :] + more
            self._next = 0
        return self._data[self._next + skip : self._next + skip + size]

    def has(self, size: int) -> bool:
        """Tell whether at least `size` bytes are left."""
        return len(self._data) - self._next >= size or len(self.peek(size)) == size

    def take(self, size: int) -> bytes:
        """Take the next `size` bytes; fewer only at the file's end."""
        taken = self.peek(size)
        self.pass_over(len(taken))
        return taken

    def pass_over(self, size: int) -> None:
        """Leave out `size` bytes that `peek` has shown."""
        self._next += size
        self.offset += size
