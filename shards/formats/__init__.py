"""Compressed shard -> raw bytes, from any entry.

zstd_blocks, base -> zstd, gzip, streams, plain -> formats -> decoders, shard_index. The file's first bytes decide the
compression, not its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath
from typing import Protocol

from shards.errors import ShardError
from shards.formats import gzip, plain, streams, zstd
from shards.formats.base import DECODE_ERRORS, Chunk, Readable, Start

__all__ = ["DECODE_ERRORS", "Chunk", "Peeked", "Readable", "Start", "chunks", "decode", "detect", "restart"]

MIN_DECODER_BYTES = 1 << 18  # memory of an open decoder: its buffers and gzip's history
WITH_SPLICES = ("zstd", "gzip")  # in which decoding can start inside a frame or member
MAX_HEADER_BYTES = 512  # of a file, which `detect` needs: a header of tar; others are shorter

_SHARD_START = Start()
_FOREIGN = {b"\x04\x22\x4d\x18": "lz4", b"PK\x03\x04": "zip"}
_SUFFIXES = (".zst", ".zstd", ".gz", ".xz", ".bz2")  # of names that promise compression
_PARQUET_MAGIC = b"PAR1"
_TAR_MAGIC, _TAR_MAGIC_OFFSET = b"ustar", 257


class Peeked:
    """A file whose first bytes have been read for inspection and are returned again by `read`."""

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
    """Detect a file's compression from its first bytes: "zstd", "gzip", "xz", "bzip2" or "plain".

    Raises: ShardError if the file is empty, in another format, or named as compressed but neither that nor JSON lines.
    """
    if not head:
        raise ShardError(f"{path}: the file is empty (0 bytes); copy it again, or take it out of the paths")
    if head.startswith(gzip.MAGIC):
        return "gzip"
    if zstd.starts_frame(head):
        return "zstd"
    if head.startswith(streams.XZ_MAGIC):
        return "xz"
    if head.startswith(streams.BZIP2_MAGIC):
        return "bzip2"
    if head.startswith(_PARQUET_MAGIC):
        raise ShardError(f"{path}: is Parquet, which is read under a name that ends in .parquet: rename it")
    if other := next((name for magic, name in _FOREIGN.items() if head.startswith(magic)), None):
        raise ShardError(
            f"{path}: is {other}; a shard is JSON lines, plain or compressed by zstd, gzip, xz or bzip2: convert it"
        )
    is_json = head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")
    if head[_TAR_MAGIC_OFFSET:].startswith(_TAR_MAGIC) and not is_json:
        raise ShardError(
            f"{path}: is a tar archive, whose files are not read: unpack it, and write its documents as JSON lines, an "
            'object with a "text" a line'
        )
    suffix = PurePath(path).suffix
    if suffix in _SUFFIXES and not is_json:
        raise ShardError(
            f"{path}: named {suffix}, but begins with the bytes {head[:4].hex(' ')}, which is neither zstd, gzip, xz, "
            "bzip2 nor JSON lines; the file is damaged, copy it again"
        )
    return "plain"


def chunks(
    file: Readable, compression: str, path: str, max_window: int, start: Start = _SHARD_START
) -> Iterator[Chunk]:
    """Yield what a shard's compressed bytes decode to, from a given place to the file's end.

    Args:
        file: positioned at the start's compressed offset.
        compression: what `detect` returned for the file's first bytes.
        path: for error messages.
        max_window: bytes of decoder window allowed (zstd and xz).
        start: the start of a frame or member, or a place inside one.
    Raises: ShardError where the bytes are damaged or end too soon, naming file and raw offset.
    """
    if compression == "zstd":
        return zstd.chunks(file, path, max_window, start)
    if compression == "gzip":
        return gzip.chunks(file, path, start)
    if compression in ("xz", "bzip2"):
        return streams.chunks(file, compression, path, max_window, start)
    assert compression == "plain", compression
    return plain.chunks(file, start)


def decode(
    file: Readable, compression: str, path: str, max_window: int, start: Start = _SHARD_START
) -> Iterator[bytes]:
    """Yield the raw bytes of a shard in parts, none empty. Args, Raises: as `chunks`."""
    return (chunk.raw for chunk in chunks(file, compression, path, max_window, start) if chunk.raw)


class Decompressor(Protocol):
    """A streaming decompressor."""

    def decompress(self, data: bytes, /) -> bytes: ...


def restart(compression: str, start: Start) -> Decompressor:
    """Make a decompressor that resumes inside a frame or member, as `chunks` does there."""
    return (zstd if compression == "zstd" else gzip).restart(start.history, start.state)
