"""Texts -> token ids, word by word: each word is encoded once, then looked up.

tokenizer -> word_encoder -> split_points. A word is the text between two neighbouring split points. The words of a
block of text are found, looked up and replaced by their ids in numpy, without an object per word or token. A word that
is not yet in the table is encoded by SentencePiece and added.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import sentencepiece

from shards.arrays import Ints
from shards.tokenize.long_words import LongWords
from shards.tokenize.split_points import END, LEAD, MULTIPLIER, Cuts

Keys = npt.NDArray[np.uint64]

BLOCK_BYTES = 1 << 17  # text handled at a time, so that numpy's temporaries stay in the CPU's cache
SHORT = 15  # bytes of a word that fit a key
MAX_WORDS = 1 << 20  # in the table; with the limits below, at most about 100 MB
MAX_LONG_BYTES = 1 << 22  # in the table's longer words, which are Python objects
MAX_IDS = 1 << 23  # in the table
_SLOT_BITS = 21  # twice as many slots as words

_HALF_BYTES = 8
_LENGTH_BITS = np.uint64(56)  # a key's highest byte is the length, so that "a" differs from "a\0"
MIX = np.uint64(0xC2B2AE3D27D4EB4F)


def _masks(first: int) -> Keys:
    """Return uint64 [SHORT + 2]: by a word's length, the mask of its bytes in the half key that begins at `first`."""
    sizes = [min(max(length - first, 0), _HALF_BYTES) for length in range(SHORT + 2)]
    return np.array([(1 << (8 * size)) - 1 for size in sizes], np.uint64)


_LOW_MASKS, _HIGH_MASKS = _masks(0), _masks(_HALF_BYTES)
_NO_HIGH = np.uint64(0xFFFFFFFFFFFFFFFF)  # never the high half of a word, whose length would be 255


