"""A splice point's window, thinned to the bytes that are referred to from there on.

formats -> thinning -> splice_points. That is a few percent of it; with zeros in place of the rest, a window packs to a
fifth of its size or less. References are not parsed but seen. Decoding only copies and inserts: if each grain of the
window is changed (XOR) by a mark of its own, each byte comes out changed by the mark of the grain that it was copied
from, over any number of copies in between, and a byte that was inserted comes out as it is. Source of the idea, for
gzip: Knespel, Brunst 2023, "Rapidgzip", HPDC '23.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from shards import formats
from shards.formats import Piece, Start

Bytes = npt.NDArray[np.uint8]

MARKS = (1 << 16) - 1  # 1 and up: two digits of a byte, each in a window of its own


class Follower:
    """Decodes a shard's pieces from a splice point on, beside the decoding of the whole shard."""

    def __init__(self, compression: str, start: Start) -> None:
        self._decompressor = formats.restart(compression, start)
        self._ahead = b""  # of the next piece: gzip data may give out what it holds with the piece after

    def follow(self, piece: Piece) -> bytes:
        """As many bytes as the piece has raw ones, the next that decoding from here gives; fewer if it gives no more.

        Raises: one of DECODE_ERRORS if the piece cannot be decoded.
        """
        got = self._ahead + self._decompressor.decompress(piece.data)
        self._ahead = got[len(piece.raw) :]
        return got[: len(piece.raw)]

    def holds(self, pieces: Sequence[Piece]) -> bool:
        """Decodes the next pieces; False if that does not give their raw bytes."""
        try:
            return all(self.follow(piece) == piece.raw for piece in pieces)
        except formats.DECODE_ERRORS:
            return False


def thinned(compression: str, start: Start, pieces: Sequence[Piece]) -> memoryview:
    """A splice point's window with zeros for all that the pieces do not refer to.

    There are 65,535 marks, so it is kept in grains: of 1 byte in windows of 32 KiB, of 33 in those of 2 MiB.

    Args:
        pieces: those that follow the start, with as many raw bytes as the window has: what comes after them cannot
            refer to it. Where decoding does not give their raw bytes, the result is of no use, which decoding from it
            shows.
    Raises: one of DECODE_ERRORS if they cannot be decoded from there.
    """
    window = np.frombuffer(start.window, np.uint8)
    grain_bytes = -(-len(window) // MARKS)
    marks = np.arange(1, -(-len(window) // grain_bytes) + 1, dtype=np.uint16)  # of the grains

    def spread(grains: Bytes) -> Bytes:
        return np.repeat(grains, grain_bytes)[: len(window)]

    def changes(digits: Bytes) -> Iterator[Bytes]:
        """For each piece, by what its raw bytes differ if those of the window differ by these digits."""
        follower = Follower(compression, start._replace(window=(window ^ spread(digits)).data))
        left = pieces[0].window  # raw bytes that can refer to it
        for piece in pieces:
            output = follower.follow(piece)[:left]
            yield np.frombuffer(output, np.uint8) ^ np.frombuffer(piece.raw, np.uint8)[: len(output)]
            left -= len(output)

    seen = np.zeros(1 << 16, np.uint8)  # by mark; 0 is what was not copied from the window
    # The one after the other: two decoders in turns push each other's windows out of the cache.
    low, high = (list(changes(digits.astype(np.uint8))) for digits in (marks & 255, marks >> 8))
    for first, second in zip(low, high, strict=True):
        copied = second.astype(np.uint16)
        copied <<= 8
        copied |= first
        seen[copied.astype(np.intp)] = 1
    return (window * spread(seen[marks])).data
