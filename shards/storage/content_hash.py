"""The hash that identifies content: xxh3-128 of bytes, in hex."""

from __future__ import annotations

from pathlib import Path

import xxhash

from shards.formats import Readable

READ_BYTES = 8 << 20


def hash_file(path: Path) -> str:
    """Hash a file's content: xxh3-128, in hex. Raises: OSError if it cannot be read."""
    with path.open("rb", buffering=0) as file:
        return hash_stream(file)


def hash_stream(file: Readable) -> str:
    """Hash the rest of a file: xxh3-128, in hex."""
    found = xxhash.xxh3_128()
    while data := file.read(READ_BYTES):
        found.update(data)
    return found.hexdigest()