class WordEncoder:
    """An encoder of normalized texts for one model. Exact: words are compared by their bytes, not by a hash."""

    def __init__(
        self,
        processor: sentencepiece.SentencePieceProcessor,
        cuts: Cuts,
        long_words: LongWords,
        prefix: Sequence[int],
        suffix: Sequence[int],
        dtype: npt.DTypeLike,
    ) -> None:
        """Start with an empty table.

        Args:
            processor: the model's, one that does not normalize.
            long_words: for words longer than a block, which are not kept.
            prefix, suffix: ids before and after each text.
            dtype: dtype of ids.
        """
        self._processor, self._cuts, self._long_words = processor, cuts, long_words
        self._prefix, self._suffix = list(prefix), list(suffix)
        capacity = MAX_WORDS + BLOCK_BYTES + 1
        # Memory is touched only as words are added.
        self._low, self._high = np.empty(capacity, np.uint64), np.empty(capacity, np.uint64)
        self._ends = np.empty(capacity, np.int64)  # end of a word's ids in _ids, where the next word's begin
        self._ids: npt.NDArray[np.integer] = np.empty(MAX_IDS, dtype)
        self._clear()

    def encode(self, texts: Sequence[bytes]) -> tuple[npt.NDArray[np.integer], Ints]:
        """Encode texts spelled as in `split_points`: all ids in one array, and int64 [texts], the number of each."""
        end = bytes([END])
        data = b"".join([bytes(LEAD - 1), end.join([b"", *texts, b""]), bytes(2 * _HALF_BYTES)])
        parts: list[npt.NDArray[np.integer]] = []
        marks: list[Ints] = []
        total = 0
        for starts, ends in self._words(data, LEAD - 1, len(data) - 2 * _HALF_BYTES):
            if ends[0] - starts[0] > BLOCK_BYTES:
                for ids in self._long_words.encode(data, int(starts[0]), int(ends[0])):
                    parts.append(ids)
                    total += len(ids)
                continue
            numbers = self._look_up(data, starts, ends)
            stored = self._ends.take(numbers - 1)  # where a word's ids begin in the table
            counts = self._ends.take(numbers) - stored
            begins = np.cumsum(counts) - counts  # where they begin in the block's ids
            marks.append(begins[numbers == 1] + total)
            places = np.repeat(stored - begins, counts)
            places += np.arange(len(places))
            parts.append(self._ids.take(places))
            total += len(places)
        # An END's ids are the suffix of the text before it and the prefix of the one after it.
        joined = np.concatenate(parts)[len(self._suffix) : total - len(self._prefix)]
        bounds = np.concatenate(marks)
        return joined, bounds[1:] - bounds[:-1]

    def _words(self, data: bytes, begin: int, end: int) -> Iterator[tuple[Ints, Ints]]:
        """Yield (starts, ends) of the words, block by block; a word longer than a block comes alone."""
        while begin < end:
            stop = min(begin + BLOCK_BYTES, end)
            places = self._cuts.places(data, begin, stop)
            alone = not len(places)
            while not len(places) and stop < end:
                begun, stop = stop, min(stop + BLOCK_BYTES, end)
                places = self._cuts.places(data, begun - 1, stop)[:1]
            if stop == end and not (alone and len(places)):
                places = np.append(places, end)
            yield np.concatenate([[begin], places[:-1]]), places
            begin = int(places[-1])

    def _look_up(self, data: bytes, starts: Ints, ends: Ints) -> Ints:
        """Return the number of each word, after adding the missing ones to the table: int64 [words]."""
        if self._count > MAX_WORDS or self._ends[self._count - 1] > MAX_IDS or self._long_bytes > MAX_LONG_BYTES:
            self._clear()
        lengths = np.minimum(ends - starts, SHORT + 1)
        # The eight bytes from each byte of the block on. `take` copies them into alignment, and is the fastest way to
        # do so as long as they are no more than the block.
        begin, size = int(starts[0]), int(starts[-1] - starts[0]) + _HALF_BYTES + 1
        halves = np.ndarray((size,), "<u8", data, offset=begin, strides=(1,))
        places = starts - begin
        low = halves.take(places)
        places += _HALF_BYTES
        high = halves.take(places)
        low &= _LOW_MASKS.take(lengths)
        high &= _HIGH_MASKS.take(lengths)
        high |= lengths.view(np.uint64) << _LENGTH_BITS
        numbers, slots = self._find(low, high)
        short = lengths <= SHORT
        missing = np.flatnonzero(short & (numbers == 0))
        while len(missing):
            # Add one of the words that found the same free slot; the others, equal or not, are looked up once more.
            chosen = missing[np.unique(slots[missing], return_index=True)[1]]
            words = [data[a:b] for a, b in zip(starts[chosen].tolist(), ends[chosen].tolist(), strict=True)]
            self._slots[slots[chosen]] = self._add(words, low[chosen], high[chosen])
            numbers[missing], slots[missing] = self._find(low[missing], high[missing])
            missing = missing[numbers[missing] == 0]
        long = np.flatnonzero(~short)
        if len(long):
            numbers[long] = self._look_up_long(
                [data[a:b] for a, b in zip(starts[long].tolist(), ends[long].tolist(), strict=True)]
            )
        return numbers

    def _find(self, low: Keys, high: Keys) -> tuple[Ints, Ints]:
        """Return the number and slot of each key's word; 0 and the slot to put it in if it is missing."""
        slots_of = high * MULTIPLIER
        slots_of ^= low
        slots_of *= MIX
        slots_of >>= np.uint64(64 - _SLOT_BITS)
        slots = slots_of.view(np.int64)
        numbers = self._slots.take(slots).astype(np.int64)
        wrong = np.flatnonzero((self._low.take(numbers) != low) | (self._high.take(numbers) != high))
        wrong = wrong[numbers.take(wrong) != 0]
        while len(wrong):
            slots[wrong] = (slots[wrong] + 1) & ((1 << _SLOT_BITS) - 1)
            found = self._slots.take(slots[wrong]).astype(np.int64)
            numbers[wrong] = found
            differs = (self._low.take(found) != low[wrong]) | (self._high.take(found) != high[wrong])
            wrong = wrong[differs & (found != 0)]
        return numbers, slots

    def _look_up_long(self, words: list[bytes]) -> list[int]:
        """Return the numbers of words longer than a key."""
        fresh = [word for word in dict.fromkeys(words) if word not in self._long]
        if fresh:
            self._long.update(zip(fresh, self._add(fresh, np.uint64(0), _NO_HIGH).tolist(), strict=True))
            self._long_bytes += sum(map(len, fresh))
        return [self._long[word] for word in words]

    def _add(self, words: list[bytes], low: Keys | np.uint64, high: Keys | np.uint64) -> Ints:
        """Encode words and give them numbers."""
        return self._put(self._processor.encode(words, num_threads=1), low, high)

    def _put(self, ids: Sequence[Sequence[int]], low: Keys | np.uint64, high: Keys | np.uint64) -> Ints:
        numbers = np.arange(self._count, self._count + len(ids))
        begin = int(self._ends[self._count - 1])
        ends = begin + np.cumsum(np.fromiter(map(len, ids), np.int64, len(ids)))
        while ends[-1] > len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
        self._ids[begin : ends[-1]] = np.fromiter(
            itertools.chain.from_iterable(ids), self._ids.dtype, int(ends[-1]) - begin
        )
        self._low[numbers], self._high[numbers], self._ends[numbers] = low, high, ends
        self._count += len(ids)
        return numbers

    def _clear(self) -> None:
        """Empty the table, except for word 1, END."""
        # Open addressing: a slot holds a word's number, 0 = none. A new array, since zeros of one are not written.
        self._slots = np.zeros(1 << _SLOT_BITS, np.int32)
        self._long: dict[bytes, int] = {}
        self._long_bytes = 0
        self._low[0], self._high[0], self._ends[0] = 0, _NO_HIGH, 0  # no word
        self._count = 1
        low, high = np.array([END], np.uint64), np.array([1], np.uint64) << _LENGTH_BITS
        _, slots = self._find(low, high)
        self._slots[slots] = self._put([[*self._suffix, *self._prefix]], low, high)
