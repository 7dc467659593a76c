"""One pass over a shard -> its text index: which record has which text, part of a text, or id.

grams, postings, reader -> text_index -> passes, search. The file holds a header and three tables of postings.
"""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import xxhash

from shards.arrays import greedy_groups
from shards.config import MIB, DataConfig, SourceConfig
from shards.errors import ConfigError, ShardError
from shards.exposure import grams
from shards.exposure.postings import Postings, PostingsWriter, Shape
from shards.exposure.reader import ShardReader
from shards.hashing import key_of
from shards.index.manifest import Shard
from shards.index.paths import index_paths, written_meanwhile
from shards.records.forms import FORM_VERSION, identity_of
from shards.storage import files
from shards.storage.atomic import is_there
from shards.suites import decontaminate

VERSION = 1  # raise it whenever the same shard would give another file
SUFFIX = ".texts"
_HEADER_BYTES = 512


class _Header(msgspec.Struct, frozen=True):
    """The first bytes of the file: what it was made of, and the shapes of its tables."""

    key: int
    content_hash: str
    shapes: tuple[Shape, Shape, Shape]


class Made(NamedTuple):
    """What a shard's text index took."""

    path: Path
    num_bytes: int
    seconds: float  # 0 = it was there


class TextIndex:
    """A shard's text index, mapped into memory. A record's number is counted from 0: its line less one."""

    def __init__(self, path: Path, shard: Shard, key: int) -> None:
        """Open it.

        Args:
            key: as `key_for` computes it.
        Raises: ShardError if it is damaged, or another shard's.
        """
        try:
            with path.open("rb") as file:
                header = msgspec.json.decode(file.read(_HEADER_BYTES), type=_Header)
            offsets = np.cumsum([_HEADER_BYTES, *(shape.num_bytes for shape in header.shapes)]).tolist()
            sound = (header.key, header.content_hash) == (key, shard.index.content_hash)
            sound = sound and path.stat().st_size == offsets[-1]
        except (OSError, msgspec.MsgspecError) as error:
            raise ShardError(f"{path}: cannot be read: {error}; delete it, to have it made again") from None
        if not sound:
            raise ShardError(f"{path}: is not the text index of {shard.path}, or cut short; delete it, to have it made")
        tables = [Postings(path, offset, shape) for offset, shape in zip(offsets, header.shapes, strict=False)]
        self.grams, self.texts, self.ids = tables  # sampled grams; whole texts; ids


def key_for(data: DataConfig, source: SourceConfig, shard: Shard) -> int:
    """Compute the key of all that a shard's text index depends on, its content hash among them."""
    rules = VERSION, decontaminate.VERSION, grams.GRAM_WORDS, grams.STRIDE, int(data.strict_records)
    # An index that was made before an id_key could be dotted lacks the ids that lie inside objects
    form = [f"{FORM_VERSION}: {key}={value}" for key, value in identity_of(source).items()]
    return key_of(*rules, shard.index.content_hash, source.text_key, *source.id_key.split("."), *form)


def places_for(data: DataConfig, source: SourceConfig, shard: Shard) -> list[Path]:
    """Return the places where a shard's text index may be: those of its index. A new one is written to the first."""
    name = f"{files.place(shard.path)[1]}.{key_for(data, source, shard):016x}{SUFFIX}"
    return [place.with_name(name) for place in index_paths(shard.path, data.index_dir)]


def find(data: DataConfig, source: SourceConfig, shard: Shard) -> Path | None:
    """Return where a shard's text index is; None if it has not been made."""
    return next((place for place in places_for(data, source, shard) if is_there(place)), None)


def load(path: Path, data: DataConfig, source: SourceConfig, shard: Shard) -> TextIndex:
    """Open a shard's text index. Raises: ShardError if it is damaged."""
    return TextIndex(path, shard, key_for(data, source, shard))


def obtain(data: DataConfig, source: SourceConfig, shard: Shard) -> Made:
    """Make a shard's text index unless it has been made. Raises: as `build`; ShardError if it is damaged."""
    path = find(data, source, shard)
    if path is None:
        return build(data, source, shard)
    load(path, data, source, shard)
    return Made(path, path.stat().st_size, 0.0)


def build(data: DataConfig, source: SourceConfig, shard: Shard) -> Made:
    """Read a shard once and write its text index; blank and bad records are in none of its tables.

    Raises: ConfigError if the source holds token ids; ShardError if the shard is damaged or changed, or the file cannot
        be written.
    """
    if source.input_ids_key is not None:
        raise ConfigError(
            f"source {source.name!r} holds token ids, among which no text can be searched; name its documents by their "
            "lines"
        )
    begun = time.perf_counter()
    path = places_for(data, source, shard)[0]
    tables = [PostingsWriter(path) for _ in range(3)]
    _read(data, source, shard, tables)
    with written_meanwhile(path) as file:
        file.write(bytes(_HEADER_BYTES))
        first, second, third = (table.write(file) for table in tables)
        header = _Header(key_for(data, source, shard), shard.index.content_hash, (first, second, third))
        file.seek(0)
        file.write(msgspec.json.encode(header).ljust(_HEADER_BYTES))
    return Made(path, path.stat().st_size, time.perf_counter() - begun)


def _read(data: DataConfig, source: SourceConfig, shard: Shard, tables: list[PostingsWriter]) -> None:
    """Read a shard's records into the tables of its grams, texts and ids."""
    offsets = shard.index.table()[:, 1]
    firsts = greedy_groups(offsets, np.array([0, len(offsets) - 1]), MIB).tolist()
    with closing(ShardReader(data, source, shard)) as reader:
        for first, stop in zip(firsts, [*firsts[1:], len(offsets) - 1], strict=True):
            records = reader.read(first, stop)
            numbers = np.array(records.lines, np.int64) - 1
            words = grams.words_of(records.texts)
            hashes, owners = grams.sampled_grams(words)
            tables[0].add(hashes, numbers[owners])
            wordy = np.flatnonzero(np.diff(words.bounds))
            tables[1].add(np.array([grams.hash_of(words.of(i)) for i in wordy.tolist()], np.uint64), numbers[wordy])
            named = [i for i, identity in enumerate(records.ids) if identity is not None]
            tables[2].add(np.array([hash_of_id(str(records.ids[i])) for i in named], np.uint64), numbers[named])


def hash_of_id(identity: str) -> int:
    """Hash a record's id."""
    return xxhash.xxh3_64_intdigest(identity.encode())
