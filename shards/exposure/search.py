"""Texts and ids -> the documents that have them. text_index -> search.

The text indexes name candidates; each of them is read and compared, so that what is found does not depend on hashes of
grams, nor on where in a document the indexed ones begin. Found is exactly: every document that has MIN_WORDS or more
consecutive words of the text, and every document whose words are the text's. An excerpt may begin and end anywhere,
also inside a line; one that is shorter than MIN_WORDS is found only if it is a whole document.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shards.arrays import Ints
from shards.config import DataConfig, SourceConfig
from shards.errors import ConfigError, ShardError
from shards.exposure import grams, text_index
from shards.exposure.grams import MIN_WORDS, HashedText, Overlap
from shards.exposure.reader import ShardReader
from shards.exposure.text_index import TextIndex
from shards.index.manifest import Shard

_SHOWN_CHARACTERS = 60  # of a text, in a message


class DocumentPlace(NamedTuple):
    """Where a document lies."""

    source: int  # number in the config
    shard: int  # number in the source
    line: int  # counted from 1


class TextMatch(NamedTuple):
    """A document that has a text, or part of it."""

    place: DocumentPlace
    id: str | None
    overlap: Overlap


class Candidates(NamedTuple):
    """Pairs of a question and a record of a shard that may answer it."""

    questions: Ints
    records: Ints  # counted from 0


class TextSearch:
    """The text indexes of all shards of a run."""

    def __init__(self, data: DataConfig, shards: Sequence[Sequence[Shard]]) -> None:
        """Find them.

        Args:
            shards: those of each source, in the config's order.
        Raises: ShardError if a text index has not been made.
        """
        self._data = data
        # Each is opened when it is searched, since a process may not map as many files as a run may have shards.
        self._indexes: list[tuple[DocumentPlace, SourceConfig, Shard, Path]] = []
        for number, (source, listed) in enumerate(zip(data.sources, shards, strict=True)):
            for i, shard in enumerate(listed):
                path = text_index.find(data, source, shard)
                if path is None:
                    raise ShardError(f"{shard.path}: has no text index; make those of all shards first")
                self._indexes.append((DocumentPlace(number, i, 0), source, shard, path))

    def texts(self, texts: Sequence[str]) -> list[list[TextMatch]]:
        """Find the documents that share words with each text, in the order of sources, shards and lines.

        Raises: ConfigError for a text that is too short to be searched and is no whole document, ShardError if a shard
            that holds a candidate cannot be read.
        """
        words = grams.words_of(texts)
        asked = [HashedText(words.of(number)) for number in range(len(texts))]
        wholes = np.array([grams.hash_of(one.words) for one in asked], np.uint64)
        parts = [grams.all_grams(one.words if len(one) >= MIN_WORDS else one.words[:0]) for one in asked]
        hashes = np.concatenate([np.zeros(0, np.uint64), *parts])
        owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        found: list[list[TextMatch]] = [[] for _ in texts]

        def candidates(index: TextIndex) -> Candidates:
            which, records = index.grams.find(hashes)
            equal, of_equal = index.texts.find(wholes)
            return Candidates(np.concatenate([owners[which], equal]), np.concatenate([records, of_equal]))

        for numbers, place, text, identity in self._read(candidates):
            document = HashedText(grams.words_of([text]).hashes)
            for number in numbers:
                overlap = grams.overlap_of(asked[number], document)
                if overlap.shared_words:
                    found[number].append(TextMatch(place, identity, overlap))
        for text, one, matches in zip(texts, asked, found, strict=True):
            if len(one) < MIN_WORDS and not matches:
                raise ConfigError(too_short(text, len(one)))
        return found

    def ids(self, ids: Sequence[str]) -> list[list[DocumentPlace]]:
        """Find the documents that have each id. Raises: ShardError if a shard that holds a candidate cannot be read."""
        hashes = np.array([text_index.hash_of_id(identity) for identity in ids], np.uint64)
        found: list[list[DocumentPlace]] = [[] for _ in ids]
        for numbers, place, _, identity in self._read(lambda index: Candidates(*index.ids.find(hashes))):
            for number in numbers:
                if ids[number] == identity:
                    found[number].append(place)
        return found

    def _read(
        self, candidates: Callable[[TextIndex], Candidates]
    ) -> Iterator[tuple[list[int], DocumentPlace, str, str | None]]:
        """Read each candidate once: (the questions that it may answer, its place, its text, its id)."""
        for place, source, shard, path in self._indexes:
            index = text_index.load(path, self._data, source, shard)
            questions, records = candidates(index)
            pairs = np.unique(np.stack([records, questions], axis=1), axis=0)
            cells = np.searchsorted(shard.index.table()[:, 0], pairs[:, 0], side="right") - 1
            with closing(ShardReader(self._data, source, shard)) as reader:
                for cell in np.unique(cells).tolist():
                    found = reader.read(cell, cell + 1)
                    at = {line: i for i, line in enumerate(found.lines)}
                    for record, group in itertools.groupby(pairs[cells == cell].tolist(), key=itemgetter(0)):
                        i = at[record + 1]
                        numbers = [question for _, question in group]
                        yield numbers, place._replace(line=record + 1), found.texts[i], found.ids[i]


def too_short(text: str, num_words: int) -> str:
    """Say why a text cannot be searched."""
    shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
    return (
        f"text {shown!r} has {num_words} words and is no whole document; an excerpt of a document is found from "
        f"{MIN_WORDS} consecutive words on: give more of it"
    )
