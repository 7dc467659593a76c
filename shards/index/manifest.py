"""The indexes of all shards of a source in one file, so that a start need not read one file per shard.

shard_index -> manifest -> preparation. A manifest is trusted only while the indexes that it copies are unchanged.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from shards.index.paths import digest, index_path, index_stamp, store
from shards.index.shard_index import INDEX_VERSION, ShardIndex, hash_tables
from shards.storage import files


class Shard(msgspec.Struct, frozen=True):
    """A shard of a source and its index."""

    path: str
    index: ShardIndex


class Manifest(msgspec.Struct, frozen=True):
    """The content of a manifest file."""

    paths: list[str]
    indexes: list[ShardIndex]
    # Manifests of earlier versions lack these fields, and are rebuilt from the indexes
    index_version: int = 0
    tables: str = ""  # hash of the indexes' record tables
    stamps: list[str] = []  # stamps of the index files


class IndexedShard(msgspec.Struct, frozen=True):
    """What a manifest says of a shard."""

    index: ShardIndex
    stamp: str  # stamp of its index file

    def holds(self, path: str, stat: files.Stat, index_dir: Path | None) -> bool:
        """Return whether it holds without reading the shard's index file.

        It does not if that file was rebuilt since; a missing index file contradicts nothing.

        Args:
            path: path of the shard.
            stat: the shard's present stat.
        """
        return self.index.stat == stat and index_stamp(path, index_dir) in ("", self.stamp)


def manifest_path(paths: list[str], index_dir: Path | None, cell_bytes: int) -> Path:
    """Return where the manifest of a list of shards is kept."""
    name = f"headrace-{digest([str(cell_bytes), *(part for path in paths for part in files.place(path))])}.manifest"
    return index_path(paths[0], index_dir).with_name(name)


def write(paths: list[str], indexes: list[ShardIndex], index_dir: Path | None, cell_bytes: int) -> None:
    """Write the manifest of a list of shards."""
    stamps = [index_stamp(path, index_dir) for path in paths]
    data = msgspec.msgpack.encode(Manifest(paths, indexes, INDEX_VERSION, hash_tables(indexes), stamps))
    store(manifest_path(paths, index_dir, cell_bytes), data)


def read(path: Path, cell_bytes: int) -> dict[str, IndexedShard]:
    """Read what a manifest says of each shard; nothing if it is missing, damaged, or of another program's indexes."""
    try:
        manifest = msgspec.msgpack.decode(path.read_bytes(), type=Manifest)
    except (OSError, msgspec.MsgspecError):
        return {}
    versions = {manifest.index_version, *(index.version for index in manifest.indexes)}
    cells = {index.cell_bytes for index in manifest.indexes}
    if versions != {INDEX_VERSION} or cells != {cell_bytes} or hash_tables(manifest.indexes) != manifest.tables:
        return {}
    pairs = zip(manifest.indexes, manifest.stamps, strict=True)
    return dict(zip(manifest.paths, (IndexedShard(*pair) for pair in pairs), strict=True))
