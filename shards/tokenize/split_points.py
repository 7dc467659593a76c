"""Where texts can be cut without changing a single token id, decided from the model alone.

word_encoder -> split_points. A BPE model begins with characters (a user-defined symbol counts as one) and merges
neighbours, best score first, leftmost among equals, and only into pieces of its vocabulary. If no piece contains
character a followed by b, no merge and no symbol ever reaches from a to b. Then each side is independent of the other,
and the ids of a text are those of its parts, joined. Three things might still carry over from one part to the next:

- Unused pieces. A merge into one is undone at the end, in the way it was last proposed anywhere in the text. That way
  is the same everywhere: if two neighbours spell the piece, no merge has crossed the bounds of their text, so it was
  merged as if it stood alone; and alone, it is of two symbols just once, before the last merge.
- Consecutive unknown characters, which become a single token unless the model spells them in bytes. A model that does
  not is cut only beside a character that is a piece, and not an unused one.
- The normalizer. So cuts apply to normalized text, and nothing is normalized again.

A unigram model has no such cuts: SentencePiece sums scores in 32 bits from the beginning of the text, so which of two
nearly equal ways to split a word wins depends on how much text precedes it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from sentencepiece import sentencepiece_model_pb2

from shards.arrays import Ints
from shards.hashing import GOLDEN

SPACE = "\u2581"  # how a model writes " "
END = 0xFF  # separates texts; never a byte of UTF-8
LEAD = 4  # bytes that must precede the first place to cut
_SEEN_BITS = 20
MULTIPLIER = np.uint64(GOLDEN)
_BYTE_BITS = 8

_NEVER, _ALWAYS, _ASK = 0, 1, 2


class Cuts:
    """The places where normalized texts of one model may be cut.

    Such a text is spelled in UTF-8, with " " for U+2581 if the model writes spaces that way.
    """

    def __init__(self, model: sentencepiece_model_pb2.ModelProto) -> None:
        trainer = model.trainer_spec
        kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
        self._escaped: bool = model.normalizer_spec.escape_whitespaces
        self.obstacle: str | None = None  # the reason why no text may be cut
        if trainer.model_type != trainer.BPE:
            self.obstacle = f"it is a {trainer.ModelType.Name(trainer.model_type).lower()} model, not BPE"
            return
        # Pieces of other kinds never arise from text.
        arising = (kinds.NORMAL, kinds.USER_DEFINED, kinds.UNUSED)
        pieces = [self.spell(piece.piece) for piece in model.pieces if piece.type in arising]
        known = {self.spell(piece.piece) for piece in model.pieces if piece.type in arising[:2]}
        self._codes = _byte_codes(pieces, None if trainer.byte_fallback else known)
        self._seen = _seen_characters(pieces)

    def spell(self, normalized: str) -> str:
        """Spell a normalized text, or a piece, as it is searched for cuts."""
        return normalized.replace(SPACE, " ") if self._escaped else normalized

    def places(self, data: bytes, begin: int, end: int) -> Ints:
        """Return the places strictly between `begin` and `end` where texts can be cut: int64, rising.

        Args:
            data: spelled texts with END before, between and after them. LEAD - 1 bytes precede the first END, and LEAD
                follow the last.
        """
        pairs = np.ndarray((end - begin - 1,), "<u2", data, offset=begin, strides=(1,))
        codes = self._codes.take(pairs)
        places = np.flatnonzero(codes)
        unsure = codes.take(places) == _ASK
        places += begin + 1
        if unsure.any():
            keep = ~unsure
            keep[unsure] = ~self._together(data, places[unsure])
            places = places[keep]
        return places

    def _together(self, data: bytes, places: Ints) -> npt.NDArray[np.bool_]:
        """Return for each place whether some piece may contain the characters before and after it side by side."""
        fours = np.ndarray((len(data) - 3,), "<u4", data, strides=(1,))
        before, after = fours[places - LEAD], fours[places]
        # Of the four bytes before a place, keep those of the last character: from the last byte that begins one.
        begins = [(before >> np.uint32(_BYTE_BITS * i)) & np.uint32(0xC0) != 0x80 for i in (3, 2, 1)]
        before >>= np.select(begins, [np.uint32(_BYTE_BITS * i) for i in (3, 2, 1)], np.uint32(0)).astype(np.uint32)
        first = after & np.uint32(0xFF)
        bits = np.select([first < 0xC0, first < 0xE0, first < 0xF0], [24, 16, 8], 0).astype(np.uint32)
        after &= np.uint32(0xFFFFFFFF) >> bits
        return self._seen.take(_slots(before, after))


def _byte_codes(pieces: list[str], known: set[str] | None) -> npt.NDArray[np.uint8]:
    """Return uint8 [65536]: whether to cut between two bytes, indexed by their uint16, the first byte lowest.

    Args:
        known: pieces that are no unknown character where they stand alone; None = unknown ones are spelled in bytes.
    """
    cut = np.ones((256, 256), bool)
    data = np.frombuffer(bytes([END]).join(piece.encode() for piece in pieces), np.uint8)
    cut[data[:-1], data[1:]] = False  # pairs with END, which stand in no piece, are set below
    codes = np.where(cut, np.uint8(_ALWAYS), np.uint8(_NEVER))
    if known is None:
        # A piece contains these two bytes, but perhaps not these two characters. That is checked for characters of
        # three bytes and more, since their scripts are the ones written without spaces.
        wide = codes[0x80:, 0xE0:]
        wide[wide == _NEVER] = _ASK
    else:
        singles = {ord(piece) for piece in known if len(piece) == 1}
        unknown = np.array([byte not in singles or byte >= 0x80 for byte in range(256)])
        codes[np.ix_(unknown, unknown)] = _NEVER
    codes[:, 0x80:0xC0] = _NEVER  # inside a character
    codes[END] = codes[:, END] = _ALWAYS
    return np.ascontiguousarray(codes.T).reshape(-1)


def _seen_characters(pieces: list[str]) -> npt.NDArray[np.bool_]:
    """Return bool [2^_SEEN_BITS]: true in the slot of every two neighbours in a piece.

    Other pairs may share a slot, which only forbids a cut.
    """
    # Pairs outside _ASK's range are never looked up.
    pairs = {piece[i : i + 2] for piece in pieces if not piece.isascii() for i in range(len(piece) - 1)}
    codes = [[int.from_bytes(char.encode(), "little") for char in pair] for pair in pairs]
    before, after = np.array(codes, np.uint32).reshape(-1, 2).T
    seen = np.zeros(1 << _SEEN_BITS, bool)
    seen[_slots(before, after)] = True
    return seen


def _slots(before: npt.NDArray[np.uint32], after: npt.NDArray[np.uint32]) -> Ints:
    """Return the slots of pairs of characters, each given by its bytes in UTF-8, the first one lowest."""
    keys = before.astype(np.uint64) << np.uint64(32)
    keys |= after
    keys *= MULTIPLIER
    keys >>= np.uint64(64 - _SEEN_BITS)
    return keys.view(np.int64)
