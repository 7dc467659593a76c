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
WINDOW_BYTES = 1 << 15
GZIP_WBITS = 16 + 15  # zlib's way to say: gzip header and trailer


def decode(file: Readable, path: str, entry: tuple[int, int], on_entry: OnEntry | None) -> Iterator[bytes]:
    """Yields raw bytes of all members from `entry` (a member's start) on. See `formats.decode`."""
    offset, raw_offset = entry
    data = file.read(CHUNK_BYTES)
    while data:
        member_data = data.lstrip(b"\0")  # zeros may pad a member, as tape tools do
        offset += len(data) - len(member_data)
        if len(member_data) < len(MAGIC) and (more := file.read(CHUNK_BYTES)):
            data = member_data + more
            continue
        data = member_data
        if not data:
            return
        if not data.startswith(MAGIC):
            raise ShardError(
                f"{path}: byte {offset} should begin a gzip member but holds {data[:2].hex(' ')}; "
                f"the file is damaged after raw byte {raw_offset}, copy it again"
            )
        if on_entry:
            on_entry(offset, raw_offset, WINDOW_BYTES)
        member = isal_zlib.decompressobj(wbits=GZIP_WBITS)
        while True:
            try:
                raw = member.decompress(data, MAX_OUTPUT_BYTES)
            except isal_zlib.error as error:  # type: ignore[misc]  # the stub calls the class an instance
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
