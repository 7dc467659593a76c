"""Documents that share text with an evaluation suite. suite -> decontaminate -> window.

Texts are compared in the form that `comparable` returns. The suite's paragraphs, or its n-grams of words, are hashed
once, to 8 bytes each, into a file that all processes of a node map: sorted hashes, and a bitmap that rules out nearly
every other paragraph or n-gram. A document is dropped if any of its own is among them. Its text alone decides.

A hash matches one of N by chance with probability N / 2^64: of 10^12 paragraphs looked up among 10^7, 0.5 are wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
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
from shards.records.forms import FORM_VERSION, identity_of
from shards.records.selection import SELECTION_VERSION
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

VERSION = 2  # raise it whenever the same text would give other hashes; runs do not resume across versions
_BITS_PER_HASH = 16  # minimum bits of bitmap per hash: at most one in sixteen other signatures passes
LINE_FEED, SPACE = 10, 32
_ASCII = 128  # characters
_WHITE_SPACE = bytes(range(SPACE + 1))
_EIGHT_SPACES = np.uint64(0x2020202020202020)
_SIGNED_BYTES = 8  # bytes of a line that a signature reads at a time; shorter lines are padded
_FILLER = 0xFF  # never a byte of UTF-8
_PRIME = 0x9E3779B185EBCA87
_BATCH_HASHES = 1 << 22  # hashes held in memory while a filter is made

_logger = logging.getLogger(__name__)


class HashSet:
    """A set of 64-bit hashes in a file, mapped into memory, with a bitmap that rules out nearly all others.

    The bitmap holds signatures: the hashes themselves, or something cheaper to compute than a hash.
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
        with written_atomically(path) as file:  # avoids a second copy in memory as bytes
            np.save(file, np.concatenate([np.array([len(unique)], np.uint64), unique, bitmap]))

    def __len__(self) -> int:
        return len(self._hashes)

    @property
    def digest(self) -> str:
        """Return a hash of the hashes, equal for equal sets."""
        return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(self._hashes).data)

    def candidates(self, signatures: Hashes) -> Ints:
        """Return the positions of those signatures whose hash may be in the set."""
        found = self._bitmap[_word(signatures, len(self._bitmap))] & _bit(signatures)
        return np.flatnonzero(found)

    def contains(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        """Return for each hash whether it is in the set."""
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
    """A filter that finds documents that share text with a suite."""

    def __init__(self, config: Decontamination, path: Path) -> None:
        """Map the filter.

        Args:
            path: the file of the suite's hashes, as made by `obtain`.
        Raises: ConfigError if the file is missing or damaged.
        """
        self._config, self.path = config, path
        try:
            self._hashes = HashSet(path)
        except (OSError, ValueError, IndexError) as error:
            raise ConfigError(
                f"data.decontaminate: {path}, the hashes of the suite, cannot be read: {error}; delete it if it "
                "exists, and start again to have it rebuilt"
            ) from None

    @cached_property
    def content_hash(self) -> str:
        """Hash of the whole file, including the bitmap. Raises: OSError if it cannot be read."""
        return hash_file(self.path)

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to look for."""
        return not len(self._hashes)

    @property
    def fingerprint(self) -> dict[str, object]:
        """Values that are equal for two filters only if they drop the same documents."""
        rule = {"match": self._config.match, "min_tokens": self._config.min_tokens}
        return {"version": VERSION, **rule, "hashes": self._hashes.digest}

    @property
    def reason(self) -> str:
        """Return the reason for which documents are dropped."""
        what = f"{self._config.match} of {self._config.min_tokens} words"
        return f"shares a {what}{' or more' * (self._config.match == 'paragraph')} with the suite {self._config.suite}"

    def shares_text(self, texts: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Return bool [documents]: True where a text has a paragraph (an n-gram) of the suite."""
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
    """Open the filter of a suite, making it first if it does not exist. Either way the suite is read.

    Args:
        index_dir: where filters are kept; None = the user's cache.
    Raises: ConfigError if the suite does not exist, or holds nothing to look for, or token ids.
    """
    suites = [suite.find(config.suite, split, "data.decontaminate.suite") for split in config.splits]
    of_ids = [part.source.name for found in suites for part in found.parts if part.source.input_ids_key is not None]
    if of_ids:
        raise ConfigError(
            f"data.decontaminate.suite={config.suite}: its source {of_ids[0]!r} holds token ids; decontamination "
            "compares texts, so give it a suite of texts"
        )
    digests = {shard: digest for found in suites for shard, digest in found.content_hashes().items()}
    named = [name for found in suites for part in found.parts for name in _names(part, digests)]
    key = key_of(VERSION, config.match, config.min_tokens, *named)
    path = (index_dir or user_cache()) / f"headrace-decontaminate-{key:016x}.npy"
    if not is_there(path):
        texts = (document.text or "" for found in suites for document in found.documents())
        HashSet.write(path, *_hashes_of_suite(texts, config))
        _logger.info("%s: %d %ss to keep out of the training", path, len(HashSet(path)), config.match)
    decontaminator = Decontaminator(config, path)
    if decontaminator.is_empty:
        raise ConfigError(
            f"data.decontaminate.suite={config.suite}: no {config.match} of {config.min_tokens} words in it;"
            " lower data.decontaminate.min_tokens, or leave it out"
        )
    return decontaminator


def _names(part: suite.Part, digests: Mapping[str, str]) -> list[str]:
    """List all that the texts of a part of a suite depend on. Args: digests: content hash of each shard."""
    reading = part.as_training_source()
    form = [f"{key}={value}" for key, value in identity_of(reading).items()]
    form += [f"form_version={FORM_VERSION}"] if form else []
    form += [f"{key}={value}" for key, value in reading.selection.items()]
    form += [f"selection_version={SELECTION_VERSION}"] if reading.hash_range else []
    return [reading.text_key, *form, *(digests[shard] for shard in part.shards)]


def _hashes_of_suite(texts: Iterable[str], config: Decontamination) -> tuple[Hashes, Hashes]:
    """Return the (hashes, signatures) of everything in a suite's texts, duplicates mostly removed."""
    found = np.zeros((0, 2), np.uint64)
    pending: list[Hashes] = []
    for text in texts:
        (text,) = comparable([text])
        if config.match == "paragraph":
            # Words are counted only here, since an equal paragraph has equally many
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

    data: bytes  # all texts in UTF-8
    starts: Ints  # [lines]: offset of the first byte
    ends: Ints  # [lines]: offset after the last byte
    owners: Ints  # [lines]: number of the text that each belongs to

    def signatures(self) -> Hashes:
        """Combine each line's length and the 8 bytes at its beginning, middle and end into a number."""
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
    """Find all lines of comparable texts that are long enough to hold `min_words` words."""
    min_bytes = 2 * min_words - 1  # per word at least a letter and a space, or three bytes for a one-character word
    parts = [text.encode() for text in texts]
    data = b"\n".join(parts)
    breaks = np.flatnonzero(np.frombuffer(data, np.uint8) == LINE_FEED)
    starts, ends = np.concatenate([[0], breaks + 1]), np.concatenate([breaks, [len(data)]])
    long = ends - starts >= min_bytes
    starts, ends = starts[long], ends[long]
    _trim(data, starts, ends)
    long = ends - starts >= min_bytes
    starts, ends = starts[long], ends[long]
    before = np.searchsorted(starts, np.cumsum([len(part) + 1 for part in parts]))  # lines before each text's end
    owners = np.repeat(np.arange(len(parts)), np.diff(before, prepend=0))
    data += _filled_up(data, starts, ends)
    return Lines(data, starts, ends, owners)


def _filled_up(data: bytes, starts: Ints, ends: Ints) -> bytes:
    """Return padded copies of the lines that are too short for a signature, to be appended to `data`.

    Move the bounds of these lines to the copies.
    """
    short = np.flatnonzero(ends - starts < _SIGNED_BYTES)
    buffer = np.frombuffer(data + bytes(_SIGNED_BYTES), np.uint8) if len(short) else np.zeros(0, np.uint8)
    places = starts[short, None] + np.arange(_SIGNED_BYTES)
    copies = np.where(places < ends[short, None], buffer[places], np.uint8(_FILLER))
    starts[short] = len(data) + _SIGNED_BYTES * np.arange(len(short))
    ends[short] = starts[short] + _SIGNED_BYTES
    return copies.tobytes()


def _trim(data: bytes, starts: Ints, ends: Ints) -> None:
    """Move the bounds of non-empty stretches inward past white space, in place."""
    buffer, words = np.frombuffer(data, np.uint8), _words_at(data)
    for bounds, step in ((starts, 1), (ends, -1)):
        rest = np.flatnonzero(buffer[bounds if step > 0 else bounds - 1] <= SPACE)
        for width in (8, 1):  # indentation is skipped eight at a time
            moving = rest
            for _ in range(8):
                moving = moving[ends[moving] - starts[moving] >= width]
                at = bounds[moving] if step > 0 else bounds[moving] - width
                moving = moving[words[at] == _EIGHT_SPACES if width == 8 else buffer[at] <= SPACE]
                if not len(moving):
                    break
                bounds[moving] += step * width
        for i in moving.tolist():  # even more white space
            line = data[int(starts[i]) : int(ends[i])]
            left = line.lstrip(_WHITE_SPACE) if step > 0 else line.rstrip(_WHITE_SPACE)
            bounds[i] += step * (len(line) - len(left))


def _words_at(data: bytes) -> Hashes:
    """View every 8 bytes as a number, overlapping ones included."""
    return np.ndarray(max(0, len(data) - 7), "<u8", data, strides=(1,))


def ngrams(texts: Sequence[str], n: int) -> tuple[Hashes, Ints]:
    """Hash all runs of n words of comparable texts; also return the text that each belongs to."""
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
    """Hash each word of a comparable text; also return the character at which it starts.

    A word is a run of letters, digits and their combining marks, or a single Han or Kana character. A word longer than
    a block counts as one word per block.
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
            kinds = kinds[: int(ends[-1]) + 1]  # end the block between words
        goes_on = (kinds[:-1] == LETTER) & (kinds[1:] == LETTER)
        inside = kinds != BETWEEN
        first = np.flatnonzero(inside & ~np.concatenate([[False], goes_on]))
        end = np.flatnonzero(inside & ~np.concatenate([goes_on, [False]])) + 1
        powers, inverse = _powers()
        sums = np.zeros(len(kinds) + 1, np.uint64)
        np.cumsum(known.values.take(codes[: len(kinds)]) * powers[: len(kinds)], out=sums[1:])
        # sum of character_i * P^i over a word, independent of its position; all of it modulo 2^64
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
