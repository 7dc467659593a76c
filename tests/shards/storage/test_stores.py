"""Shards on S3, Google Cloud Storage and the hub: the same batches as from local files.

Each store is read by its real client from a server on this machine. The first two need s3fs, gcsfs, moto[server] and
gcp-storage-emulator, and are skipped without them unless HEADRACE_REQUIRE_STORES is set.
"""

from __future__ import annotations

import importlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import huggingface_hub
import pytest
from huggingface_hub import constants

from shards import DataConfig, Loader, ShardError
from shards.index.shard_index import build
from shards.storage import files, remote
from tests.shards.corpora import compress, config, record, words
from tests.shards.records.fake_hub import REPOSITORY, FakeHub

pytestmark = pytest.mark.distributed

RAW = [b"".join(record(words(1000 * shard + i, 50 + i % 300)) for i in range(320)) for shard in range(3)]
SHARDS = {f"part-{i}.jsonl.zst": compress(raw, ".zst", frames=3) for i, raw in enumerate(RAW)}


class Store(NamedTuple):
    """A folder in a store."""

    url: str
    put: Callable[[str, bytes], object]  # as from another machine, without updating our client's cached listings


def needed(module: str) -> Any:
    """Import a module that need not be installed."""
    return (importlib.import_module if "HEADRACE_REQUIRE_STORES" in os.environ else pytest.importorskip)(module)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    moto_server, s3fs = needed("moto.server"), needed("s3fs")
    server = moto_server.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    other = s3fs.S3FileSystem(skip_instance_cache=True)
    if not other.exists("data"):  # the server keeps its content in this process
        other.mkdir("data")
    yield Store("s3://data", lambda name, content: other.pipe(f"data/{name}", content))
    server.stop()


@pytest.fixture
def gs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    # Read at import. By default gcsfs asks for a bucket's kind by gRPC, which the emulator does not support.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    emulator, gcsfs = needed("gcp_storage_emulator.server"), needed("gcsfs")
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="data")
    server.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server._api._httpd.server_port}")
    gcsfs.GCSFileSystem.clear_instance_cache()
    other = gcsfs.GCSFileSystem(token="anon", skip_instance_cache=True)
    yield Store("gs://data", lambda name, content: other.pipe(f"data/{name}", content))
    server.stop()


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def hf(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)  # read at import: by workers
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    huggingface_hub.HfFileSystem.clear_instance_cache()
    return Store(
        f"hf://datasets/{REPOSITORY}/data", lambda name, content: hub.files.__setitem__(f"data/{name}", content)
    )


@pytest.fixture(params=["s3", "gs", "hf"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Return a store that holds the shards."""
    monkeypatch.setattr(remote, "BLOCK_BYTES", min(map(len, SHARDS.values())) // 4)
    found: Store = request.getfixturevalue(request.param)
    for name, content in SHARDS.items():
        found.put(name, content)
    found.put("readme.txt", b"no shard")
    return found


def of(path: str, tmp_path: Path, **changes: object) -> DataConfig:
    return config([{"name": "a", "paths": [path]}], index_dir=tmp_path / "i", window_bytes=1 << 17, lanes=4, **changes)


def hashes(data: DataConfig) -> list[int]:
    with Loader(data, 8, seed=1) as loader:
        return [batch.row_hash for batch in itertools.islice(loader, 20)]


def test_a_glob_gives_the_batches_of_local_files(store: Store, tmp_path: Path) -> None:
    for name, content in SHARDS.items():
        (tmp_path / name).write_bytes(content)
    expected = hashes(of(str(tmp_path / "part-*"), tmp_path))
    for workers in (0, 1):
        assert hashes(of(f"{store.url}/part-*", tmp_path, num_workers=workers)) == expected
    cached = of(f"{store.url}/*", tmp_path, remote_cache={"dir": tmp_path / "cache", "max_bytes": 1 << 24})
    assert hashes(cached) == hashes(cached) == expected
    assert list((tmp_path / "cache").glob("*.block"))


def test_no_more_is_fetched_from_the_hub_than_is_read(hf: Store, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", len(SHARDS["part-0.jsonl.zst"]) // 4)
    url = f"{hf.url}/part-0.jsonl.zst"
    hf.put("part-0.jsonl.zst", SHARDS["part-0.jsonl.zst"])
    with remote.RemoteFile(url) as file:
        data = b"".join(iter(lambda: file.read(1000), b""))
    assert data == SHARDS["part-0.jsonl.zst"]
    assert hub.sent == len(data)


def test_a_shard_changed_before_the_start_is_reindexed(store: Store, tmp_path: Path) -> None:
    data = of(f"{store.url}/*", tmp_path)
    first = hashes(data)
    store.put("part-1.jsonl.zst", compress(b"".join(sorted(RAW[1].splitlines(True))), ".zst"))
    assert hashes(data) != first


def test_a_shard_that_changes_during_a_run_ends_it(store: Store, tmp_path: Path) -> None:
    data = of(f"{store.url}/*", tmp_path)
    with Loader(data, 8, seed=1) as loader:
        store.put("part-1.jsonl.zst", compress(RAW[1][::-1].replace(b"\n", b"", 1) + b"\n", ".zst"))
        with pytest.raises(ShardError, match=r"part-1\.jsonl\.zst: changed after it was indexed"):
            list(itertools.islice(loader, 500))


def test_missing_files_are_named(store: Store, tmp_path: Path) -> None:
    for path, message in (
        (f"{store.url}/none.jsonl.zst", r"none\.jsonl\.zst: no such shard"),
        (f"{store.url}/none-*", f"no shard matches '{store.url}/none-"),
    ):
        with pytest.raises(ShardError, match=message):
            Loader(of(path, tmp_path), 8)


def test_an_index_describes_what_was_read_and_not_an_older_listing(store: Store) -> None:
    path = remote.expand(f"{store.url}/*")[0]
    store.put("part-0.jsonl.zst", SHARDS["part-1.jsonl.zst"])
    index = build(path, 1 << 16, 1 << 27)
    assert index.stat == files.stat(path, fresh=True)
    assert index.raw_bytes == len(RAW[1])
