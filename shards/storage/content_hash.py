"""The hash that tells one content from another: xxh3-128 of bytes, in hex."""

from __future__ import annotations

from pathlib import Path

import xxhash

from shards.formats import Readable

READ_BYTES = 8 << 20


def hash_file(path: Path) -> str:
    """xxh3-128 of a file's content, in hex. Raises: OSError if it cannot be read."""
    with path.open("rb", buffering=0) as file:
        return hash_stream(file)


def hash_stream(file: Readable) -> str:
    """xxh3-128 of what is left to read of a file, in hex."""
    found = xxhash.xxh3_128()
    while data := file.read(READ_BYTES):
        found.update(data)
    return found.hexdigest()
