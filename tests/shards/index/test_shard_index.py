"""The index pass: what it counts and where it cuts, compared with a literal implementation of the definitions."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import pyzstd
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from pretrain.commands import dispatch
from shards import Loader, ShardError, preparation
from shards.index import shard_index
from shards.index.decoders import Decoders
from shards.index.record_table import RecordTable
from shards.index.shard_index import build
from shards.storage import files
from tests.shards.corpora import config, record, words, write_shard

PIECES = st.lists(
    st.sampled_from([b"\n", b"{x}", b"  ", b"\r\n", b"\xef\xbb\xbf", b"{" + b"y" * 30 + b"}"]), max_size=40
)


def reference_cells(raw: bytes, cell_bytes: int) -> list[tuple[int, int]]:
    """Apply the rule of the record table record by record."""
    cells, size, offset = [], 0, 0
    records = raw.split(b"\n")
    lines = [part + b"\n" for part in records[:-1]] + ([records[-1]] if records[-1] else [])
    for number, line in enumerate(lines):
        if not size or size + len(line) > cell_bytes:
            cells.append((number, offset))
            size = 0
        size += len(line)
        offset += len(line)
    return [*cells, (len(lines), offset)]


@given(pieces=PIECES, cell_bytes=st.integers(1, 80), step=st.integers(1, 50))
def test_cells_and_counts_do_not_depend_on_how_bytes_arrive(pieces: list[bytes], cell_bytes: int, step: int) -> None:
    raw = b"".join(pieces)
    table = RecordTable(cell_bytes)
    for i in range(0, len(raw), step):
        table.feed(raw[i : i + step])
    table.finish()
    assert table.cells == reference_cells(raw, cell_bytes)
    assert table.raw_bytes == len(raw)
    assert table.num_documents == sum(bool(line.strip()) for line in raw.split(b"\n"))


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".json.zst", ".jsonl.gz", ".json.gz", ".jsonl"])
def test_every_byte_can_be_reached_through_an_index(tmp_path: Path, suffix: str) -> None:
    raw = b"".join(record(words(i, 20 + i % 50)) for i in range(300))
    path = str(write_shard(tmp_path / f"a{suffix}", raw, frames=4))
    found = shard_index.build(path, cell_bytes=4096, max_window=1 << 27)
    assert (found.raw_bytes, found.num_documents, found.num_records) == (len(raw), 300, 300)
    assert len(np.frombuffer(found.frames, "<i8")) == (2 if suffix == ".jsonl" else 8)
    table, decoders = found.table(), Decoders(1 << 27)
    for cell in np.random.default_rng(0).permutation(len(table) - 1).tolist():
        start, stop = int(table[cell, 1]), int(table[cell + 1, 1])
        assert decoders.read(found.raw_range(path, start, stop)) == raw[start:stop]


def test_the_decoder_window_is_the_largest_of_all_frames(tmp_path: Path) -> None:
    parts = [b"\x5a\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"]
    for window_log in (18, 23, 19):
        parameters = zstandard.ZstdCompressionParameters(window_log=window_log, write_content_size=False)
        data = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        parts.append(data.compress(record("x") * 40) + data.flush())
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(parts))
    index = build(str(path), 4096, 1 << 27)
    assert (index.decoder_window, index.num_frames) == (1 << 23, 3)


def test_frames_of_the_seekable_format_are_entries(tmp_path: Path) -> None:
    raw = b"".join(record(words(i, 20 + i % 50)) for i in range(2000))
    path = str(tmp_path / "a.jsonl.zst")
    with pyzstd.SeekableZstdFile(path, "w", max_frame_content_size=50_000) as file:
        file.write(raw)
    found = build(path, 4096, 1 << 27)
    starts = np.frombuffer(found.frames, "<i8").reshape(-1, 2)[:, 1].tolist()
    assert starts == list(range(0, len(raw), 50_000))
    assert found.raw_bytes == len(raw)
    for start in starts:
        wanted = found.raw_range(path, start, min(start + 30_000, len(raw)))
        assert wanted.frame[1] == start
        assert Decoders(1 << 27).read(wanted) == raw[start : wanted.stop]


def test_an_index_is_reused_until_the_content_changes(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.jsonl.zst", record("one") * 50)
    data = config([{"name": "a", "paths": [str(path)]}])

    def hash_now() -> tuple[str, list[str]]:
        read: list[str] = []
        (shard,) = preparation.source_shards(data, data.sources[0], lambda name, size: read.append(name))
        return shard.index.content_hash, read

    first, read = hash_now()
    assert read
    assert hash_now() == (first, [])
    os.utime(path, (1, 1))
    assert hash_now() == (first, [])  # hashed and found unchanged, not decoded
    path.write_bytes(write_shard(tmp_path / "b.jsonl.zst", record("two") * 50).read_bytes())
    second, read = hash_now()
    assert second != first
    assert read


def test_a_read_only_folder_is_indexed_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_shard(tmp_path / "data/a.jsonl", record("one"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere, so the folder cannot refuse
    preparation.prepare(config([{"name": "a", "paths": [str(path)]}]))
    assert [p.name for p in path.parent.iterdir()] == ["a.jsonl"]
    assert list((tmp_path / "cache").rglob("a.jsonl.*.index.json"))
    preparation.prepare(config([{"name": "a", "paths": [str(path)]}], index_dir=tmp_path / "mine"))
    assert list((tmp_path / "mine").glob("*.manifest"))


def test_a_start_refuses_to_index_for_hours(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.jsonl", record("one") * 100)
    data = config([{"name": "a", "paths": [str(path)]}], max_index_at_start=1000)
    with pytest.raises(ShardError, match=r"1 shards have no index.*python launch/index.py .*a\.jsonl"):
        preparation.prepare(data)


def test_missing_empty_and_wrong_paths_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl.zst").touch()
    (tmp_path / "folder.jsonl").mkdir()
    write_shard(tmp_path / "blank.jsonl.gz", b"\n \n\r\n")
    for paths, message in {
        "none.jsonl": "no such shard",
        "*.nothing": "no shard matches",
        "empty.jsonl.zst": "empty",
        "folder.jsonl": "is a folder",
        "blank.jsonl.gz": "every line is blank",
    }.items():
        with pytest.raises(ShardError, match=message):
            preparation.prepare(config([{"name": "a", "paths": [str(tmp_path / paths)]}]))


def test_other_ranks_read_the_manifest_and_examine_no_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(4):
        write_shard(tmp_path / f"s/{i}.jsonl", record(words(i, 30)) * 9)
    data = config([{"name": "a", "paths": [str(tmp_path / "s/*.jsonl")]}], index_dir=tmp_path / "i")
    prepared = preparation.prepare(data)
    with Loader(data, 2) as loader:
        expected = loader.fingerprint, next(loader).row_hash
    seen: list[str] = []
    stat = files.stat
    monkeypatch.setattr(files, "stat", lambda path, fresh=False: seen.append(path) or stat(path, fresh))
    with Loader(data, 2, prepared=prepared) as loader:
        assert loader.fingerprint == expected[0]
        assert not seen
        assert next(loader).row_hash == expected[1]
        assert seen  # a shard is checked when it is opened
    # Another manifest of the same name, as a node's own folder may have from an earlier run.
    write_shard(tmp_path / "s/2.jsonl", record(words(9, 30)) * 9)
    preparation.prepare(data)
    with Loader(data, 2, prepared=prepared) as loader:
        assert loader.fingerprint != expected[0]
    assert "set data.index_dir to a folder that all nodes share" in caplog.text


def test_the_command_makes_the_same_indexes_as_a_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(12):
        write_shard(tmp_path / f"s/{i:05}.jsonl.zst", record(words(i, 30)))
    data = config([{"name": "a", "paths": [str(tmp_path / "s/*.jsonl.zst")]}], index_dir=tmp_path / "i")
    preparation.prepare(data)
    made_by_start = {path.name: path.read_bytes() for path in (tmp_path / "i").glob("0000*")}
    command = [str(tmp_path / "s/0000*.zst"), "--verify", "--show", "--workers", "1"]
    command += ["--index-dir", str(tmp_path / "j"), "--cell-bytes", str(data.cell_bytes)]
    assert dispatch.run("index", command) == 0
    said = capsys.readouterr().out
    assert "10 shards indexed" in said
    assert said.count("splice points: none: too short to gain from them, at less than 4 MiB raw") == 10
    assert {path.name: path.read_bytes() for path in (tmp_path / "j").glob("0000*")} == made_by_start
    for name in ("00003", "00005"):
        damaged = tmp_path / f"s/{name}.jsonl.zst"
        damaged.write_bytes(damaged.read_bytes()[:-5])
    assert dispatch.run("index", command) == 2
    said = capsys.readouterr().err
    named = [f"{name}.jsonl.zst: the file ends at byte" in said for name in ("00003", "00004", "00005")]
    assert named == [True, False, True]
    assert dispatch.run("index", [str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl: no such shard" in capsys.readouterr().err
