"""Lists of documents, named by their place, their id or their text. file -> document_list -> {window, exposure}.

A list is a file with one JSON object a line, in any of these forms:

    {"shard": "wiki-0003.jsonl.zst", "line": 4711}    the end of the shard's path, from any "/" on, suffices, and of a
                                                      column's FILE.parquet#COLUMN that of FILE.parquet
    {"source": "wiki", "id": "Q42"}                   the record's own id, under the source's id_key
    {"text_hash": "0f3c..."}                          xxh3-128 of the text in UTF-8, 32 hex digits
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from shards.errors import ConfigError
from shards.records.json_lines import Records
from shards.storage import files
from shards.storage.content_hash import hash_file

_FORMS = 'write {"shard": ..., "line": ...}, {"source": ..., "id": ...} or {"text_hash": ...}'
_HASH_DIGITS = 32


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """One line of a list."""

    shard: str | None = None
    line: int | None = None  # counted from 1
    source: str | None = None
    id: str | int | None = None
    text_hash: str | None = None


def hash_of_text(text: str) -> str:
    """Return the hash by which a list names a text."""
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


class DocumentList:
    """A set of documents."""

    def __init__(self, path: Path, key: str) -> None:
        """Read a list.

        Args:
            key: the config's key or the option that names the file, for messages.
        Raises: ConfigError naming the line that is in none of the forms.
        """
        self.path, self._key = path, key
        self.lines: dict[str, set[int]] = {}  # by shard, as written
        self.ids: dict[str, set[str]] = {}  # by source
        self.text_hashes: set[str] = set()
        try:
            self.content_hash = hash_file(path)
            written = path.read_bytes().splitlines()
        except OSError as error:
            raise ConfigError(f"{key}={path}: cannot be read: {error.strerror}") from None
        for number, line in enumerate(written, 1):
            if line.strip():
                self._add(line, number)
        if not len(self):
            raise ConfigError(f"{key}={path}: names no document; {_FORMS}, one object a line")
        self._by_name: dict[str, list[str]] = {}
        for name in self.lines:
            self._by_name.setdefault(_base(name), []).append(name)
        self._lines_of = lru_cache(maxsize=None)(self._find_lines)

    def _add(self, line: bytes, number: int) -> None:
        try:
            entry = msgspec.json.decode(line, type=_Entry)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self._key}={self.path}, line {number}: {error}; {_FORMS}") from None
        match (entry.shard, entry.line, entry.source, entry.id, entry.text_hash):
            case (str(shard), int(place), _, None, None) if place > 0:
                self.lines.setdefault(shard, set()).add(place)
            case (None, None, str(source), str() | int() as identity, None):
                self.ids.setdefault(source, set()).add(str(identity))
            case (None, None, None, None, str(text_hash)) if len(text_hash) == _HASH_DIGITS:
                self.text_hashes.add(text_hash.lower())
            case _:
                raise ConfigError(f"{self._key}={self.path}, line {number}: {line.decode()} is in no form; {_FORMS}")

    def __len__(self) -> int:
        return sum(map(len, self.lines.values())) + sum(map(len, self.ids.values())) + len(self.text_hashes)

    def check(self, records_of: Mapping[str, int], sources: Sequence[str]) -> None:
        """Check that every place exists.

        Args:
            records_of: number of records of each shard, by path.
            sources: names of the sources.
        Raises: ConfigError naming the shard, line or source that does not exist.
        """
        at = f"{self._key}={self.path}"
        by_name: dict[str, dict[str, int]] = {}
        for path, records in records_of.items():
            by_name.setdefault(_base(path), {})[path] = records
        for shard, lines in self.lines.items():
            find_shard(shard, max(lines), by_name.get(_base(shard), records_of), at)
        if unknown := sorted(set(self.ids) - set(sources)):
            raise ConfigError(f"{at}: no source {unknown[0]!r}; there are {list(sources)}")

    def contains(self, source: str, shard: str, records: Records) -> npt.NDArray[np.bool_]:
        """Return bool [documents]: which of a shard's records are in the list.

        Args:
            source: the source's name.
            shard: the shard's path.
        """
        lines, ids = self._lines_of(shard), self.ids.get(source, set())
        found = np.array([line in lines for line in records.lines], np.bool_)
        if ids:
            found |= np.array([identity in ids for identity in records.ids], np.bool_)
        if self.text_hashes:
            found |= np.array([hash_of_text(text) in self.text_hashes for text in records.texts], np.bool_)
        return found

    def _find_lines(self, shard: str) -> frozenset[int]:
        named = self._by_name.get(_base(shard), [])
        return frozenset(line for name in named if _names(name, shard) for line in self.lines[name])


def _base(path: str) -> str:
    return files.file_of(path).rpartition("/")[2]


def find_shard(written: str, line: int, records_of: Mapping[str, int], at: str) -> str:
    """Find the shard that is meant by the end of its path, and check that it has a line.

    Args:
        records_of: number of records of each shard, by path.
        at: what names it, for messages.
    Raises: ConfigError if there is no such shard or line, or several shards may be meant.
    """
    found = [path for path in records_of if _names(written, path)]
    if not found:
        raise ConfigError(f"{at}: no source has a shard {written}; shards are such as {next(iter(records_of))}")
    if len(found) > 1:
        raise ConfigError(f"{at}: {written} may be {' or '.join(found[:3])}; write more of its path")
    if not 1 <= line <= records_of[found[0]]:
        raise ConfigError(f"{at}: {written} has no line {line}; it has {records_of[found[0]]}")
    return found[0]


def _names(written: str, path: str) -> bool:
    return any(name == written or name.endswith(f"/{written}") for name in (path, files.file_of(path)))
