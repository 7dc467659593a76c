"""Texts in a comparable form, in which differences that do not distinguish two copies are removed.

normalization -> decontaminate. Copies of a text differ in how their characters are encoded (NFC or NFD, wide or narrow
forms, ligatures), in case, in typographic or plain quotes and dashes, in kinds of white space, and in invisible
characters.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shards.arrays import Hashes
from shards.hashing import GOLDEN, mixed

# Soft hyphens, joiners, direction marks, variation selectors, byte order marks
_UNSEEN = re.compile("[\u00ad\u034f\u061c\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff]")
_ACUTE = re.compile("[\u00b4\u1ffd]")  # used as an apostrophe, though NFKC makes it a space with an accent
_FOLDS = {
    old: new
    for new, others in {
        "'": "\u2018\u2019\u201a\u201b\u2032\u2035\u2039\u203a\u02b9\u02bb\u02bc\u02bd",
        '"': "\u201c\u201d\u201e\u201f\u2033\u2036\u00ab\u00bb\u301d\u301e\u301f",
        "-": "\u2010\u2011\u2012\u2013\u2014\u2015\u2043\u2212\u2e3a\u2e3b\u301c",
        " ": "\u1680",
        "\n": "\r\v\f\x1c\x1d\x1e\u0085\u2028\u2029",  # line ends for `str.splitlines`
    }.items()
    for old in others
}
_TO_FOLD = re.compile(f"[{re.escape(''.join(_FOLDS))}]")
_NO_CHARACTER = "\uffff"  # never a character, so it can separate texts
_ASCII_FOLDS = [(old, new) for old, new in _FOLDS.items() if old.isascii()]

# Han and Kana, which are written without spaces between words
_SINGLES = (
    (0x3005, 0x3007),
    (0x3040, 0x30FF),
    (0x31F0, 0x31FF),
    (0x3400, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x323AF),
)
NUM_CHARACTERS = 0x323B1  # covers all scripts; beyond are invisible and private-use characters

BLOCK_CHARACTERS = 1 << 18  # characters handled at a time, since numpy's temporaries take many times that

BETWEEN, LETTER, SINGLE = 0, 1, 2


def comparable(texts: Sequence[str]) -> list[str]:
    """Convert each text to NFKC with case folded, quotes and dashes plain, and every line end a line feed."""
    found = [_comparable_ascii(text) if text.isascii() else "" for text in texts]
    wide = [i for i, text in enumerate(texts) if not text.isascii()]
    # All at once, since numpy is slow on many short texts
    joined = _NO_CHARACTER.join(texts[i].replace(_NO_CHARACTER, "") for i in wide)
    if wide:
        for i, text in zip(wide, _comparable_wide(joined).split(_NO_CHARACTER), strict=True):
            found[i] = text
    return found


def _comparable_ascii(text: str) -> str:
    text = text.lower()
    for old, new in _ASCII_FOLDS:
        text = text.replace(old, new)
    return text


def _comparable_wide(text: str) -> str:
    """Fold any text, by a table for all characters but the few that their neighbours affect."""
    table, parts, begin = _folded_alone(), [], 0
    while begin < len(text):
        end = begin + BLOCK_CHARACTERS
        while end < len(text) and not table[min(ord(text[end]), NUM_CHARACTERS - 1)]:
            end += 1  # so that nothing in the next block changes what is before it
        block = text[begin:end]
        folded = table.take(code_points(block))
        alone, done = folded.tobytes().decode("utf-32-le"), 0
        edges = np.flatnonzero(np.diff(folded == 0, prepend=False, append=False)).tolist()
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            first = max(0, start - 1)  # a mark changes the character before it
            parts += [alone[done:first], _fold(block[first:stop])]
            done = stop
        parts.append(alone[done:])
        begin = end
    return "".join(parts)


def code_points(text: str) -> npt.NDArray[np.uint32]:
    """Return [characters]: the code points, with those from NUM_CHARACTERS on replaced by the last below it."""
    return np.minimum(np.frombuffer(text.encode("utf-32-le"), "<u4"), np.uint32(NUM_CHARACTERS - 1))


@lru_cache(maxsize=1 << 14)
def _fold(text: str) -> str:
    text = unicodedata.normalize("NFD", _ACUTE.sub("'", _UNSEEN.sub("", text)))
    # Folding may decompose, and composing may give characters that need folding
    for _ in range(2):
        text = unicodedata.normalize("NFKC", text.casefold())
    return _TO_FOLD.sub(lambda found: _FOLDS[found[0]], text)


@lru_cache(maxsize=1)
def _folded_alone() -> npt.NDArray[np.uint32]:
    """Return [NUM_CHARACTERS]: the one character that each becomes in any context; 0 if there is none."""
    chars = [chr(code) for code in range(1, NUM_CHARACTERS - 1) if not 0xD800 <= code < 0xE000]
    seconds = {second for char in chars for second in unicodedata.normalize("NFD", char)[1:]}
    table = np.zeros(NUM_CHARACTERS, np.uint32)
    for char, becomes in zip(chars, _fold.__wrapped__("\0".join(chars)).split("\0"), strict=True):
        if len(becomes) == 1 and not any(unicodedata.combining(one) or one in seconds for one in char + becomes):
            table[ord(char)] = ord(becomes)
    return table


class Characters(NamedTuple):
    """Properties of each character, by code point."""

    kinds: npt.NDArray[np.uint8]  # BETWEEN words, LETTER of a word, SINGLE = a word on its own
    values: Hashes  # a number for each, from which words are hashed


@lru_cache(maxsize=2)
def characters(count: int) -> Characters:
    """Tabulate the first `count` code points. A LETTER is a letter, a digit, or a combining mark, as in Hindi."""
    kinds = np.zeros(count, np.uint8)
    for code in range(count):
        char = chr(code)
        kinds[code] = LETTER if char.isalnum() or unicodedata.category(char)[0] == "M" else BETWEEN
    for first, last in _SINGLES:
        part = kinds[first : last + 1]
        part[part == LETTER] = SINGLE
    return Characters(kinds, mixed(np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN)) | np.uint64(1))
