"""gzip members (RFC 1952) -> raw bytes, with their checksums checked. base -> gzip -> formats.

Decoding can start inside a member where a deflate block (RFC 1951) begins, given the 32 KiB before it. A block may
begin at any bit of a byte, so made-up empty blocks lead up to that bit.
"""

from __future__ import annotations

from collections.abc import Iterator

from isal import isal_zlib

from shards.errors import DamageError
from shards.formats.base import DECODE_ERRORS, Chunk, Input, Readable, Start

MAGIC = b"\x1f\x8b"
MAX_OUTPUT_BYTES = 1 << 20  # without a limit, zeros would unpack a thousandfold
HISTORY_BYTES = 1 << 15
_TRAILER_BYTES = 8  # CRC-32 and size of a member
_GZIP_WBITS = 16 + 15  # zlib's code for a gzip header and trailer
_DEFLATE_WBITS = -15  # neither

# Empty blocks, as bits in stream order. RFC 1951, section 3.2.6: a fixed block is BFINAL=0, BTYPE=01 and the
# end-of-block code 0000000. Section 3.2.7: a dynamic block with an odd number of bits is BFINAL=0, BTYPE=10, HLIT=0,
# HDIST=0, HCLEN=14; length 1 for the code lengths 18 (3rd of them) and 1 (18th), 0 for the others; 138 and 117 zeros,
# a 1 each for literal 255, the end code and a distance; the end code.
_EMPTY_FIXED = "010" + "0000000"
_EMPTY_DYNAMIC = (
    "001" + "00000" + "00000" + "0111"
    + "000" * 2 + "100" + "000" * 14 + "100"
    + "1" + f"{138 - 11:07b}"[::-1] + "1" + f"{117 - 11:07b}"[::-1] + "000"
    + "1"
)  # fmt: skip


def restart_state(bits: int, first: int) -> int:
    """Return `Start.state` for a block that begins inside a byte and continues in the bytes after it.

    Args:
        bits: bits of that byte that belong to the block before, 0 to 7.
        first: that byte.
    """
    return first << 3 | bits


def restart(history: bytes | memoryview, state: int) -> isal_zlib.Decompress:
    """Make a decompressor that takes the bytes after the byte in which a block inside a member begins.

    Args:
        history: 32 KiB of raw bytes before the block, or all that the member has.
        state: from `restart_state`.
    """
    first, before = state >> 3, state & 7
    bits = _EMPTY_DYNAMIC * (before % 2)
    bits += _EMPTY_FIXED * ((before - len(bits)) // 2 % 4)
    bits += f"{first:08b}"[::-1][before:]
    assert len(bits) % 8 == 0, (len(bits), before)
    member = isal_zlib.decompressobj(wbits=_DEFLATE_WBITS, zdict=history)
    member.decompress(bytes(int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8)))
    return member


def chunks(file: Readable, path: str, start: Start) -> Iterator[Chunk]:
    """Yield the chunks of all members from `start` on; see `formats.chunks`."""
    source = Input(file, start.offset)
    raw_offset = start.raw_offset
    if start.history:
        for chunk in _member(source, path, restart(start.history, start.state), raw_offset):
            raw_offset = chunk.raw_offset + len(chunk.raw)
            yield chunk
        if len(source.take(_TRAILER_BYTES)) < _TRAILER_BYTES:
            raise _truncated(source, path, raw_offset)
    while head := _head_of_member(source):
        if head != MAGIC:
            raise DamageError(
                f"{path}: byte {source.offset} should begin a gzip member but holds {head.hex(' ')}; "
                f"the file is damaged after raw byte {raw_offset}, copy it again"
            )
        yield Chunk(source.offset, raw_offset, b"", b"", HISTORY_BYTES, True)
        for chunk in _member(source, path, isal_zlib.decompressobj(wbits=_GZIP_WBITS), raw_offset):
            raw_offset = chunk.raw_offset + len(chunk.raw)
            yield chunk


def _head_of_member(source: Input) -> bytes:
    """Peek at the next member's first two bytes, past the zeros that tape tools append; b"" at the file's end."""
    while data := source.available():
        member_data = data.lstrip(b"\0")
        source.pass_over(len(data) - len(member_data))
        if member_data:
            return source.peek(len(MAGIC))
    return b""


def _member(source: Input, path: str, member: isal_zlib.Decompress, raw_offset: int) -> Iterator[Chunk]:
    """Yield the chunks of the rest of a member, from the next byte of `source` on."""
    raw = b""
    while not member.eof:
        data = source.available()
        if not data and len(raw) < MAX_OUTPUT_BYTES:
            raise _truncated(source, path, raw_offset)
        try:
            raw = member.decompress(data, MAX_OUTPUT_BYTES)
        except DECODE_ERRORS as error:
            raise DamageError(
                f"{path}: damaged gzip data near byte {source.offset}, raw byte {raw_offset} ({error}); copy it again"
            ) from None
        rest = member.unused_data if member.eof else member.unconsumed_tail
        taken = data[: len(data) - len(rest)]
        yield Chunk(source.offset, raw_offset, taken, raw, HISTORY_BYTES, False)
        source.pass_over(len(taken))
        raw_offset += len(raw)


def _truncated(source: Input, path: str, raw_offset: int) -> DamageError:
    return DamageError(
        f"{path}: the file ends at byte {source.offset} inside a gzip member, after raw byte {raw_offset}; "
        "it is truncated, copy it again"
    )
