"""A splice point's window, thinned to the bytes that are referred to from there on. formats -> thinning -> splice.

That is a few percent of it; with zeros in place of the rest, a window packs to a fifth of its size or less. References
are not parsed but seen: decoding does the same whatever the window holds, so what it makes of a window of marks tells
where each byte was copied from, over any number of copies in between.
Source of the idea, for gzip: Knespel, Brunst 2023, "Rapidgzip", HPDC '23.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from shards import formats
from shards.formats import Piece, Start

Bytes = npt.NDArray[np.uint8]

# A mark has two digits, each in a window of its own. The lower is never 0, so that no byte stays what it is.
LOW, HIGH = 255, 256


class Follower:
    """Decodes a shard's pieces from a splice point on, beside the decoding of the whole shard."""

    def __init__(self, compression: str, start: Start) -> None:
        self._decompressor = formats.restart(compression, start)
        self._ahead = b""  # of the next piece: gzip data may give out what it holds with the piece after

    def follow(self, piece: Piece) -> bytes:
        """What stands here for the piece's raw bytes, and as many, unless that cannot be had.

        Raises: one of DECODE_ERRORS if the piece cannot be decoded.
        """
        got = self._ahead + self._decompressor.decompress(piece.data)
        self._ahead = got[len(piece.raw) :]
        return got[: len(piece.raw)]


def thinned(compression: str, start: Start, pieces: Sequence[Piece]) -> memoryview:
    """A splice point's window with zeros for all that the pieces do not refer to.

    There are 65,280 marks, so it is kept in grains: of 1 byte in windows up to 64 KiB, of 33 in those of 2 MiB.

    Args:
        pieces: those that follow the start, which decoding from there gives the raw bytes of. As many raw bytes as the
            window has: what comes after them cannot refer to it.
    Raises: one of DECODE_ERRORS if they cannot be decoded from there.
    """
    window = np.frombuffer(start.window, np.uint8)
    grain_bytes = -(-len(window) // (LOW * HIGH))
    number = np.arange(-(-len(window) // grain_bytes))
    low, high = (number % LOW + 1).astype(np.uint8), (number // LOW).astype(np.uint8)

    def spread(grains: Bytes) -> Bytes:
        return np.repeat(grains, grain_bytes)[: len(window)]

    def changes(digits: Bytes) -> Iterator[Bytes]:
        """For each piece, by what its raw bytes differ if those of the window differ by these digits."""
        follower = Follower(compression, start._replace(window=(window ^ spread(digits)).data))
        for piece in pieces:
            output = follower.follow(piece)
            yield np.frombuffer(output, np.uint8) ^ np.frombuffer(piece.raw, np.uint8)[: len(output)]

    seen = np.zeros(1 << 16, np.uint8)  # by mark; 0 is what was not copied from the window
    # The one after the other: two decoders in turns push each other's windows out of the cache.
    for first, second in zip(*(list(changes(digits)) for digits in (low, high)), strict=True):
        marks = second.astype(np.uint16)
        marks <<= 8
        marks |= first
        seen[marks.astype(np.intp)] = 1
    return (window * spread(seen[high.astype(np.intp) << 8 | low])).data
