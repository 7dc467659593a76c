"""The shards of each source, found and indexed before a run begins. manifest, shard_index -> preparation -> loader.

One rank prepares; the others read the manifests that it leaves.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec

from shards.config import DataConfig, Decontamination, SourceConfig
from shards.errors import ShardError
from shards.index import manifest
from shards.index.manifest import Shard
from shards.index.paths import index_command
from shards.index.shard_index import Progress, ShardIndex, find, obtain
from shards.records import hf_datasets
from shards.records.document_list import DocumentList
from shards.records.selection import check_take
from shards.records.texts import misfit
from shards.stages import Stage
from shards.storage import files
from shards.storage.atomic import is_there
from shards.storage.block_cache import open_cache
from shards.storage.content_hash import hash_file
from shards.suites import decontaminate
from shards.suites.decontaminate import Decontaminator

_NOT_HERE = "%s is missing here or not as the first rank left it"
_SHARE_FOLDER = "set data.index_dir to a folder that all nodes share"
_RAW_PER_COMPRESSED = 4  # guess of a compressed shard's raw size before it is read

_logger = logging.getLogger(__name__)


class PreparedFile(NamedTuple):
    """A file as `prepare` left it."""

    path: str
    content_hash: str


class Prepared(NamedTuple):
    """All that `prepare` left, so that the other ranks need not search again."""

    manifests: tuple[PreparedFile, ...]  # one per source
    filters: tuple[PreparedFile | None, ...]  # the decontamination's of each stage, where there is one


def prepare(config: DataConfig, progress: Progress | None = None, stages: Sequence[Stage] = ()) -> Prepared:
    """Examine every shard and make missing indexes and missing filters. Call it first, on one rank.

    Args:
        stages: the stages after the first, of which the last has the sources of all.
        progress: called with (shard, compressed bytes read) as the work proceeds, from several threads.
    Returns: what to pass to the Loaders of all ranks, so that they need not examine the shards again.
    Raises: ShardError if a shard is missing or damaged, or more must be indexed than data.max_index_at_start.
    """
    configs = [config, *(stage.data for stage in stages)]
    filters = prepared_filters(configs, None)
    manifests = []
    for source in configs[-1].sources:
        paths = [shard.path for shard in source_shards(config, source, progress)]
        path = manifest.manifest_path(paths, config.index_dir, config.cell_bytes)
        manifests.append(PreparedFile(str(path), hash_file(path)))
    files = tuple(PreparedFile(str(found.path), found.content_hash) if found else None for found in filters)
    return Prepared(tuple(manifests), files)


def prepared_filters(
    stages: Sequence[DataConfig], prepared: Sequence[PreparedFile | None] | None
) -> tuple[Decontaminator | None, ...]:
    """Open the filter of each stage, as `prepare` left them; stages with the same rule share one.

    Args:
        stages: the data config of each stage.
        prepared: None = unknown.
    Raises: as `prepared_filter`.
    """
    opened: dict[Decontamination, Decontaminator | None] = {}
    for config, file in zip(stages, prepared or [None] * len(stages), strict=True):
        if config.decontaminate and config.decontaminate not in opened:
            opened[config.decontaminate] = prepared_filter(config, file)
    return tuple(opened[rule] if (rule := config.decontaminate) else None for config in stages)


def forgotten_lists(stages: Sequence[Stage], shards: Sequence[Sequence[Shard]]) -> tuple[DocumentList | None, ...]:
    """Read the list of documents that each stage forgets. Args: shards: those of each source of the last stage.

    Raises: ConfigError if a list is malformed, or names a shard, line or source that does not exist.
    """
    records = {shard.path: shard.index.num_records for found in shards for shard in found}
    names = [source.name for source in stages[-1].data.sources]
    opened: dict[Path, DocumentList] = {}
    for stage in stages:
        if (path := stage.data.forget) is not None and path not in opened:
            opened[path] = DocumentList(path, "data.forget")
            opened[path].check(records, names)
    return tuple(opened[path] if (path := stage.data.forget) else None for stage in stages)


def prepared_filter(config: DataConfig, prepared: PreparedFile | None) -> Decontaminator | None:
    """Open the filter that the config asks for, as `prepare` left it; make it if that is unknown or not found here.

    Raises: as `decontaminate.obtain`.
    """
    if config.decontaminate is None:
        return None
    if prepared is not None:
        if is_there(path := Path(prepared.path)):
            found = Decontaminator(config.decontaminate, path)
            if found.content_hash == prepared.content_hash:
                return found
        _logger.warning("data.decontaminate: %s, so the suite is read again; %s", _NOT_HERE % path, _SHARE_FOLDER)
    return decontaminate.obtain(config.decontaminate, config.index_dir)


def prepared_shards(config: DataConfig, source: SourceConfig, prepared: PreparedFile) -> list[Shard]:
    """Read the shards of a source as `prepare` found them, here or on another node, without examining them.

    Raises: as `source_shards`, if the manifest is not the one that `prepare` left.
    """
    path = Path(prepared.path)
    if is_there(path) and hash_file(path) == prepared.content_hash:
        return [Shard(shard, found.index) for shard, found in manifest.read(path, config.cell_bytes).items()]
    _logger.warning("source %r: %s, so each shard is examined again; %s", source.name, _NOT_HERE % path, _SHARE_FOLDER)
    return source_shards(config, source)


class IndexStatus(msgspec.Struct, frozen=True):
    """Which shards of a source are indexed, judging by their names, sizes and indexes.

    Attributes:
        stats: the stat of every shard, in the order of the source's patterns.
        indexed: the indexes of shards that are as they were when indexed.
        touched: the indexes of shards of the same size but another stamp, which only their content can confirm.
        unindexed: shards that must be read first.
        unindexed_bytes: estimated raw bytes of those.
        in_manifest: True if every index is the manifest's.
    """

    stats: dict[str, files.Stat]
    indexed: dict[str, ShardIndex]
    touched: dict[str, ShardIndex]
    unindexed: list[str]
    unindexed_bytes: int
    in_manifest: bool

    @property
    def touched_bytes(self) -> int:
        """Compressed bytes to read in order to confirm the touched shards."""
        return sum(self.stats[path].size for path in self.touched)


def shard_paths(source: SourceConfig) -> list[str]:
    """List the paths of a source's shards, in order. Raises: ShardError if a pattern or a data set has none."""
    if source.dataset is not None:
        return hf_datasets.shards_of(source)
    shards = files.with_columns(files.expand(source.paths, source.name), source.column)
    if wrong := misfit(source, shards):
        raise ShardError(f"source {source.name!r}: {wrong}")
    return shards


