"""A source's paths: only contents decide; nothing is doubled, left out or waited for silently."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pyarrow as pa
import pytest

from shards import (
    DataConfig,
    Loader,
    ShardError,
    check_fingerprint,
    document,
    preparation,
    prepare,
    read_documents,
)
from shards.index.shard_index import build
from shards.storage import files
from tests.shards.corpora import config, record, words, write_shard


def corpus(folder: Path, count: int = 3) -> list[Path]:
    return [
        write_shard(folder / f"{i}.jsonl.zst", b"".join(record(words(1000 * i + j, 20)) for j in range(60)))
        for i in range(count)
    ]


def of(*paths: object, **changes: object) -> DataConfig:
    return config([{"name": "s", "paths": [str(path) for path in paths]}], lanes=2, **changes)


def hashes(data: DataConfig, count: int = 12) -> list[int]:
    with Loader(data, 4) as loader:
        return [batch.row_hash for batch in itertools.islice(loader, count)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_touch_changes_nothing_before_during_or_after_a_run(tmp_path: Path, num_workers: int) -> None:
    paths = corpus(tmp_path)
    data = of(tmp_path / "*.zst", num_workers=num_workers, prefetch_bytes=0)
    expected = hashes(data, 30)
    with Loader(data, 4) as loader:
        got = [next(loader).row_hash]
        for path in paths:
            os.utime(path, (1, 1))
        got += [batch.row_hash for batch in itertools.islice(loader, 29)]
    assert got == expected == hashes(data, 30)


def test_two_nodes_with_their_own_copies_share_an_index_dir(tmp_path: Path) -> None:
    """Read the first node's manifest on a second one, where the same files have other times."""
    paths = corpus(tmp_path / "data")
    data = of(tmp_path / "data/*.zst", index_dir=tmp_path / "shared")
    prepared, expected = prepare(data), hashes(data)
    for path in paths:
        os.utime(path, (7, 7))
    with Loader(data, 4, prepared=prepared) as loader:
        assert [batch.row_hash for batch in itertools.islice(loader, 12)] == expected


def test_a_touched_column_is_judged_by_its_values(tmp_path: Path) -> None:
    def write(texts: list[str]) -> None:
        table = pa.table({"text": texts})
        with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)

    texts = [words(i, 20) for i in range(200)]
    write(texts)
    data = of(f"{tmp_path / 'a.arrow'}#text")
    prepared, expected = prepare(data), hashes(data)
    os.utime(tmp_path / "a.arrow", (1, 1))
    with Loader(data, 4, prepared=prepared) as loader:
        assert [batch.row_hash for batch in itertools.islice(loader, 12)] == expected
    write([text[::-1] for text in texts])
    with Loader(data, 4, prepared=prepared) as loader, pytest.raises(ShardError, match="changed after it was indexed"):
        next(loader)


def test_touching_a_shard_while_it_is_indexed_is_no_change_but_changing_it_is(tmp_path: Path) -> None:
    (path,) = corpus(tmp_path, 1)
    found = build(str(path), 1 << 20, 1 << 27, lambda *_: os.utime(path, (5, 5)))
    assert found.stat == files.stat(str(path))
    plain = write_shard(tmp_path / "a.jsonl", record("one") * 9)
    changed = b" " + plain.read_bytes()[1:]
    with pytest.raises(ShardError, match="changed while it was indexed"):
        build(str(plain), 1 << 20, 1 << 27, lambda *_: plain.write_bytes(changed) and None)


def test_touched_shards_beyond_the_limit_are_reported_and_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = corpus(tmp_path)
    data = of(tmp_path / "*.zst")
    expected = hashes(data)
    for path in paths:
        os.utime(path, (1, 1))
    assert hashes(data.model_copy(update={"max_index_at_start": 10})) == expected
    assert "3 shards" in caplog.text
    assert "touched after they were indexed: the same size, another modification time" in caplog.text
    caplog.clear()
    assert hashes(data) == expected  # within the limit they are compared, and their indexes get the new time
    assert hashes(data.model_copy(update={"max_index_at_start": 10})) == expected
    assert not caplog.text


