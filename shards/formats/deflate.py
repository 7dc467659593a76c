"""Find where a deflate block begins in gzip data whose decoded bytes are known. gzip -> deflate -> splice_points.

Blocks are not marked and may begin at any bit. Nearly all have dynamic Huffman codes (RFC 1951, section 3.2.7); bits
that cannot be the header of such a block are ruled out by arithmetic on all of them at once, and decoding is tried from
the few that remain: a false one fails within a few bytes, or gives bytes other than the known ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from shards.formats import gzip
from shards.formats.base import DECODE_ERRORS, Start

_STEP_BYTES = 1 << 13  # bytes searched at a time; blocks are 20 to 40 KiB
_HEADER_BITS = 17 + 19 * 3  # BFINAL to HCLEN, and the longest list of code length lengths


def find_starts(
    data: bytes, raw: bytes, before: bytes, offset: int, raw_offset: int, search_bytes: int
) -> Iterator[Start]:
    """Yield, in order, places from which `data` decodes; the caller keeps one if that yields the end of `raw`.

    Args:
        data: compressed bytes inside one member.
        raw: everything they decode to; `before`: the bytes before that.
        offset, raw_offset: of `data` and `raw` in the shard.
        search_bytes: bytes of `data` to search.
    """
    for first in range(0, min(search_bytes, len(data)), _STEP_BYTES):
        part = np.frombuffer(data[first : first + _STEP_BYTES + _HEADER_BITS // 8 + 1], np.uint8)
        for bit in _dynamic_headers(part, _STEP_BYTES * 8):
            at = first + bit // 8
            state = gzip.restart_state(bit % 8, data[at])
            length = _decoded_bytes(data[at + 1 :], state)
            if length is not None and length <= len(raw):
                split = len(raw) - length
                history = (before + raw[:split])[-gzip.HISTORY_BYTES :]
                yield Start(offset + at + 1, raw_offset + split, history, state)


def _decoded_bytes(data: bytes, state: int) -> int | None:
    """Count the bytes that `data` decodes to, whatever its history; None if it cannot be decoded."""
    try:
        member = gzip.restart(bytes(gzip.HISTORY_BYTES), state)
        length = len(member.decompress(data))
    except DECODE_ERRORS:
        return None
    return None if member.eof else length


def _dynamic_headers(data: npt.NDArray[np.uint8], limit: int) -> list[int]:
    """Find the bits below `limit` at which the header of a dynamic, non-final block may begin."""
    bits = np.unpackbits(data, bitorder="little")
    count = min(limit, len(bits) - _HEADER_BITS)
    if count <= 0:
        return []

    def at(shift: int) -> npt.NDArray[np.uint8]:
        return bits[shift : shift + count]

    # BFINAL=0, BTYPE=10 (low bit first); HLIT and HDIST may not be 30 or 31.
    fits = (at(0) | at(1) | at(2) ^ 1) == 0
    fits &= (at(4) & at(5) & at(6) & at(7)) == 0
    fits &= (at(9) & at(10) & at(11) & at(12)) == 0
    found = np.flatnonzero(fits)
    lengths = sum((bits[found + 13 + i].astype(np.int32) << i for i in range(4)), np.zeros(len(found), np.int32)) + 4
    # The code of the code lengths must be complete: sum of 2^-length = 1.
    total = np.zeros(len(found), np.int32)
    for i in range(19):
        triple = found + 17 + 3 * i
        length = bits[triple] | bits[triple + 1] << 1 | bits[triple + 2] << 2
        total += np.where((length > 0) & (i < lengths), 128 >> length.astype(np.int32), 0)
    return [int(bit) for bit in found[total == 128]]
