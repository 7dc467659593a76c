"""Uncompressed JSON lines -> raw bytes. formats -> plain."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shards.formats import Readable

CHUNK_BYTES = 1 << 18


def decode(file: Readable) -> Iterator[bytes]:
    """Yields the file's bytes in chunks; any byte is an entry of its own."""
    while chunk := file.read(CHUNK_BYTES):
        yield chunk
