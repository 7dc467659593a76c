"""Uncompressed JSON lines -> raw bytes. base -> plain -> formats."""

from collections.abc import Iterator

from shards.formats.base import CHUNK_BYTES, Piece, Readable, Start


def pieces(file: Readable, start: Start) -> Iterator[Piece]:
    """Yields the file's bytes from `start` on; any byte is an entry of its own."""
    offset = start.offset
    while chunk := file.read(CHUNK_BYTES):
        yield Piece(offset, offset, chunk, chunk, 0, False)
        offset += len(chunk)
