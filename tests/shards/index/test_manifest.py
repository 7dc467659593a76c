"""Manifests and indexes: what is stored is trusted only while it is right, wherever it is found."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import msgspec
import numpy as np
import pytest

from shards import DataConfig, Loader, ShardError, check_fingerprint, preparation
from shards.index import manifest
from shards.index.manifest import Manifest
from shards.index.paths import INDEX_SUFFIX, index_path
from shards.index.shard_index import load, obtain
from tests.shards.corpora import config, record, words, write_shard


def corpus(folder: Path, seed: int = 0) -> DataConfig:
    for i in range(2):
        lines = [record(words(1000 * i + j + seed, 20)) for j in range(300)]
        write_shard(folder / f"{i}.jsonl", b"".join(lines))
    return config([{"name": "s", "paths": [f"{folder}/*.jsonl"]}], lanes=2)


def hashes(data: DataConfig) -> list[int]:
    with Loader(data, 4) as loader:
        return [batch.row_hash for batch in itertools.islice(loader, 20)]


def reads(data: DataConfig) -> list[str]:
    """List the shards that a start reads."""
    read: list[str] = []
    preparation.prepare(data, lambda path, size: read.append(path))
    return read


def coarser(found: manifest.ShardIndex, version: int) -> manifest.ShardIndex:
    """Make an index as another version might: every second cell, without hashes to check."""
    table = found.table()
    cells = np.concatenate([table[:-1][::2], table[-1:]]).astype("<i8").tobytes()
    return msgspec.structs.replace(found, version=version, cells=cells, checks=b"")


@pytest.mark.parametrize("fault", ["indexes of another version", "no version", "other tables"])
def test_a_manifest_of_other_indexes_is_rebuilt_without_reading_a_shard(tmp_path: Path, fault: str) -> None:
    data = corpus(tmp_path)
    expected = hashes(data)
    (path,) = tmp_path.glob("*.manifest")
    right = path.read_bytes()
    kept = msgspec.msgpack.decode(right, type=Manifest)
    version = 1 if fault == "indexes of another version" else kept.indexes[0].version
    wrong = msgspec.structs.replace(kept, indexes=[coarser(found, version) for found in kept.indexes])
    content = msgspec.to_builtins(wrong, builtin_types=(bytes,))
    if fault == "no version":
        content = {key: content[key] for key in ("paths", "indexes")}
    path.write_bytes(msgspec.msgpack.encode(content))
    assert reads(data) == []
    assert hashes(data) == expected
    assert path.read_bytes() == right


def test_record_tables_are_compared_when_a_run_continues(tmp_path: Path) -> None:
    data = corpus(tmp_path)
    with Loader(data, 4) as loader:
        before = loader.fingerprint
    place = index_path(f"{tmp_path}/0.jsonl", None)
    found = load(place)
    assert found
    place.write_bytes(msgspec.json.encode(coarser(found, found.version)))
    with Loader(data, 4) as loader:
        with pytest.raises(ShardError, match="source 's'.*cut them into other records"):
            check_fingerprint(before, loader.fingerprint)
        begun_long_ago = {key: value for key, value in before.items() if key != "record_tables"}
        check_fingerprint(begun_long_ago, loader.fingerprint)


def test_a_rebuilt_index_is_used_whatever_the_manifest_says(tmp_path: Path) -> None:
    """Find a shard replaced by one of equal size and time with --verify, even of that shard alone."""
    data = corpus(tmp_path)
    assert hashes(data)
    path = tmp_path / "0.jsonl"
    before, times = path.read_bytes(), path.stat()
    path.write_bytes(b"".join(reversed(before.splitlines(keepends=True))))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ShardError, match="size and modification time are as they were.*--verify"):
        hashes(data)
    obtain(str(path), None, data.cell_bytes, data.max_decoder_window, verify=True)
    (kept,) = (found for found in preparation.source_shards(data, data.sources[0]) if found.path == str(path))
    assert kept.index == load(index_path(str(path), None))
    assert hashes(data)


def test_a_manifest_works_without_the_files_of_its_indexes(tmp_path: Path) -> None:
    """Start without the index files: nobody reads them, so a cleanup of old files removes them first."""
    data = corpus(tmp_path)
    expected = hashes(data)
    for path in tmp_path.glob(f"*{INDEX_SUFFIX}"):
        path.unlink()
    assert reads(data) == []
    assert hashes(data) == expected


def test_indexes_beside_the_shards_are_used_if_their_folder_is_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = corpus(tmp_path / "data")
    expected = hashes(data)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    limited = data.model_copy(update={"max_index_at_start": 10})
    assert reads(limited) == []
    assert hashes(limited) == expected
    in_folder = data.model_copy(update={"max_index_at_start": 10, "index_dir": tmp_path / "mine"})
    assert reads(in_folder) == []
    assert hashes(in_folder) == expected
    for path in (tmp_path / "data").glob("*.manifest"):
        path.unlink()
    corpus(tmp_path / "data", seed=7)  # indexes beside the shards are now stale, and cannot be rewritten there
    beside = (tmp_path / "data/0.jsonl.index.json").read_bytes()
    assert len(set(reads(data))) == 2
    assert (tmp_path / "data/0.jsonl.index.json").read_bytes() == beside
    assert reads(data) == []
    assert hashes(data) != expected
