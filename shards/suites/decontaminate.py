"""Which training documents share text with an evaluation suite. suite -> decontaminate -> window.

Texts are compared as `comparable` leaves them. The suite's paragraphs, or its n-grams of words, are hashed to 8 bytes
each, once, into a file that all processes of a node map: sorted hashes, and a bitmap that tells of nearly every other
paragraph or n-gram that it is none of them. A document is dropped if any of its own is among them. That is decided by
its text alone.

By chance a hash is one of N with probability N / 2^64: of 10^12 paragraphs looked up among 10^7, 0.5 are wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from shards.arrays import Hashes, Ints
from shards.config import Decontamination
from shards.errors import ConfigError
from shards.hashing import key_of, mixed
from shards.index.paths import user_cache
from shards.storage.atomic import is_there, written_atomically
from shards.storage.content_hash import hash_file
from shards.suites import suite
from shards.suites.normalization import (
    BETWEEN,
    BLOCK_CHARACTERS,
    LETTER,
    NUM_CHARACTERS,
    characters,
    code_points,
    comparable,
)

VERSION = 2  # raise it whenever the same text would give other hashes: runs do not continue across it
_BITS_PER_HASH = 16  # of the bitmap, at least: of other signatures one in sixteen passes at most
LINE_FEED, SPACE = 10, 32
_ASCII = 128  # characters
_WHITE_SPACE = bytes(range(SPACE + 1))
_EIGHT_SPACES = np.uint64(0x2020202020202020)
_SIGNED_BYTES = 8  # of a line that a signature reads at a time; a shorter line is filled up
_FILLER = 0xFF  # no byte of UTF-8
_PRIME = 0x9E3779B185EBCA87
_BATCH_HASHES = 1 << 22  # that are held as Python or numpy numbers while a filter is made

_logger = logging.getLogger(__name__)


class HashSet:
    """A set of 64-bit hashes in a file, mapped into memory, and a bitmap that rules nearly all others out.

    The bitmap is of signatures: of the hashes themselves, or of something that is cheaper to have than a hash.
    """

    def __init__(self, path: Path) -> None:
        words = np.load(path, mmap_mode="r")
        size = int(words[0])
        self._hashes: Hashes = words[1 : 1 + size]
        self._bitmap: Hashes = words[1 + size :]

    @staticmethod
    def write(path: Path, hashes: Hashes, signatures: Hashes) -> None:
        """Write the set of `hashes`, atomically; `signatures` [hashes] belong to them."""
        unique = np.unique(hashes)
        num_words = 1 << max(0, (max(1, len(unique)) * _BITS_PER_HASH // 64 - 1).bit_length())
        bitmap = np.zeros(num_words, np.uint64)
        np.bitwise_or.at(bitmap, _word(signatures, num_words), _bit(signatures))
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_atomically(path) as file:  # not a whole second time in memory, as bytes
            np.save(file, np.concatenate([np.array([len(unique)], np.uint64), unique, bitmap]))

    def __len__(self) -> int:
        return len(self._hashes)

    @property
    def digest(self) -> str:
        """Hash of the hashes; equal for equal sets."""
        return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(self._hashes).data)

    def candidates(self, signatures: Hashes) -> Ints:
        """Find the places of those signatures of which the hash may be in the set."""
        found = self._bitmap[_word(signatures, len(self._bitmap))] & _bit(signatures)
        return np.flatnonzero(found)

    def contains(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        """Tell for each hash whether it is in the set."""
        if not len(self._hashes):
            return np.zeros(len(hashes), np.bool_)
        places = np.searchsorted(self._hashes, hashes)
        places[places == len(self._hashes)] = 0
        found: npt.NDArray[np.bool_] = self._hashes[places] == hashes
        return found


def _word(hashes: Hashes, num_words: int) -> npt.NDArray[np.int64]:
    return ((hashes >> np.uint64(6)) & np.uint64(num_words - 1)).astype(np.int64)


def _bit(hashes: Hashes) -> Hashes:
    return np.uint64(1) << (hashes & np.uint64(63))


class Decontaminator:
    """Finds the documents that share text with a suite."""

    def __init__(self, config: Decontamination, path: Path) -> None:
        """
        Args:
            path: of the suite's hashes, as `obtain` has made them.
        Raises: ConfigError if the file is not there, or is damaged.
        """
        self._config, self.path = config, path
        try:
            self._hashes = HashSet(path)
        except (OSError, ValueError, IndexError) as error:
            raise ConfigError(
                f"data.decontaminate: {path}, the hashes of the suite, cannot be read: {error}; delete it if it is "
                "there, and start again: it is made anew"
            ) from None

    @cached_property
    def content_hash(self) -> str:
        """Hash of the whole file, with the bitmap. Raises: OSError if it cannot be read."""
        return hash_file(self.path)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to look for."""
        return not len(self._hashes)

    @property
    def fingerprint(self) -> dict[str, object]:
        """Equal for two filters only if they drop the same documents."""
        rule = {"match": self._config.match, "min_tokens": self._config.min_tokens}
        return {"version": VERSION, **rule, "hashes": self._hashes.digest}

    @property
    def reason(self) -> str:
        """Why a document is dropped."""
        what = f"{self._config.match} of {self._config.min_tokens} words"
        return f"shares a {what}{' or more' * (self._config.match == 'paragraph')} with the suite {self._config.suite}"

    def shares_text(self, texts: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Tell, as bool [documents], whether a text has a paragraph (an n-gram) of the suite."""
        flagged = np.zeros(len(texts), np.bool_)
        texts = comparable(texts)
        if self._config.match == "paragraph":
            lines = split_lines(texts, self._config.min_tokens)
            likely = self._hashes.candidates(lines.signatures())
            hashes, owners = lines.hashes(likely), lines.owners[likely]
        else:
            hashes, owners = ngrams(texts, self._config.min_tokens)
            likely = self._hashes.candidates(hashes)
            hashes, owners = hashes[likely], owners[likely]
        flagged[owners[self._hashes.contains(hashes)]] = True
        return flagged


def obtain(config: Decontamination, index_dir: Path | None) -> Decontaminator:
    """Open the filter of a suite; make it first if it is not there yet. Both read the suite.

    Args:
        index_dir: where filters are kept, None = the user's cache.
    Raises: ConfigError if the suite is not there, or holds nothing to look for.
    """
    suites = [suite.find(config.suite, split, "data.decontaminate.suite") for split in config.splits]
    contents = [[part.source.text_key, *part.shards] for found in suites for part in found.parts]
    digests = {shard: digest for found in suites for shard, digest in found.content_hashes().items()}
    named = [[key, *(digests[shard] for shard in shards)] for key, *shards in contents]
    key = key_of(VERSION, config.match, config.min_tokens, *(text for part in named for text in part))
    path = (index_dir or user_cache()) / f"headrace-decontaminate-{key:016x}.npy"
    if not is_there(path):
        texts = (document.text for found in suites for document in found.documents())
        HashSet.write(path, *_hashes_of_suite(texts, config))
        _logger.info("%s: %d %ss to keep out of the training", path, len(HashSet(path)), config.match)
    decontaminator = Decontaminator(config, path)
    if decontaminator.is_empty:
        raise ConfigError(
            f"data.decontaminate.suite={config.suite}: no {config.match} of {config.min_tokens} words in it;"
            " lower data.decontaminate.min_tokens, or leave it out"
        )
    return decontaminator


def _hashes_of_suite(texts: Iterable[str], config: Decontamination) -> tuple[Hashes, Hashes]:
    """Return (hashes, signatures) of all that a suite's texts hold; equal ones once."""
    found = np.zeros((0, 2), np.uint64)
    pending: list[Hashes] = []
    for text in texts:
        (text,) = comparable([text])
        if config.match == "paragraph":
            # Only here are words counted: what equals a paragraph of the suite has as many
            long = [line for line, count in _words_per_line(text) if count >= config.min_tokens]
            lines = split_lines(["\n".join(long)], config.min_tokens)
            pending.append(np.stack([lines.hashes(np.arange(len(lines.owners))), lines.signatures()], axis=1))
        else:
            grams = ngrams([text], config.min_tokens)[0]
            pending.append(np.stack([grams, grams], axis=1))
        if sum(map(len, pending)) >= _BATCH_HASHES:
            found, pending = np.unique(np.concatenate([found, *pending]), axis=0), []
    found = np.concatenate([found, *pending])
    return found[:, 0], found[:, 1]


def _words_per_line(text: str) -> list[tuple[str, int]]:
    lines = text.split("\n")
    ends = np.cumsum([len(line) + 1 for line in lines])
    counts = np.diff(np.searchsorted(words(text)[1], ends), prepend=0)
    return list(zip(lines, counts.tolist(), strict=True))


class Lines(NamedTuple):
    """The lines of texts, without white space and control characters (up to U+0020) at their ends."""

    data: bytes  # of all texts, in UTF-8
    starts: Ints  # [lines]: offset of the first byte
    ends: Ints  # [lines]: offset after the last byte
    owners: Ints  # [lines]: which text each is of

    def signatures(self) -> Hashes:
        """Make of each line a number of its length and of 8 bytes at its beginning, middle and end."""
        if not len(self.starts):
            return np.zeros(0, np.uint64)
        words, sizes = _words_at(self.data), self.ends - self.starts
        middle = mixed(words[self.starts + (sizes - 8) // 2] + sizes.astype(np.uint64))
        return mixed(words[self.starts] + mixed(words[self.ends - 8] + middle))

    def hashes(self, numbers: Ints) -> Hashes:
        """Hash some lines."""
        view = memoryview(self.data)
        pairs = zip(self.starts[numbers].tolist(), self.ends[numbers].tolist(), strict=True)
        return np.array([xxhash.xxh3_64_intdigest(view[start:end]) for start, end in pairs], np.uint64)


def split_lines(texts: Sequence[str], min_words: int) -> Lines:
    """Find all lines of comparable texts that can hold so many words."""
    min_bytes = 2 * min_words - 1  # a letter or more for each word, or three bytes for a character that is one
    parts = [text.encode() for text in texts]
    data = b"\n".join(parts)
    breaks = np.flatnonzero(np.frombuffer(data, np.uint8) == LINE_FEED)
    starts, ends = np.concatenate([[0], breaks + 1]), np.concatenate([breaks, [len(data)]])
    long = ends - starts >= min_bytes
    starts, ends = starts[long], ends[long]
    _trim(data, starts, ends)
    long = ends - starts >= min_bytes
    starts, ends = starts[long], ends[long]
    before = np.searchsorted(starts, np.cumsum([len(part) + 1 for part in parts]))  # lines up to each text's end
    owners = np.repeat(np.arange(len(parts)), np.diff(before, prepend=0))
    data += _filled_up(data, starts, ends)
    return Lines(data, starts, ends, owners)


def _filled_up(data: bytes, starts: Ints, ends: Ints) -> bytes:
    """Copy the lines that are too short to be signed, each as long as it has to be, to stand after `data`.

    Moves the bounds of these lines there.
    """
    short = np.flatnonzero(ends - starts < _SIGNED_BYTES)
    buffer = np.frombuffer(data + bytes(_SIGNED_BYTES), np.uint8) if len(short) else np.zeros(0, np.uint8)
    places = starts[short, None] + np.arange(_SIGNED_BYTES)
    copies = np.where(places < ends[short, None], buffer[places], np.uint8(_FILLER))
    starts[short] = len(data) + _SIGNED_BYTES * np.arange(len(short))
    ends[short] = starts[short] + _SIGNED_BYTES
    return copies.tobytes()


def _trim(data: bytes, starts: Ints, ends: Ints) -> None:
    """Move the ends of stretches that are not empty inward past white space, in place."""
    buffer, words = np.frombuffer(data, np.uint8), _words_at(data)
    for bounds, step in ((starts, 1), (ends, -1)):
        rest = np.flatnonzero(buffer[bounds if step > 0 else bounds - 1] <= SPACE)
        for width in (8, 1):  # an indentation is passed over in eights
            moving = rest
            for _ in range(8):
                moving = moving[ends[moving] - starts[moving] >= width]
                at = bounds[moving] if step > 0 else bounds[moving] - width
                moving = moving[words[at] == _EIGHT_SPACES if width == 8 else buffer[at] <= SPACE]
                if not len(moving):
                    break
                bounds[moving] += step * width
        for i in moving.tolist():  # whatever is longer
            line = data[int(starts[i]) : int(ends[i])]
            left = line.lstrip(_WHITE_SPACE) if step > 0 else line.rstrip(_WHITE_SPACE)
            bounds[i] += step * (len(line) - len(left))


def _words_at(data: bytes) -> Hashes:
    """View every 8 bytes as a number, those that overlap too."""
    return np.ndarray(max(0, len(data) - 7), "<u8", data, strides=(1,))


def ngrams(texts: Sequence[str], n: int) -> tuple[Hashes, Ints]:
    """Hash all runs of n words of comparable texts; return also which text each is of."""
    found, starts = words("\n".join(texts))
    ends = np.cumsum([len(text) + 1 for text in texts])
    owners = np.searchsorted(ends, starts, side="right")
    count = max(0, len(found) - n + 1)
    hashes = np.zeros(count, np.uint64)
    for i in range(n):
        hashes = mixed(hashes + found[i : i + count])
    within = owners[:count] == owners[n - 1 : n - 1 + count]
    return hashes[within], owners[:count][within]


def words(text: str) -> tuple[Hashes, Ints]:
    """Hash each word of a comparable text; return also the character at which it starts.

    A word is a run of letters, digits and marks upon them, or a single Han or Kana character. One that is longer than a
    block is as many words as it fills.
    """
    hashes, starts, begin = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], 0
    while begin < len(text):
        block = text[begin : begin + BLOCK_CHARACTERS]
        if block.isascii():
            codes: npt.NDArray[np.integer] = np.frombuffer(block.encode(), np.uint8)
            known = characters(_ASCII)
        else:
            codes, known = code_points(block), characters(NUM_CHARACTERS)
        kinds = known.kinds.take(codes)
        if begin + len(block) < len(text) and len(ends := np.flatnonzero(kinds != LETTER)):
            kinds = kinds[: int(ends[-1]) + 1]  # a block ends where a word does
        goes_on = (kinds[:-1] == LETTER) & (kinds[1:] == LETTER)
        inside = kinds != BETWEEN
        first = np.flatnonzero(inside & ~np.concatenate([[False], goes_on]))
        end = np.flatnonzero(inside & ~np.concatenate([goes_on, [False]])) + 1
        powers, inverse = _powers()
        sums = np.zeros(len(kinds) + 1, np.uint64)
        np.cumsum(known.values.take(codes[: len(kinds)]) * powers[: len(kinds)], out=sums[1:])
        # sum of character_i * P^i over a word, wherever it stands; all of it modulo 2^64
        hashes.append(mixed((sums[end] - sums[first]) * inverse[first]))
        starts.append(first + begin)
        begin += len(kinds)
    return np.concatenate(hashes), np.concatenate(starts)


@lru_cache(maxsize=1)
def _powers() -> tuple[Hashes, Hashes]:
    """Compute (P^i, P^-i) modulo 2^64 for each character of a block."""
    tables = []
    for base in (_PRIME, pow(_PRIME, -1, 1 << 64)):
        table = np.full(BLOCK_CHARACTERS, base, np.uint64)
        table[:1] = 1
        tables.append(np.cumprod(table, out=table))
    return tables[0], tables[1]
