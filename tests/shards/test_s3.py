"""Shards on S3: the same batches as from local files, through a real client and a server on this machine.

Needs the extra `s3`.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from shards import DataConfig, Loader, ShardError, files, remote
from shards.index import build
from tests.shards.corpora import compress, config, record, words

moto_server = pytest.importorskip("moto.server")
s3fs = pytest.importorskip("s3fs")

RAW = [b"".join(record(words(1000 * shard + i, 50 + i % 300)) for i in range(800)) for shard in range(3)]
SHARDS = {f"part-{i}.jsonl.zst": compress(raw, ".zst", frames=3) for i, raw in enumerate(RAW)}


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator["s3fs.S3FileSystem"]:
    """A client of a bucket `data` with the shards in it."""
    monkeypatch.setattr(remote, "BLOCK_BYTES", min(map(len, SHARDS.values())) // 4)
    server = moto_server.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
        ("AWS_ACCESS_KEY_ID", "any"),
        ("AWS_SECRET_ACCESS_KEY", "any"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    client = s3fs.S3FileSystem()
    if not client.exists("data"):  # the server keeps its content in this process
        client.mkdir("data")
    for name, content in SHARDS.items():
        client.pipe(f"data/{name}", content)
    client.pipe("data/readme.txt", b"no shard")
    yield client
    server.stop()


def of(path: str, tmp_path: Path, **changes: object) -> DataConfig:
    return config([{"name": "a", "paths": [path]}], index_dir=tmp_path / "i", window_bytes=1 << 17, lanes=4, **changes)


def hashes(data: DataConfig) -> list[int]:
    with Loader(data, 8, seed=1) as loader:
        return [batch.row_hash for batch in itertools.islice(loader, 20)]


def test_a_glob_on_s3_gives_the_batches_of_local_files(bucket: "s3fs.S3FileSystem", tmp_path: Path) -> None:
    for name, content in SHARDS.items():
        (tmp_path / name).write_bytes(content)
    expected = hashes(of(str(tmp_path / "part-*"), tmp_path))
    for workers in (0, 1):
        assert hashes(of("s3://data/part-*", tmp_path, num_workers=workers)) == expected
    cached = of("s3://data/*", tmp_path, remote_cache={"dir": tmp_path / "cache", "max_bytes": 1 << 24})
    assert hashes(cached) == hashes(cached) == expected
    assert list((tmp_path / "cache").glob("*.block"))


@pytest.mark.parametrize("before_the_start", [True, False])
def test_a_shard_on_s3_that_changes_is_told(
    bucket: "s3fs.S3FileSystem", tmp_path: Path, before_the_start: bool
) -> None:
    data = of("s3://data/*", tmp_path)
    first = hashes(data)
    changed = compress(RAW[1][::-1].replace(b"\n", b"", 1) + b"\n", ".zst")
    if before_the_start:
        bucket.pipe("data/part-1.jsonl.zst", compress(b"".join(sorted(RAW[1].splitlines(True))), ".zst"))
        assert hashes(data) != first
        return
    with Loader(data, 8, seed=1) as loader:
        bucket.pipe("data/part-1.jsonl.zst", changed)
        with pytest.raises(ShardError, match=r"part-1\.jsonl\.zst: changed after it was indexed"):
            list(itertools.islice(loader, 500))


def test_what_is_not_there_is_named(bucket: "s3fs.S3FileSystem", tmp_path: Path) -> None:
    for path, message in (
        ("s3://data/none.jsonl.zst", r"none\.jsonl\.zst: no such shard"),
        ("s3://data/none-*", "no shard matches 's3://data/none-"),
        ("s3://nobody/part-*", "nobody"),
    ):
        with pytest.raises(ShardError, match=message):
            Loader(of(path, tmp_path), 8)


def test_an_index_is_of_what_was_read_and_not_of_what_was_listed_before(bucket: "s3fs.S3FileSystem") -> None:
    path = remote.expand("s3://data/*")[0]
    other = s3fs.S3FileSystem(skip_instance_cache=True)  # as another machine, of whose writes ours knows nothing
    other.pipe("data/part-0.jsonl.zst", SHARDS["part-1.jsonl.zst"])
    index = build(path, 1 << 16, 1 << 27)
    assert index.stat == files.stat(path, fresh=True)
    assert index.raw_bytes == len(RAW[1])
