"""Compressed shard -> raw bytes, from any entry. index and reader -> formats -> zstd, gzip, plain.

The compression is told by the file's first bytes, not by its name.
"""

from collections.abc import Callable, Iterator
from pathlib import PurePath
from typing import Protocol

from shards.errors import ShardError
from shards.formats import gzip, plain, zstd

MIN_DECODER_BYTES = 1 << 18  # buffers, and the window of gzip

OnEntry = Callable[[int, int, int], None]  # (compressed offset, raw offset, bytes of window) of a place to start from


class Readable(Protocol):
    """The one method that decoding needs of a file."""

    def read(self, size: int, /) -> bytes: ...


class Peeked:
    """A file whose first bytes were read to look at them, and which gives them out once more."""

    def __init__(self, file: Readable, size: int) -> None:
        self._file = file
        self.head = file.read(size)
        self._left = self.head

    def read(self, size: int, /) -> bytes:
        if self._left:
            part, self._left = self._left[:size], self._left[size:]
            return part
        return self._file.read(size)


def detect(head: bytes, path: str) -> str:
    """Which compression a file has, from its first bytes: "zstd", "gzip" or "plain".

    Raises: ShardError if the file is empty, or is named as compressed but is neither that nor JSON lines.
    """
    if not head:
        raise ShardError(f"{path}: the file is empty (0 bytes); copy it again, or take it out of the paths")
    if head.startswith(gzip.MAGIC):
        return "gzip"
    if zstd.starts_frame(head):
        return "zstd"
    suffix = PurePath(path).suffix
    if suffix in (".zst", ".gz") and not head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
        raise ShardError(
            f"{path}: named {suffix}, but begins with the bytes {head[:4].hex(' ')}, which is neither zstd, gzip nor "
            "JSON lines; the file is damaged, copy it again"
        )
    return "plain"


def decode(
    file: Readable,
    compression: str,
    path: str,
    max_window: int,
    entry: tuple[int, int] = (0, 0),
    on_entry: OnEntry | None = None,
) -> Iterator[bytes]:
    """Yields the raw bytes of a shard in chunks, from an entry to the file's end.

    Args:
        file: stands at the entry's compressed offset.
        compression: what `detect` said of the file's first bytes.
        path: for error messages.
        max_window: bytes of decoder window that may be needed (zstd only).
        entry: (compressed offset, raw offset) where the file stands.
        on_entry: called with each frame's or member's start, and the window it needs, as it is met.
    Raises: ShardError where the bytes are damaged or end too soon, naming file and raw offset.
    """
    if compression == "zstd":
        return zstd.decode(file, path, max_window, entry, on_entry)
    if compression == "gzip":
        return gzip.decode(file, path, entry, on_entry)
    assert compression == "plain", compression
    return plain.decode(file)
