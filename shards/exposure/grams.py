"""Texts as sequences of hashed words, and the few n-grams of each document by which an excerpt of it is found.

normalization, decontaminate -> grams -> text_index, search.

Two texts are compared by their words alone: in the form that `comparable` returns, without punctuation and white space.
A document is known by the grams that begin at every STRIDE-th of its words. A text is looked up by the grams at all of
its words, so that wherever an excerpt begins, one of its grams is among the document's as soon as it has MIN_WORDS
words. (BLAT finds DNA so: Kent 2002, "BLAT - the BLAST-like alignment tool".) Grams that both sides choose by their
hashes, as in winnowing, would take twice as many for the same promise.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import xxhash

from shards.arrays import Hashes, Ints
from shards.hashing import mixed
from shards.suites.decontaminate import words
from shards.suites.normalization import comparable

GRAM_WORDS = 8
STRIDE = 25  # words
MIN_WORDS = STRIDE + GRAM_WORDS - 1  # any run of so many words holds a whole gram that begins at a multiple of STRIDE


class Words(NamedTuple):
    """The words of texts."""

    hashes: Hashes  # of the words of all texts
    bounds: Ints  # [texts + 1]: where the words of each begin, and the end

    def of(self, number: int) -> Hashes:
        """Return the words of one text."""
        return self.hashes[self.bounds[number] : self.bounds[number + 1]]


def words_of(texts: Sequence[str]) -> Words:
    """Hash the words of texts."""
    parts = comparable(texts)
    hashes, starts = words("\n".join(parts))
    ends = np.cumsum([len(part) + 1 for part in parts], dtype=np.int64)
    return Words(hashes, np.concatenate([[0], np.searchsorted(starts, ends)]))


def grams_at(found: Hashes, starts: Ints, size: int = GRAM_WORDS) -> Hashes:
    """Hash the runs of `size` words that begin at some words."""
    hashes = np.zeros(len(starts), np.uint64)
    for i in range(size):
        hashes = mixed(hashes + found[starts + i])
    return hashes


def all_grams(found: Hashes, size: int = GRAM_WORDS) -> Hashes:
    """Hash all runs of `size` words of one text."""
    return grams_at(found, np.arange(max(0, len(found) - size + 1)), size)


def sampled_grams(found: Words) -> tuple[Hashes, Ints]:
    """Hash the grams by which texts are found; also return the text that each belongs to."""
    lengths = np.diff(found.bounds)
    counts = np.where(lengths < GRAM_WORDS, 0, (lengths - GRAM_WORDS) // STRIDE + 1)
    owners = np.repeat(np.arange(len(counts)), counts)
    numbers = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    return grams_at(found.hashes, found.bounds[owners] + STRIDE * numbers), owners


def hash_of(found: Hashes) -> int:
    """Hash all words of one text together."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(found).data)


class Overlap(NamedTuple):
    """What a text and a document have in common."""

    shared_words: int  # words of the text that lie in runs of at least MIN_WORDS that the document has too
    contains: bool  # the document has the whole text
    whole: bool  # the document is the text


class HashedText:
    """The words of one text, to be compared with those of others."""

    def __init__(self, words: Hashes) -> None:
        self.words = words

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def runs(self) -> Hashes:
        """Hashes of all runs of MIN_WORDS words."""
        return all_grams(self.words, MIN_WORDS)


def overlap_of(text: HashedText, document: HashedText) -> Overlap:
    """Compare a text with a document; a text below MIN_WORDS only as a whole."""
    if np.array_equal(text.words, document.words):
        return Overlap(len(text), True, True)
    if len(text) < MIN_WORDS:
        return Overlap(0, False, False)
    begins = np.flatnonzero(np.isin(text.runs, document.runs))
    steps = np.zeros(len(text) + 1, np.int64)
    steps[begins] += 1
    steps[begins + MIN_WORDS] -= 1
    places = np.flatnonzero(document.runs == text.runs[0]).tolist()
    contains = any(np.array_equal(document.words[place : place + len(text)], text.words) for place in places)
    return Overlap(int(np.count_nonzero(np.cumsum(steps))), contains, False)
