"""Every command that a message prints is run as a shell reads it, and does what the message says."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
from pathlib import Path
from unittest import mock

import datasets
import pytest

from pretrain.cluster.preflight import data_findings
from pretrain.commands import dispatch
from shards import DataConfig, Loader, ShardError, open_at
from shards.index import paths
from shards.index.decoders import Decoders
from shards.index.shard_index import obtain
from tests.shards.corpora import ROOT, config, record, words
from tests.shards.index.spliced import CELL, MAX_WINDOW, shard

REFUSING = {"max_index_at_start": 10}
WILLING = {"max_index_at_start": 10**9}


def run(message: str) -> None:
    """Run the command that ends a message: a shell says with which words, and this process runs it with them."""
    found = re.search(r"(rm -f .*; )?python launch/.*", message)
    assert found, message
    said = "python() { printf '%s\\0' \"$@\"; }; " + found[0]
    read = subprocess.run(said, shell=True, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    script, *words = read.split("\0")[:-1]
    assert script == "launch/index.py"
    with contextlib.chdir(ROOT), mock.patch.object(os, "cpu_count", return_value=1):  # a worker takes a second to start
        assert dispatch.run("index", words) == 0


def corpus(folder: Path) -> Path:
    folder.mkdir()
    for i in range(2):
        lines = (record(words(1000 * i + j, 20)) for j in range(300))
        (folder / f"{i}.jsonl").write_bytes(b"".join(lines))
    return folder


def replaced(path: Path) -> None:
    """Replace the content by another of equal size and time."""
    times = path.stat()
    path.write_bytes(b"".join(reversed(path.read_bytes().splitlines(keepends=True))))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def batches(data: DataConfig, **changes: object) -> int:
    with Loader(data.model_copy(update=changes), 4) as loader:
        return len(list(itertools.islice(loader, 20)))


def odd_settings(tmp_path: Path) -> DataConfig:
    """Return a config whose every setting appears in the command, with a pattern that a shell would split."""
    folder = corpus(tmp_path / "it's a folder")
    source = {"name": "s", "paths": [f"{folder}/*.jsonl"]}
    return config([source], lanes=2, index_dir=tmp_path / "i x", max_decoder_window=1 << 26, **REFUSING)


def test_the_command_of_a_refused_start_makes_the_indexes_it_looks_for(tmp_path: Path) -> None:
    data = odd_settings(tmp_path)
    with pytest.raises(ShardError, match="2 shards have no index") as caught:
        batches(data)
    (note,) = data_findings(data.model_copy(update=WILLING))
    command = re.compile("python launch/index.py.*")
    assert command.findall(note.text) == command.findall(str(caught.value))
    run(str(caught.value))
    assert batches(data) == 20
    (found,) = data_findings(data)
    assert found.level == "ok"


def test_the_columns_of_a_data_set_are_indexed_by_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = datasets.Dataset.from_dict({"text": [words(i, 20) for i in range(300)]})
    rows.save_to_disk(tmp_path / "a set", num_shards=2)
    data = config([{"name": "s", "dataset": str(tmp_path / "a set")}], lanes=2, **REFUSING)
    with pytest.raises(ShardError, match="2 shards have no index") as caught:
        batches(data)
    run(str(caught.value))
    assert batches(data) == 20


def test_touched_shards_are_compared_by_the_printed_command(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = odd_settings(tmp_path)
    batches(data, **WILLING)
    for path in tmp_path.rglob("*.jsonl"):
        os.utime(path, (1, 1))
    batches(data)
    (warning,) = (one.getMessage() for one in caplog.records if "touched" in one.getMessage())
    run(warning)
    caplog.clear()
    assert batches(data) == 20
    assert "touched" not in caplog.text


@pytest.mark.parametrize("touched", [False, True])
def test_a_replaced_shard_is_reindexed_by_the_printed_command(tmp_path: Path, touched: bool) -> None:
    data = odd_settings(tmp_path)
    batches(data, **WILLING)
    replaced(tmp_path / "it's a folder/0.jsonl")
    if touched:
        os.utime(tmp_path / "it's a folder/0.jsonl", (1, 1))
    said = "changed after it was indexed" if touched else "size and modification time are as they were"
    with pytest.raises(ShardError, match=said) as caught:
        batches(data)
    run(str(caught.value))
    assert batches(data) == 20


def test_a_replaced_shard_opened_directly_is_reindexed_by_the_printed_command(tmp_path: Path) -> None:
    path = corpus(tmp_path / "a") / "0.jsonl"
    with open_at(path) as file:
        file.readline()
    replaced(path)
    with (
        open_at(path) as file,
        pytest.raises(ShardError, match="size and modification time are as they were") as caught,
    ):
        file.readline()
    run(str(caught.value))
    with open_at(path) as file:
        assert file.read() == path.read_bytes()


@pytest.mark.usefixtures("near")
def test_invalid_entries_are_rebuilt_by_the_printed_command(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a b.jsonl.zst"
    path.write_bytes(shard("level 3, window of 128 KiB"))
    index = obtain(str(path), None, CELL, MAX_WINDOW)
    paths.history_path(paths.index_path(str(path), None)).unlink()
    start = int(index.table()[-2, 1])

    def replays() -> int:
        index = obtain(str(path), None, CELL, MAX_WINDOW)
        decoders = Decoders(MAX_WINDOW, cell_bytes=CELL)
        decoders.read(index.raw_range(str(path), start, index.raw_bytes))
        return decoders.replays

    assert replays() == 1
    (warning,) = (one.getMessage() for one in caplog.records)
    run(warning)
    assert replays() == 0