def index_status(config: DataConfig, source: SourceConfig) -> IndexStatus:
    """Examine a source without reading any shard.

    Raises: ShardError if a pattern matches nothing, or a shard is missing.
    """
    paths = shard_paths(source)
    in_manifest = manifest.read(manifest.manifest_path(paths, config.index_dir, config.cell_bytes), config.cell_bytes)
    stats = {path: files.stat(path) for path in paths}
    indexed: dict[str, ShardIndex] = {}
    touched: dict[str, ShardIndex] = {}
    unindexed: list[str] = []
    whole = bool(in_manifest)
    for path, stat in stats.items():
        listed = in_manifest.get(path)
        index = listed.index if listed and listed.holds(path, stat, config.index_dir) else None
        if index is None:
            index = find(path, config.index_dir, stat, config.cell_bytes)
            whole = False
        if index is None:
            unindexed.append(path)
        else:
            (indexed if index.stat == stat else touched)[path] = index
    guess = sum(
        stats[path].size * (1 if path.endswith(".jsonl") or _is_arrow(path) else _RAW_PER_COMPRESSED)
        for path in unindexed
    )
    return IndexStatus(stats, indexed, touched, unindexed, guess, whole)


def _is_arrow(path: str) -> bool:
    return files.is_column(path) and not files.is_parquet(path)


