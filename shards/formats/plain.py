"""Uncompressed JSON lines -> raw bytes. base -> plain -> formats."""

from __future__ import annotations

from collections.abc import Iterator

from shards.formats.base import READ_BYTES, Chunk, Readable, Start


def chunks(file: Readable, start: Start) -> Iterator[Chunk]:
    """Yield the file's bytes from `start` on; every byte is an entry."""
    offset = start.offset
    while data := file.read(READ_BYTES):
        yield Chunk(offset, offset, data, data, 0, False)
        offset += len(data)
