"""A splice point's history, thinned to the bytes that later data refers to. formats -> thinning -> splice_points.

Only a few percent of a history is referred to; with zeros in place of the rest, it packs to a fifth of its size or
less. References are not parsed but observed. Decoding only copies and inserts: if each grain of the history is changed
(XOR) by a mark of its own, each output byte is changed by the mark of the grain that it was copied from, over any
number of intermediate copies, and an inserted byte is unchanged. Source of the idea, for gzip: Knespel, Brunst 2023,
"Rapidgzip", HPDC '23.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from shards import formats
from shards.formats import Chunk, Start

Bytes = npt.NDArray[np.uint8]

_MARKS = (1 << 16) - 1  # counted from 1: the two bytes of a mark are each applied to a separate history


class Follower:
    """A decoder of a shard's chunks from a splice point on, beside the decoding of the whole shard."""

    def __init__(self, compression: str, start: Start) -> None:
        self._decompressor = formats.restart(compression, start)
        self._ahead = b""  # output beyond the last chunk: gzip may hold output back until the next chunk

    def follow(self, chunk: Chunk) -> bytes:
        """Return the next bytes decoded from here, as many as the chunk's raw bytes if there are enough.

        Raises: one of DECODE_ERRORS if the chunk cannot be decoded.
        """
        got = self._ahead + self._decompressor.decompress(chunk.data)
        self._ahead = got[len(chunk.raw) :]
        return got[: len(chunk.raw)]

    def holds(self, chunks: Sequence[Chunk]) -> bool:
        """Decode the next chunks; return False if that does not give their raw bytes."""
        try:
            return all(self.follow(chunk) == chunk.raw for chunk in chunks)
        except formats.DECODE_ERRORS:
            return False


def thinned(compression: str, start: Start, chunks: Sequence[Chunk]) -> memoryview:
    """Replace everything in a splice point's history that the chunks do not refer to by zeros.

    There are only 65,535 marks, so a history is divided into grains: of 1 byte for 32 KiB, of 33 bytes for 2 MiB.

    Args:
        chunks: the chunks that follow the start, with as many raw bytes as the history has, since nothing after them
            can refer to it. If decoding does not give their raw bytes, the result is useless, as decoding from it
            will show.
    Raises: one of DECODE_ERRORS if they cannot be decoded from there.
    """
    history = np.frombuffer(start.history, np.uint8)
    grain_bytes = -(-len(history) // _MARKS)
    marks = np.arange(1, -(-len(history) // grain_bytes) + 1, dtype=np.uint16)  # one per grain

    def spread(grains: Bytes) -> Bytes:
        return np.repeat(grains, grain_bytes)[: len(history)]

    def changes(digits: Bytes) -> Iterator[Bytes]:
        """Yield, for each chunk, how its raw bytes change if the history is changed by these digits."""
        follower = Follower(compression, start._replace(history=(history ^ spread(digits)).data))
        left = chunks[0].history_bytes  # raw bytes that can still refer to it
        for chunk in chunks:
            output = follower.follow(chunk)[:left]
            yield np.frombuffer(output, np.uint8) ^ np.frombuffer(chunk.raw, np.uint8)[: len(output)]
            left -= len(output)

    seen = np.zeros(1 << 16, np.uint8)  # by mark; mark 0 means not copied from the history
    # One pass after the other, since alternating decoders evict each other's histories from the cache.
    low, high = (list(changes(digits.astype(np.uint8))) for digits in (marks & 255, marks >> 8))
    for first, second in zip(low, high, strict=True):
        copied = second.astype(np.uint16)
        copied <<= 8
        copied |= first
        seen[copied.astype(np.intp)] = 1
    return (history * spread(seen[marks])).data
