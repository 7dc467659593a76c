"""A splice point's history, thinned to the bytes that are referred to from there on.

formats -> thinning -> splice_points. That is a few percent of it; with zeros in place of the rest, a history packs to a
fifth of its size or less. References are not parsed but seen. Decoding only copies and inserts: if each grain of the
history is changed (XOR) by a mark of its own, each byte comes out changed by the mark of the grain that it was copied
from, over any number of copies in between, and a byte that was inserted comes out as it is. Source of the idea, for
gzip: Knespel, Brunst 2023, "Rapidgzip", HPDC '23.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from shards import formats
from shards.formats import Chunk, Start

Bytes = npt.NDArray[np.uint8]

_MARKS = (1 << 16) - 1  # 1 and up: two digits of a byte, each in a separate history


class Follower:
    """Decodes a shard's chunks from a splice point on, beside the decoding of the whole shard."""

    def __init__(self, compression: str, start: Start) -> None:
        self._decompressor = formats.restart(compression, start)
        self._ahead = b""  # of the next chunk: gzip data may give out what it holds with the chunk after

    def follow(self, chunk: Chunk) -> bytes:
        """Return the next bytes that decoding from here gives, as many as the chunk has raw ones if there are.

        Raises: one of DECODE_ERRORS if the chunk cannot be decoded.
        """
        got = self._ahead + self._decompressor.decompress(chunk.data)
        self._ahead = got[len(chunk.raw) :]
        return got[: len(chunk.raw)]

    def holds(self, chunks: Sequence[Chunk]) -> bool:
        """Decode the next chunks; False if that does not give their raw bytes."""
        try:
            return all(self.follow(chunk) == chunk.raw for chunk in chunks)
        except formats.DECODE_ERRORS:
            return False


def thinned(compression: str, start: Start, chunks: Sequence[Chunk]) -> memoryview:
    """Replace all that the chunks do not refer to in a splice point's history by zeros.

    There are 65,535 marks, so it is divided into grains: of 1 byte in histories of 32 KiB, of 33 in those of 2 MiB.

    Args:
        chunks: those that follow the start, with as many raw bytes as the history has: what comes after them cannot
            refer to it. Where decoding does not give their raw bytes, the result is of no use, which decoding from it
            shows.
    Raises: one of DECODE_ERRORS if they cannot be decoded from there.
    """
    history = np.frombuffer(start.history, np.uint8)
    grain_bytes = -(-len(history) // _MARKS)
    marks = np.arange(1, -(-len(history) // grain_bytes) + 1, dtype=np.uint16)  # of the grains

    def spread(grains: Bytes) -> Bytes:
        return np.repeat(grains, grain_bytes)[: len(history)]

    def changes(digits: Bytes) -> Iterator[Bytes]:
        """Yield for each chunk by what its raw bytes differ if those of the history differ by these digits."""
        follower = Follower(compression, start._replace(history=(history ^ spread(digits)).data))
        left = chunks[0].history_bytes  # raw bytes that can refer to it
        for chunk in chunks:
            output = follower.follow(chunk)[:left]
            yield np.frombuffer(output, np.uint8) ^ np.frombuffer(chunk.raw, np.uint8)[: len(output)]
            left -= len(output)

    seen = np.zeros(1 << 16, np.uint8)  # by mark; 0 is what was not copied from the history
    # The one after the other: two decoders in turns push each other's histories out of the cache.
    low, high = (list(changes(digits.astype(np.uint8))) for digits in (marks & 255, marks >> 8))
    for first, second in zip(low, high, strict=True):
        copied = second.astype(np.uint16)
        copied <<= 8
        copied |= first
        seen[copied.astype(np.intp)] = 1
    return (history * spread(seen[marks])).data
