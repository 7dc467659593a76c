"""gzip members (RFC 1952) -> raw bytes, with their checksums checked. formats -> gzip."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from isal import isal_zlib

from shards.errors import ShardError

if TYPE_CHECKING:
    from shards.formats import OnEntry, Readable

MAGIC = b"\x1f\x8b"
CHUNK_BYTES = 1 << 17
MAX_OUTPUT_BYTES = 1 << 20  # a chunk of zeros unpacks a thousandfold
GZIP_WBITS = 16 + 15  # zlib's way to say: gzip header and trailer


def decode(file: Readable, path: str, entry: tuple[int, int], on_entry: OnEntry | None) -> Iterator[bytes]:
    """Yields raw bytes of all members from `entry` (a member's start) on. See `formats.decode`."""
    offset, raw_offset = entry
    data = file.read(CHUNK_BYTES)
    while data:
        if not data.strip(b"\0"):  # zero padding after the last member, as tape tools write it
            data = file.read(CHUNK_BYTES)
            continue
        if len(data) < len(MAGIC):
            data += file.read(CHUNK_BYTES)
        if not data.startswith(MAGIC):
            raise ShardError(
                f"{path}: byte {offset} should begin a gzip member but holds {data[:2].hex(' ')}; "
                f"the file is damaged after raw byte {raw_offset}, copy it again"
            )
        if on_entry:
            on_entry(offset, raw_offset)
        member = isal_zlib.decompressobj(wbits=GZIP_WBITS)
        while True:
            try:
                raw = member.decompress(data, MAX_OUTPUT_BYTES)
            except isal_zlib.error as error:
                raise ShardError(
                    f"{path}: damaged gzip data near byte {offset}, raw byte {raw_offset} ({error}); copy it again"
                ) from None
            rest = member.unused_data if member.eof else member.unconsumed_tail
            offset += len(data) - len(rest)
            raw_offset += len(raw)
            if raw:
                yield raw
            data = rest
            if member.eof:
                data = data or file.read(CHUNK_BYTES)
                break
            if not data and len(raw) < MAX_OUTPUT_BYTES and not (data := file.read(CHUNK_BYTES)):
                raise ShardError(
                    f"{path}: the file ends at byte {offset} inside a gzip member, after raw byte {raw_offset}; "
                    "it is truncated, copy it again"
                )
