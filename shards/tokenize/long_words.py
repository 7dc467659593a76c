"""A word of any length -> token ids, part by part, in bounded memory and linear time.

word_encoder -> long_words -> split_points. SentencePiece takes some fifty bytes per character of a word, so a word of
200 MB would need 10 GB. The characters do not show where a word may be divided, but token ids can prove it:

A BPE model merges, among all neighbours whose joined text is a piece, those with the best score, the leftmost among
equals, until there are none. Let A's ids end with a, let B's ids begin with b, and let the ids of the text of a and b
together be a, b. Then the ids of A + B are those of A and those of B, joined. For suppose that some merge crosses the
boundary between two of these tokens, and take the first that does. Up to then, the text of these two tokens was merged
as if it stood alone, since no merge has crossed its bounds and the order of its own merges is the same. So this merge
would also be made there; but there the ids are these two tokens. (Two neighbours within A or B have this property since
they are neighbours in its ids.)

User-defined symbols are matched from left to right, the longest first, before all merges. A token boundary that is
farther from the end of A than the longest symbol is between symbols in A + B, too.

In a model with unused pieces, ids need not be what was merged: they prove nothing, and a word is encoded whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from shards.tokenize.split_points import Cuts

PART_BYTES = 1 << 17
_TRIALS = 64  # places to divide at that are tried before a part is doubled in length


class LongWords:
    """An encoder of long words for a BPE model, spelled as in `split_points`."""

    def __init__(
        self,
        processor: sentencepiece.SentencePieceProcessor,
        cuts: Cuts,
        model: sentencepiece_model_pb2.ModelProto,
        dtype: npt.DTypeLike,
    ) -> None:
        """Measure the model's pieces.

        Args:
            processor: the model's, one that does not normalize.
            dtype: dtype of ids.
        """
        self.processor, self._dtype = processor, dtype
        kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
        spelled = [len(cuts.spell(piece.piece).encode()) for piece in model.pieces]
        kept = (kinds.NORMAL, kinds.USER_DEFINED)
        # Bytes of text that an id stands for; 0 = not fixed
        self._sizes = [
            size if piece.type in kept else int(piece.type == kinds.BYTE)
            for piece, size in zip(model.pieces, spelled, strict=True)
        ]
        symbols = [size for piece, size in zip(model.pieces, spelled, strict=True) if piece.type == kinds.USER_DEFINED]
        self._margin = max(symbols, default=0)
        self._ids_prove = all(piece.type != kinds.UNUSED for piece in model.pieces)

    def encode(self, data: bytes, begin: int, end: int) -> list[npt.NDArray[np.integer]]:
        """Return the ids of data[begin:end], in consecutive arrays."""
        done: list[tuple[int, npt.NDArray[np.integer]]] = []  # (offset, ids) of each part
        stop = _character(data, begin + PART_BYTES, end)
        ids = self._ids(data, begin, stop)
        while stop < end:
            for count, place in self._places(data, ids, stop):
                next_stop = _character(data, max(place + PART_BYTES, stop + 1), end)
                following = self._ids(data, place, next_stop)
                if self._hold(data, place, ids[:count], following):
                    done.append((begin, ids[:count]))
                    begin, stop, ids = place, next_stop, following
                    break
            else:
                stop = _character(data, stop + (stop - begin), end)
                ids = self._ids(data, begin, stop)
                # The longer text may begin with another token, with which the part before it was not compared
                while done and not self._hold(data, begin, done[-1][1], ids):
                    begin, _ = done.pop()
                    ids = self._ids(data, begin, stop)
        return [*(part for _, part in done), ids]

    def _ids(self, data: bytes, begin: int, end: int) -> npt.NDArray[np.integer]:
        return self.processor.EncodeAsNumpy(data[begin:end]).astype(self._dtype)

    def _places(self, data: bytes, ids: npt.NDArray[np.integer], stop: int) -> Iterator[tuple[int, int]]:
        """Yield (ids before it, offset) for places between tokens of the text that ends at `stop`, the last first."""
        place, count, trials = stop, len(ids), 0
        while self._ids_prove and count and trials < _TRIALS and (size := self._sizes[ids[count - 1]]):
            count, place = count - 1, place - size
            if count and place <= stop - self._margin and _begins_character(data, place):
                trials += 1
                yield count, place

    def _hold(self, data: bytes, place: int, before: npt.NDArray[np.integer], after: npt.NDArray[np.integer]) -> bool:
        """Return whether the tokens on both sides of a place are also those of their text on its own."""
        first, last, num_before, num_after = place, place, 0, 0
        # A character that is no piece takes several tokens, one per byte
        while first == place or not _begins_character(data, first):
            num_before += 1
            if num_before > len(before) or not (size := self._sizes[before[-num_before]]):
                return False
            first -= size
        while last == place or (last < len(data) and not _begins_character(data, last)):
            num_after += 1
            if num_after > len(after) or not (size := self._sizes[after[num_after - 1]]):
                return False
            last += size
        expected = np.concatenate([before[len(before) - num_before :], after[:num_after]])
        return bool(np.array_equal(self._ids(data, first, last), expected))


def _begins_character(data: bytes, place: int) -> bool:
    return data[place] & 0xC0 != 0x80


def _character(data: bytes, place: int, end: int) -> int:
    """Find the first place from `place` on, up to `end`, where a character begins."""
    while place < end and not _begins_character(data, place):
        place += 1
    return min(place, end)
