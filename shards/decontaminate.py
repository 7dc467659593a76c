"""Which training documents share text with an evaluation suite. suite -> decontaminate -> window.

The suite's paragraphs, or its n-grams of words, are hashed to 8 bytes each, once, into a file that all processes of a
node map: sorted hashes, and a bitmap that tells of nearly every other paragraph or n-gram that it is none of them.
A document is dropped if any of its own is among them. That is decided by its text alone.

By chance a hash is one of N with probability N / 2^64: of 10^12 paragraphs looked up among 10^7, 0.5 are wrong.
"""

import logging
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import xxhash

from shards import suite
from shards.config import Decontamination
from shards.durable import hash_file, written_atomically
from shards.errors import ConfigError
from shards.kept import user_cache
from shards.plan import Hashes, Ints, key_of, mixed

VERSION = 1  # raise it whenever the same text would give other hashes: runs do not continue across it
BITS_PER_HASH = 16  # of the bitmap, at least: of other signatures one in sixteen passes at most
LINE_FEED, SPACE = 10, 32
WHITE_SPACE = bytes(range(SPACE + 1))
EIGHT_SPACES = np.uint64(0x2020202020202020)
BLOCK_BYTES = 1 << 18
PRIME = 0x9E3779B185EBCA87
BATCH_HASHES = 1 << 22  # that are held as Python or numpy numbers while a filter is made

# A word as Paloma counts them: a run of letters and digits, or a single Han or Kana character, which has no spaces
SINGLE = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{SINGLE}]|[^\W{SINGLE}]+")


