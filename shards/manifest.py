"""The indexes of all shards of a source, made where they are missing, kept in one file. index -> manifest -> loader."""

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec

from shards import arrow, durable, files, hub
from shards.cache import BlockCache
from shards.config import DataConfig, SourceConfig
from shards.decontaminate import Decontaminator
from shards.errors import ShardError
from shards.index import Progress, ShardIndex, load, obtain
from shards.kept import digest, index_path, store, windows_path

RAW_PER_COMPRESSED = 4  # to guess, before reading it, what a compressed shard unpacks to

logger = logging.getLogger(__name__)


class Shard(msgspec.Struct, frozen=True):
    """A shard of a source, and its index."""

    path: str
    index: ShardIndex


class Manifest(msgspec.Struct, frozen=True):
    """What is kept for a list of patterns, so that a start reads one file and not one per shard."""

    paths: list[str]
    indexes: list[ShardIndex]


class Prepared(NamedTuple):
    """The manifest of a source as `prepare` left it."""

    path: str
    content_hash: str  # of the manifest


def prepare(config: DataConfig, progress: Progress | None = None) -> tuple[Prepared, ...]:
    """Looks at every shard and makes the indexes that are missing. Call it on one rank, first.

    Args:
        progress: is told (shard, compressed bytes read) as the work goes on, from several threads.
    Returns: for each source what the Loaders of all ranks are to be handed, so that they need not look again.
    Raises: ShardError if a shard is missing or damaged, or more is to be indexed than data.max_index_at_start.
    """
    if config.decontaminate:
        Decontaminator.of(config.decontaminate, config.index_dir)
    prepared = []
    for source in config.sources:
        paths = [shard.path for shard in source_shards(config, source, progress)]
        path = _manifest_path(paths, config.index_dir, config.cell_bytes)
        prepared.append(Prepared(str(path), durable.hash_file(path)))
    return tuple(prepared)


def prepared_shards(config: DataConfig, source: SourceConfig, prepared: Prepared) -> list[Shard]:
    """The shards of a source as `prepare` found them, here or on another node, from one file and no look at a shard.

    Raises: as `source_shards`, where the manifest is not the one that `prepare` left.
    """
    path = Path(prepared.path)
    if path.exists() and durable.hash_file(path) == prepared.content_hash:
        return [Shard(shard, index) for shard, index in _read(path).items()]
    logger.warning(
        "source %r: %s is not here as the first rank left it, so each shard is looked at again; set data.index_dir to "
        "a folder that all nodes share",
        source.name,
        path,
    )
    return source_shards(config, source)


class Survey(msgspec.Struct, frozen=True):
    """How the shards of a source stand, as far as their names, sizes and indexes tell.

    Attributes:
        stats: of every shard, in the order of the source's patterns.
        indexed: the indexes that are kept in the manifest and true now.
        unindexed: shards that have to be read first.
        unindexed_bytes: a guess of what those unpack to.
    """

    stats: dict[str, files.Stat]
    indexed: dict[str, ShardIndex]
    unindexed: list[str]
    unindexed_bytes: int


def shard_paths(source: SourceConfig) -> list[str]:
    """The paths of a source's shards, in order. Raises: ShardError for a pattern or a data set that is not there."""
    return files.expand(source.paths, source.name) if source.dataset is None else hub.shards_of(source)


def survey(config: DataConfig, source: SourceConfig) -> Survey:
    """Looks at a source without reading any shard.

    Raises: ShardError if a pattern matches nothing, or a shard is missing.
    """
    paths = shard_paths(source)
    kept = _read(_manifest_path(paths, config.index_dir, config.cell_bytes))
    stats = {path: files.stat(path) for path in paths}
    indexed = {path: kept[path] for path in paths if path in kept and _holds(config, path, kept[path], stats[path])}
    unindexed = [path for path in paths if path not in indexed and _must_read(config, path, stats[path])]
    guess = sum(
        stats[path].size * (1 if path.endswith(".jsonl") or arrow.is_column(path) else RAW_PER_COMPRESSED)
        for path in unindexed
    )
    return Survey(stats, indexed, unindexed, guess)


def source_shards(config: DataConfig, source: SourceConfig, progress: Progress | None = None) -> list[Shard]:
    """The shards of a source in the order of its patterns, each with an index that is true now.

    Raises: as `prepare`; also ShardError if no shard of the source holds a document.
    """
    found = survey(config, source)
    paths, indexes = list(found.stats), dict(found.indexed)
    if stale := [path for path in paths if path not in indexes]:
        check_amount(config, source, found)
        indexes |= dict(zip(stale, _obtain_all(config, stale, progress), strict=True))
        write(paths, [indexes[path] for path in paths], config.index_dir, config.cell_bytes)
    shards = [Shard(path, indexes[path]) for path in paths]
    if not any(shard.index.num_documents for shard in shards):
        raise ShardError(f"source {source.name!r}: no document in {', '.join(paths[:3])}; every line is blank or null")
    return shards


def write(paths: list[str], indexes: list[ShardIndex], index_dir: Path | None, cell_bytes: int) -> None:
    """Writes the manifest of a list of shards."""
    data = msgspec.msgpack.encode(Manifest(paths, indexes))
    store(_manifest_path(paths, index_dir, cell_bytes), data)


def _manifest_path(paths: list[str], index_dir: Path | None, cell_bytes: int) -> Path:
    name = f"headrace-{digest([str(cell_bytes), *(part for path in paths for part in files.place(path))])}.manifest"
    return index_path(paths[0], index_dir).with_name(name)


def _read(path: Path) -> dict[str, ShardIndex]:
    try:
        manifest = msgspec.msgpack.decode(path.read_bytes(), type=Manifest)
    except (OSError, msgspec.MsgspecError):
        return {}
    return dict(zip(manifest.paths, manifest.indexes, strict=True))


def _holds(config: DataConfig, path: str, index: ShardIndex, stat: files.Stat) -> bool:
    """True if what a manifest says of a shard is true, and its windows are not those of an index made later."""
    if index.stat != stat or not index.splices:
        return index.stat == stat
    try:
        return windows_path(index_path(path, config.index_dir)).stat().st_size == index.windows_bytes
    except OSError:
        return True  # an index without windows is as good, only slower


def _must_read(config: DataConfig, path: str, stat: files.Stat) -> bool:
    stored = load(index_path(path, config.index_dir), config.cell_bytes)
    return stored is None or stored.stat != stat


def check_amount(config: DataConfig, source: SourceConfig, found: Survey) -> None:
    """Stops a start that would spend hours on indexing. Raises: ShardError with the command to run first."""
    if found.unindexed_bytes > config.max_index_at_start:
        raise ShardError(
            f"source {source.name!r}: {len(found.unindexed)} shards have no index, about "
            f"{found.unindexed_bytes / 1e9:.1f} GB raw, more than "
            f"data.max_index_at_start={config.max_index_at_start / 1e9:.1f} GB; index them first: "
            "python launch/index.py " + " ".join(repr(pattern) for pattern in source.paths or found.unindexed)
        )


def _obtain_all(config: DataConfig, paths: list[str], progress: Progress | None) -> list[ShardIndex]:
    cache = BlockCache.of(config.remote_cache)
    # Threads will do for what a start may index: decoding and hashing release the interpreter's lock. For more there is
    # launch/index.py, which takes processes.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as executor:
        found = executor.map(
            lambda path: obtain(
                path,
                index_path(path, config.index_dir),
                config.cell_bytes,
                config.max_decoder_window,
                progress=progress,
                cache=cache,
            ),
            paths,
        )
        return list(found)