def test_shards_renamed_into_another_order_are_reported(tmp_path: Path) -> None:
    paths = corpus(tmp_path)
    with Loader(of(tmp_path / "*.zst"), 4) as loader:
        before = loader.fingerprint
    paths[0].rename(tmp_path / "9.jsonl.zst")
    with Loader(of(tmp_path / "*.zst"), 4) as loader:
        now = loader.fingerprint
    with pytest.raises(ShardError, match="same shards in another order") as caught:
        check_fingerprint(before, now)
    in_order = str(caught.value).rpartition("begun with: ")[2].split(", ")
    with Loader(of(*in_order), 4) as loader:
        check_fingerprint(before, loader.fingerprint)


def test_shards_listed_twice_in_a_source_are_reported_and_a_run_with_them_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, _, third = corpus(tmp_path / "v1")
    (tmp_path / "latest").symlink_to("v1")
    monkeypatch.chdir(tmp_path)
    assert hashes(of("v1/*.zst"))
    assert not caplog.text
    assert hashes(of("v1/*.zst", "./v1/0.jsonl.zst"))
    assert "1 of its 4 shards" in caplog.text
    assert "./v1/0.jsonl.zst (the file v1/0.jsonl.zst)" in caplog.text
    caplog.clear()
    assert hashes(of("**/*.zst"))
    assert "3 of its 6 shards" in caplog.text
    caplog.clear()
    third.write_bytes(first.read_bytes())
    assert hashes(of("v1/*.zst"))
    assert "v1/2.jsonl.zst (a copy of v1/0.jsonl.zst)" in caplog.text


def test_files_that_a_glob_ignores_are_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    corpus(tmp_path)
    names = ("c.jsonl.zstd", "d.ndjson", "e.json", "f.JSONL", "g.jsonl.bz2", "h.jsonl.xz", "i.parquet")
    read = ("also.jsonl.gz", "readme.txt", "0.jsonl.zst.index.json", ".hidden.json")
    for name in (*names, *read):
        (tmp_path / name).write_bytes(b"")
    for pattern in ("*", "*.jsonl.zst", "**"):
        caplog.clear()
        files.expand((f"{tmp_path}/{pattern}", f"{tmp_path}/0.*"), "s")
        (message,) = (record.getMessage() for record in caplog.records)
        assert all(str(tmp_path / name) in message for name in names[:5]), pattern
        assert "and 2 more" in message
        assert not any(str(tmp_path / name) in message for name in read)
    caplog.clear()
    files.expand((f"{tmp_path}/0.jsonl.zst", *(str(tmp_path / name) for name in names)), "s")
    assert not caplog.text


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    corpus(tmp_path, 1)
    os.mkfifo(tmp_path / "f.jsonl.zst")
    with pytest.raises(ShardError, match=r"f\.jsonl\.zst: is a pipe"):
        preparation.prepare(of(tmp_path / "*.zst"))
    with pytest.raises(ShardError, match="is a pipe"):
        list(read_documents(tmp_path / "f.jsonl.zst"))


def test_a_file_address_is_a_path(tmp_path: Path) -> None:
    (path,) = corpus(tmp_path, 1)
    expected = hashes(of(path))
    assert hashes(of(f"file://{path}")) == hashes(of(f"file://{tmp_path}/*.zst")) == expected
    assert document(f"file://{path}", 3).text == document(path, 3).text
    assert [one.text for one in read_documents(f"file://{path}")] == [one.text for one in read_documents(path)]


def test_a_file_name_that_is_not_utf8_is_reported(tmp_path: Path) -> None:
    (path,) = corpus(tmp_path, 1)
    path.rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl.zst"))
    with pytest.raises(ShardError, match=r"caf\\xe9\.jsonl\.zst' is not UTF-8.*rename it"):
        prepare(of(tmp_path / "*.zst"))


def test_a_file_name_too_long_for_an_index_is_reported(tmp_path: Path) -> None:
    path = write_shard(tmp_path / ("x" * 240 + ".jsonl"), record("one"))
    with pytest.raises(ShardError, match="give the shard a shorter name"):
        prepare(of(path))