logger = logging.getLogger(__name__)


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
        """Writes the set of `hashes`, atomically; `signatures` [hashes] belong to them."""
        unique = np.unique(hashes)
        num_words = 1 << max(0, (max(1, len(unique)) * BITS_PER_HASH // 64 - 1).bit_length())
        bitmap = np.zeros(num_words, np.uint64)
        np.bitwise_or.at(bitmap, _word(signatures, num_words), _bit(signatures))
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_atomically(path) as file:  # not a whole second time in memory, as bytes
            np.save(file, np.concatenate([np.array([len(unique)], np.uint64), unique, bitmap]))

    def __len__(self) -> int:
        return len(self._hashes)

    @property
    def digest(self) -> str:
        """Of the hashes; equal for equal sets."""
        return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(self._hashes).data)

    def candidates(self, signatures: Hashes) -> Ints:
        """Places of those signatures of which the hash may be in the set."""
        found = self._bitmap[_word(signatures, len(self._bitmap))] & _bit(signatures)
        return np.flatnonzero(found)

    def contains(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        """For each hash whether it is in the set."""
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
            path: of the suite's hashes, as `of` has made them.
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

    @classmethod
    def of(cls, config: Decontamination, index_dir: Path | None) -> Self:
        """The filter of a suite; made if it is not there yet, which reads the suite.

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
        if not path.exists():
            texts = (document.text for found in suites for document in found.documents())
            HashSet.write(path, *_hashes_of_suite(texts, config))
            logger.info("%s: %d %ss to keep out of the training", path, len(HashSet(path)), config.match)
        found = cls(config, path)
        if not len(found._hashes):
            raise ConfigError(
                f"data.decontaminate.suite={config.suite}: no {config.match} of {config.min_tokens} words in it;"
                " lower data.decontaminate.min_tokens, or leave it out"
            )
        return found

    @property
    def content_hash(self) -> str:
        """Of the file, what rules hashes out included. Raises: OSError if it cannot be read."""
        return hash_file(self.path)

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
        """bool [documents]: whether a text has a paragraph (an n-gram) of the suite."""
        flagged = np.zeros(len(texts), np.bool_)
        if self._config.match == "paragraph":
            lines = Lines.of(texts, self._config.min_tokens)
            likely = self._hashes.candidates(lines.signatures())
            hashes, owners = lines.hashes(likely), lines.owners[likely]
        else:
            hashes, owners = ngrams(texts, self._config.min_tokens)
            likely = self._hashes.candidates(hashes)
            hashes, owners = hashes[likely], owners[likely]
        flagged[owners[self._hashes.contains(hashes)]] = True
        return flagged


def _hashes_of_suite(texts: Iterable[str], config: Decontamination) -> tuple[Hashes, Hashes]:
    """(hashes, signatures) of all that a suite's texts hold; equal ones once."""
    kept = np.zeros((0, 2), np.uint64)
    pending: list[Hashes] = []
    for text in texts:
        if config.match == "paragraph":
            # Only here are words counted: what equals a paragraph of the suite has as many
            long = [line for line in text.split("\n") if len(WORD.findall(line)) >= config.min_tokens]
            lines = Lines.of(["\n".join(long)], config.min_tokens)
            pending.append(np.stack([lines.hashes(np.arange(len(lines.owners))), lines.signatures()], axis=1))
        else:
            found = ngrams([text], config.min_tokens)[0]
            pending.append(np.stack([found, found], axis=1))
        if sum(map(len, pending)) >= BATCH_HASHES:
            kept, pending = np.unique(np.concatenate([kept, *pending]), axis=0), []
    kept = np.concatenate([kept, *pending])
    return kept[:, 0], kept[:, 1]


class Lines(NamedTuple):
    """The lines of texts, without white space and control characters (up to U+0020) at their ends."""

    data: bytes  # of all texts, in UTF-8
    starts: Ints  # [lines]: offset of the first byte
    ends: Ints  # [lines]: offset after the last byte
    owners: Ints  # [lines]: which text each is of

    @classmethod
    def of(cls, texts: Sequence[str], min_characters: int) -> Self:
        """All lines of at least so many characters; in any case of 8 bytes, which a signature needs."""
        min_bytes = max(8, min_characters)
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
        return cls(data, starts, ends, np.repeat(np.arange(len(parts)), np.diff(before, prepend=0)))

    def signatures(self) -> Hashes:
        """Of each line a number made of its length and of 8 bytes at its beginning, middle and end."""
        if not len(self.starts):
            return np.zeros(0, np.uint64)
        words, sizes = _words_at(self.data), self.ends - self.starts
        middle = mixed(words[self.starts + (sizes - 8) // 2] + sizes.astype(np.uint64))
        return mixed(words[self.starts] + mixed(words[self.ends - 8] + middle))

    def hashes(self, numbers: Ints) -> Hashes:
        """Of some lines."""
        view = memoryview(self.data)
        pairs = zip(self.starts[numbers].tolist(), self.ends[numbers].tolist(), strict=True)
        return np.array([xxhash.xxh3_64_intdigest(view[start:end]) for start, end in pairs], np.uint64)


def _trim(data: bytes, starts: Ints, ends: Ints) -> None:
    """Moves the ends of stretches of at least 8 bytes inward past white space, in place."""
    buffer, words = np.frombuffer(data, np.uint8), _words_at(data)
    for bounds, step in ((starts, 1), (ends, -1)):
        rest = np.flatnonzero(buffer[bounds if step > 0 else bounds - 1] <= SPACE)
        for width in (8, 1):  # an indentation is passed over in eights
            moving = rest
            for _ in range(8):
                moving = moving[ends[moving] - starts[moving] >= width]
                at = bounds[moving] if step > 0 else bounds[moving] - width
                moving = moving[words[at] == EIGHT_SPACES if width == 8 else buffer[at] <= SPACE]
                if not len(moving):
                    break
                bounds[moving] += step * width
        for i in moving.tolist():  # whatever is longer
            line = data[int(starts[i]) : int(ends[i])]
            left = line.lstrip(WHITE_SPACE) if step > 0 else line.rstrip(WHITE_SPACE)
            bounds[i] += step * (len(line) - len(left))


def _words_at(data: bytes) -> Hashes:
    """Every 8 bytes as a number, those that overlap too: a view of the text."""
    return np.ndarray(max(0, len(data) - 7), "<u8", data, strides=(1,))


def ngrams(texts: Sequence[str], n: int) -> tuple[Hashes, Ints]:
    """Hashes of all runs of n words of texts, and which text each is of.

    A word is a run of ASCII letters (of either case alike) and digits and of bytes beyond ASCII.
    """
    parts = [text.encode() for text in texts]
    words, starts = _words(np.frombuffer(b"\n".join(parts), np.uint8))
    ends = np.cumsum([len(part) + 1 for part in parts])
    owners = np.searchsorted(ends, starts, side="right")
    count = max(0, len(words) - n + 1)
    hashes = np.zeros(count, np.uint64)
    for i in range(n):
        hashes = mixed(hashes + words[i : i + count])
    within = owners[:count] == owners[n - 1 : n - 1 + count]
    return hashes[within], owners[:count][within]


def _words(data: npt.NDArray[np.uint8]) -> tuple[Hashes, Ints]:
    """A hash of each word, and where it starts; block by block, since the steps between take many times the text."""
    hashes, starts, begin = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], 0
    while begin < len(data):
        size = BLOCK_BYTES
        while True:  # a block ends where a word does
            values = _letters()[data[begin : begin + size]]
            gaps = np.flatnonzero(values == 0)
            if begin + size >= len(data) or len(gaps):
                break
            size *= 2
        stop = len(values) if begin + size >= len(data) else int(gaps[-1]) + 1
        values = values[:stop]
        edges = np.flatnonzero(np.diff((values != 0).astype(np.int8), prepend=0, append=0))
        first, end = edges[::2], edges[1::2]
        powers, inverse = _powers(len(values))
        sums = np.zeros(len(values) + 1, np.uint64)
        np.cumsum(values * powers, out=sums[1:])
        # sum of letter_i * P^i over a word, wherever it stands; all of it modulo 2^64
        hashes.append(mixed((sums[end] - sums[first]) * inverse[first]))
        starts.append(first + begin)
        begin += stop
    return np.concatenate(hashes), np.concatenate(starts)


@lru_cache(maxsize=1)
def _letters() -> Hashes:
    """[256]: a number for each byte of a word, 0 for those between words."""
    values = np.array([key_of("letter", chr(byte).lower()) | 1 for byte in range(256)], np.uint64)
    values[[byte for byte in range(128) if not chr(byte).isalnum()]] = 0
    return values


@lru_cache(maxsize=1)
def _powers(size: int) -> tuple[Hashes, Hashes]:
    """(P^i, P^-i) modulo 2^64 for i < size."""
    tables = []
    for base in (PRIME, pow(PRIME, -1, 1 << 64)):
        table = np.full(size, base, np.uint64)
        table[:1] = 1
        tables.append(np.cumprod(table, out=table))
    return tables[0], tables[1]
