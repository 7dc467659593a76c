"""What a user says of documents -> their places in the sources of a run. document_list, search -> naming.

Shards are named as in a list of documents, by the end of their path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from typing import NamedTuple

import numpy as np

from shards.config import DataConfig
from shards.errors import ConfigError
from shards.exposure.reader import ShardReader
from shards.exposure.search import DocumentPlace, TextSearch
from shards.index.manifest import Shard
from shards.records.document_list import DocumentList, find_shard
from shards.records.json_lines import Records
from shards.records.selection import chosen, of_length, taken_of
from shards.tokenize.parts import token_counts
from shards.tokenize.tokenizer import Tokenizer

_PLACE = re.compile(r"(.+):(\d+)")


class Reading(NamedTuple):
    """What a line of a shard holds."""

    text: str | None  # None = it holds no document
    reason: str  # why not; empty if it does
    left_out: bool = False  # since the source keeps only a part of its records


class Documents:
    """The documents of a run's sources.

    Args:
        data: the config of the run's last stage.
        shards: those of each source.
    """

    def __init__(self, data: DataConfig, shards: Sequence[Sequence[Shard]]) -> None:
        self._data, self._shards = data, shards
        self._tokenizer = Tokenizer.of(data)
        self._records_of = {shard.path: shard.index.num_records for listed in shards for shard in listed}

    def at(self, written: str) -> list[DocumentPlace]:
        """Find a line by SHARD:LINE, in every source that has the shard.

        Raises: ConfigError if that is in another form, or there is no such shard or line.
        """
        match = _PLACE.fullmatch(written)
        if match is None:
            raise ConfigError(f"--doc {written}: write SHARD:LINE, such as {next(iter(self._records_of))}:17")
        return self._places(find_shard(match[1], int(match[2]), self._records_of, f"--doc {written}"), [int(match[2])])

    def listed(self, found: DocumentList, search: Callable[[], TextSearch]) -> list[DocumentPlace]:
        """Find the documents of a list.

        Args:
            search: opens the text indexes, by which ids are looked up.
        Raises: ConfigError if the list names what does not exist, ShardError if a shard cannot be read.
        """
        names = [source.name for source in self._data.sources]
        found.check(self._records_of, names)
        places = []
        for shard, lines in found.lines.items():
            path = find_shard(shard, max(lines), self._records_of, str(found.path))
            places += self._places(path, sorted(lines))
        wanted = [(names.index(source), identity) for source, ids in found.ids.items() for identity in sorted(ids)]
        if wanted:
            matches = search().ids([identity for _, identity in wanted])
            for (source, identity), places_there in zip(wanted, matches, strict=True):
                of_source = [place for place in places_there if place.source == source]
                if not of_source:
                    raise ConfigError(f"{found.path}: source {names[source]!r} has no document with the id {identity}")
                places += of_source
        if found.text_hashes:
            places += self._with_hashes(found)
        return list(dict.fromkeys(places))

    def read(self, places: Iterable[DocumentPlace]) -> dict[DocumentPlace, Reading]:
        """Read what some lines hold. Raises: ShardError if a shard cannot be read."""
        readings = {}
        by_shard: dict[tuple[int, int], list[int]] = {}
        for place in places:
            by_shard.setdefault((place.source, place.shard), []).append(place.line)
        for (source, number), lines in by_shard.items():
            shard = self._shards[source][number]
            cells = np.searchsorted(shard.index.table()[:, 0], np.array(lines) - 1, side="right") - 1
            with closing(ShardReader(self._data, self._data.sources[source], shard)) as reader:
                for cell in np.unique(cells).tolist():
                    records = reader.read(cell, cell + 1)
                    for line in np.array(lines)[cells == cell].tolist():
                        place = DocumentPlace(source, number, line)
                        readings[place] = self._reading(place, records)
        return readings

    def _reading(self, place: DocumentPlace, records: Records) -> Reading:
        """Say what a line holds. Args: records: those of its cell."""
        config, listed = self._data.sources[place.source], self._shards[place.source]
        first, stop = taken_of(config, [shard.index.num_records for shard in listed])[place.shard]
        if not first < place.line <= stop:
            return Reading(None, f"{config.selection_texts['take']} leaves it out", left_out=True)
        if place.line not in records.lines:
            reasons = {bad.line: bad.reason for bad in records.bad}
            return Reading(None, reasons.get(place.line, "the line is blank"))
        if place.line not in chosen(records, config).lines:
            return Reading(None, f"{config.selection_texts['hash_range']} leaves it out", left_out=True)
        if config.has_length_bounds:
            counts = token_counts(self._tokenizer, records.only([records.lines.index(place.line)]))
            if not of_length(counts, config).all():
                texts = config.selection_texts
                bounds = " and ".join(texts[key] for key in ("min_tokens", "max_tokens") if key in texts)
                return Reading(None, f"{bounds} leaves out a document of {int(counts[0]):,} tokens", left_out=True)
        return Reading(records.texts[records.lines.index(place.line)], "")  # empty for token ids

    def path(self, place: DocumentPlace) -> str:
        """Return the path of the shard that holds a document."""
        return self._shards[place.source][place.shard].path

    def _places(self, path: str, lines: Sequence[int]) -> list[DocumentPlace]:
        return [
            DocumentPlace(source, number, line)
            for source, listed in enumerate(self._shards)
            for number, shard in enumerate(listed)
            if shard.path == path
            for line in lines
        ]

    def _with_hashes(self, found: DocumentList) -> list[DocumentPlace]:
        """Find the documents whose texts a list names by hash, which takes a pass over all shards."""
        places = []
        for source, listed in enumerate(self._shards):
            config = self._data.sources[source]
            for number, shard in enumerate(listed):
                with closing(ShardReader(self._data, config, shard)) as reader:
                    for cell in range(len(shard.index.table()) - 1):
                        records = reader.read(cell, cell + 1)
                        flags = found.contains(config.name, shard.path, records).tolist()
                        lines = [line for line, flag in zip(records.lines, flags, strict=True) if flag]
                        places += [DocumentPlace(source, number, line) for line in lines]
        return places