def source_shards(config: DataConfig, source: SourceConfig, progress: Progress | None = None) -> list[Shard]:
    """List the shards of a source in the order of its patterns, each with a valid index.

    Raises: as `prepare`; also ShardError if no shard of the source holds a document, or it takes records beyond them.
    """
    found = index_status(config, source)
    check_amount(config, source, found)
    paths, indexes = list(found.stats), found.indexed | found.touched
    believed = found.touched_bytes > config.max_index_at_start
    if believed:
        _logger.warning(
            "source %r: %s; that is more than data.max_index_at_start=%.1f GB, so they are not read in advance: each "
            "read is compared with the indexes; to compare them all beforehand: %s",
            source.name,
            describe_touched(found),
            config.max_index_at_start / 1e9,
            indexing_command(config, source, list(found.touched), verify=True),
        )
    stale = [*found.unindexed, *(() if believed else found.touched)]
    indexes |= dict(zip(stale, _obtain_all(config, stale, progress), strict=True))
    if stale or not found.in_manifest:
        manifest.write(paths, [indexes[path] for path in paths], config.index_dir, config.cell_bytes)
    shards = [Shard(path, indexes[path]) for path in paths]
    if not any(shard.index.num_documents for shard in shards):
        raise ShardError(f"source {source.name!r}: no document in {', '.join(paths[:3])}; every line is blank or null")
    check_take(source, sum(shard.index.num_records for shard in shards))
    _say_doubles(source, shards)
    return shards


def _say_doubles(source: SourceConfig, shards: list[Shard]) -> None:
    """Warn of contents that occur more than once in a source; no error, since a run may have begun with them."""
    first: dict[str, str] = {}
    doubles = []
    for shard in shards:
        path, before = shard.path, first.setdefault(shard.index.content_hash, shard.path)
        if before != path:
            same = os.path.realpath(before) == os.path.realpath(path)
            doubles.append(f"{path} ({'the file' if same else 'a copy of'} {before})")
    if doubles:
        _logger.warning(
            "source %r: %d of its %d shards have the same content as another, so their documents are read twice in an "
            "epoch: %s; for a new run, take them out of its paths",
            source.name,
            len(doubles),
            len(shards),
            files.listed(doubles),
        )


def indexing_command(config: DataConfig, source: SourceConfig, paths: Sequence[str] = (), verify: bool = False) -> str:
    """Return the command that makes or verifies the indexes of a source where a run looks for them.

    Args:
        paths: the shards to name if the source is a data set, which has no patterns.
    """
    patterns = source.paths or paths
    limits = config.cell_bytes, config.max_decoder_window
    return index_command(patterns, config.index_dir, *limits, verify, source.column)


def describe_touched(found: IndexStatus) -> str:
    """Describe the touched shards of a source."""
    return (
        f"{len(found.touched)} shards ({found.touched_bytes / 1e9:.1f} GB) were touched after they were indexed: the "
        f"same size, another modification time; e.g. {next(iter(found.touched))}"
    )


def check_amount(config: DataConfig, source: SourceConfig, found: IndexStatus) -> None:
    """Refuse a start that would spend hours on indexing. Raises: ShardError with the command to run first."""
    if found.unindexed_bytes > config.max_index_at_start:
        raise ShardError(
            f"source {source.name!r}: {len(found.unindexed)} shards have no index, about "
            f"{found.unindexed_bytes / 1e9:.1f} GB raw, more than "
            f"data.max_index_at_start={config.max_index_at_start / 1e9:.1f} GB; index them first: "
            + indexing_command(config, source, found.unindexed)
        )


def _obtain_all(config: DataConfig, paths: list[str], progress: Progress | None) -> list[ShardIndex]:
    cache = open_cache(config.remote_cache)
    # Threads suffice for what a start may index, since decoding and hashing release the interpreter's lock. For more,
    # the command that indexes uses processes.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as executor:
        found = executor.map(
            lambda path: obtain(
                path,
                config.index_dir,
                config.cell_bytes,
                config.max_decoder_window,
                progress=progress,
                cache=cache,
            ),
            paths,
        )
        return list(found)
