"""A pass over shards: the same files however it is divided or interrupted; processes that end with their caller."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from shards import DataConfig, HeadraceError, ShardError, preparation
from shards.exposure.passes import make_all
from shards.index.manifest import Shard
from shards.processes import in_processes
from tests.shards.corpora import config, write_three_sources

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_three_sources(tmp_path_factory.mktemp("corpus"), [".jsonl.zst", ".json.gz", ".jsonl"], max_frames=2)


def of(corpus: Path, index_dir: Path, **changes: object) -> tuple[DataConfig, list[list[Shard]]]:
    sources = [{"name": name, "paths": [str(corpus / f"{name}-*")]} for name in "abc"]
    data = config(sources, index_dir=index_dir, **changes)
    return data, [preparation.source_shards(data, source) for source in data.sources]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.texts")}


def test_files_do_not_depend_on_processes_cells_or_interruptions(corpus: Path, tmp_path: Path) -> None:
    alone = of(corpus, tmp_path / "alone")
    made = dict(make_all(*alone, workers=1))
    assert {shard.path for shard in made} == {shard.path for shards in alone[1] for shard in shards}
    assert all(one.seconds and one.num_bytes == one.path.stat().st_size for one in made.values())
    expected = contents(tmp_path / "alone")
    assert len(expected) == 6

    stopped = of(corpus, tmp_path / "stopped", window_bytes=1 << 16)
    passing = make_all(*stopped, workers=2)
    done = {next(passing)[1].path for _ in range(2)}
    passing.close()
    written = {path: path.stat().st_mtime_ns for path in done}
    again = [one for _, one in make_all(*stopped, workers=2)]
    assert done <= {one.path for one in again if not one.seconds}
    assert {path: path.stat().st_mtime_ns for path in done} == written
    assert contents(tmp_path / "stopped") == expected


def test_equal_contents_under_equal_keys_share_a_file(corpus: Path, tmp_path: Path) -> None:
    keys = {"a": "text", "b": "text", "c": "id"}
    sources = [{"name": name, "paths": [str(corpus / "a-0*")], "text_key": key} for name, key in keys.items()]
    data = config(sources, index_dir=tmp_path, on_bad_record="skip")
    shards = [preparation.source_shards(data, source) for source in data.sources]
    assert len(list(make_all(data, shards, workers=1))) == len(contents(tmp_path)) == 2


def test_a_shard_that_fails_is_named_once_the_others_are_done(corpus: Path, tmp_path: Path) -> None:
    data, shards = of(corpus, tmp_path / "index")
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(Path(shards[1][0].path).read_bytes()[:-9])
    broken = [[Shard(str(copy), shards[1][0].index)], *shards[1:], []][: len(shards)]
    done = []
    with pytest.raises(ShardError, match=r"copy\.jsonl: changed after it was indexed"):
        done += [shard for shard, _ in make_all(data, broken, workers=1)]
    assert len(contents(tmp_path / "index")) == 4


def wait_or_fail(folder: Path, task: str) -> str:
    """Do a task of a worker process: end it, raise, or leave its number and wait."""
    if task == "end":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "raise":
        raise HeadraceError("said so")
    if task == "wait":
        (folder / str(os.getpid())).touch()
        time.sleep(600)
    return task * 2


def test_each_task_gets_its_result_or_its_error(tmp_path: Path) -> None:
    tasks = ["a", "raise", "b", "c"]
    found = dict(in_processes(partial(wait_or_fail, tmp_path), tasks, 2))
    assert str(found.pop("raise")) == "said so"
    assert found == {"a": "aa", "b": "bb", "c": "cc"}
    assert not list(in_processes(partial(wait_or_fail, tmp_path), [], 2))
    with pytest.raises(HeadraceError, match="ended with status -9 during end; if memory ran out, use fewer workers"):
        list(in_processes(partial(wait_or_fail, tmp_path), ["end"], 1))


def test_closing_ends_processes_amid_their_tasks(tmp_path: Path) -> None:
    results = in_processes(partial(wait_or_fail, tmp_path), ["wait", "a"], 2)
    assert next(results) == ("a", "aa")
    while not (started := list(tmp_path.iterdir())):
        time.sleep(0.01)
    results.close()
    assert not psutil.pid_exists(int(started[0].name))
