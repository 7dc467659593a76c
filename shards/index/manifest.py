"""The indexes of all shards of a source in one file, so that a start reads one file and not one a shard.

shard_index -> manifest -> preparation. A manifest is believed only while the indexes it was made of are as they were.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from shards.index.paths import digest, index_path, index_stamp, store
from shards.index.shard_index import INDEX_VERSION, ShardIndex, hash_tables
from shards.storage import files


class Shard(msgspec.Struct, frozen=True):
    """A shard of a source, and its index."""

    path: str
    index: ShardIndex


class Manifest(msgspec.Struct, frozen=True):
    """The content of a manifest's file."""

    paths: list[str]
    indexes: list[ShardIndex]
    # Manifests of before have none of these, and are made again of the indexes
    index_version: int = 0
    tables: str = ""  # hash of the indexes' record tables
    stamps: list[str] = []  # of the files with the indexes


class Entry(msgspec.Struct, frozen=True):
    """What a manifest says of a shard."""

    index: ShardIndex
    stamp: str  # of the file with its index

    def holds(self, path: str, stat: files.Stat, index_dir: Path | None) -> bool:
        """Tell whether the entry need not be compared with the file of the shard's index.

        Where that was made anew it need not be what the manifest says; where it is gone, nothing contradicts.

        Args:
            path: of the shard.
            stat: of the shard now.
        """
        return self.index.stat == stat and index_stamp(path, index_dir) in ("", self.stamp)


def manifest_path(paths: list[str], index_dir: Path | None, cell_bytes: int) -> Path:
    """Return the place of the manifest of a list of shards."""
    name = f"headrace-{digest([str(cell_bytes), *(part for path in paths for part in files.place(path))])}.manifest"
    return index_path(paths[0], index_dir).with_name(name)


def write(paths: list[str], indexes: list[ShardIndex], index_dir: Path | None, cell_bytes: int) -> None:
    """Write the manifest of a list of shards."""
    stamps = [index_stamp(path, index_dir) for path in paths]
    data = msgspec.msgpack.encode(Manifest(paths, indexes, INDEX_VERSION, hash_tables(indexes), stamps))
    store(manifest_path(paths, index_dir, cell_bytes), data)


def read(path: Path, cell_bytes: int) -> dict[str, Entry]:
    """Read what a manifest says of each shard; nothing if it is missing, damaged, or not of this program's indexes."""
    try:
        manifest = msgspec.msgpack.decode(path.read_bytes(), type=Manifest)
    except (OSError, msgspec.MsgspecError):
        return {}
    versions = {manifest.index_version, *(index.version for index in manifest.indexes)}
    cells = {index.cell_bytes for index in manifest.indexes}
    if versions != {INDEX_VERSION} or cells != {cell_bytes} or hash_tables(manifest.indexes) != manifest.tables:
        return {}
    pairs = zip(manifest.indexes, manifest.stamps, strict=True)
    return dict(zip(manifest.paths, (Entry(*pair) for pair in pairs), strict=True))
