"""Windows made ahead: nothing is kept that nobody will take, and what lanes will need is requested in time."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from shards import DataConfig, Loader
from shards.index.shard_index import ShardIndex, build
from shards.plan.segments import Span, WindowId
from shards.windows.recipe import Recipe
from shards.windows.window import SpanTask, Window, WindowMaker, WindowTask
from shards.windows.worker_pool import NOW, WindowRequest, WorkerPool
from shards.windows.worker_process import MAX_DEATHS, WorkerLost
from tests.shards.corpora import config, record, tools_of, words, write_shard


def whole_shard(index: ShardIndex, path: str) -> WindowTask:
    span = Span(0, 0, index.num_records, 0, index.num_records, 0, index.raw_bytes)
    return WindowTask(0, 0, (SpanTask(span, index.raw_range(path, 0, index.raw_bytes)),), index.raw_bytes, 1)


def test_a_cleared_pool_drops_windows_that_were_being_made(tmp_path: Path) -> None:
    path = str(write_shard(tmp_path / "a.jsonl", b"".join(record(words(i, 30)) for i in range(400))))
    data = config([{"name": "a", "paths": [path]}], num_workers=1)
    index = build(path, data.cell_bytes, data.max_decoder_window)
    task = whole_shard(index, path)
    requests = [WindowRequest(WindowId(0, lane, 0, 0), task, 0.0) for lane in range(20)]
    pool = WorkerPool([data], tools_of(data).recipe())
    try:
        for request in requests:
            pool.submit(request)
        pool.wait_for(requests[0])  # the worker is now at a later one
        with pool._lock:
            dropped = [request for request in requests[1:] if request.result is None]
            pool.clear()
        new = WindowRequest(requests[1].name, task, 0.0)
        pool.submit(new)
        again = pool.wait_for(new)  # answers come in order, so those to dropped requests have arrived
        assert dropped
        assert all(request.result is None for request in [*dropped, new])
        assert not pool._waiting
        assert not pool._asked[0]
    finally:
        pool.close()
    assert (again.rows.tokens == WindowMaker([data], tools_of(data)).make(task).rows.tokens).all()


class Recording:
    """A pool that makes windows when they are taken, and records which were requested ahead."""

    ahead = 2

    def __init__(self, stages: Sequence[DataConfig], recipe: Recipe) -> None:
        self._maker = WindowMaker(stages, recipe.open(stages))
        self.asked: set[WindowId] = set()
        self.on_demand: list[WindowId] = []

    def submit(self, request: WindowRequest) -> None:
        if request.due == NOW:
            self.on_demand.append(request.name)
        else:
            self.asked.add(request.name)

    def wait_for(self, request: WindowRequest) -> Window:
        return self._maker.make(request.task)

    def clear(self) -> None:
        self.asked.clear()

    def close(self) -> None:
        self._maker.close()


def test_windows_of_a_source_whose_weight_rises_are_requested_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources: list[dict[str, object]] = []
    for number, name in enumerate("abc"):
        raw = b"".join(record(words(1000 * number + i, 40)) for i in range(200))
        path = str(write_shard(tmp_path / f"{name}.jsonl", raw))
        sources.append({"name": name, "paths": [path], "weight": 1.0 if name == "a" else 0.0})
    changes = ({"step": 6, "weights": {"b": 1.0}}, {"step": 12, "weights": {"a": 0.0, "b": 0.5, "c": 0.5}})
    data = config(sources, lanes=4, num_workers=1, weight_changes=changes)
    monkeypatch.setattr("shards.loader.WorkerPool", Recording)
    with Loader(data, 10) as loader:
        pool = loader.pool
        assert isinstance(pool, Recording)
        drawn = [next(loader).source_tokens for _ in range(30)]
        assert drawn[5].keys() == {"a"}
        assert drawn[6].keys() == {"a", "b"}
        assert drawn[29].keys() == {"b", "c"}
        assert len(pool.asked) > 12
        assert not pool.on_demand


def test_windows_without_rows_do_not_use_up_the_prefetch_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        record(words(i, 40)) if i % 40 < 24 else b'{"text": null, "pad": "%s"}\n' % (b"x" * 200) for i in range(800)
    ]
    path = str(write_shard(tmp_path / "a.jsonl", b"".join(lines)))
    data = config([{"name": "a", "paths": [path]}], lanes=2, num_workers=1, on_bad_record="skip")
    monkeypatch.setattr("shards.loader.WorkerPool", Recording)
    with Loader(data, 2) as loader:
        pool = loader.pool
        assert isinstance(pool, Recording)
        batches = [next(loader) for _ in range(2000)]
        assert sum(len(batch.skipped) for batch in batches) > 200
        # A run of such windows is longer than what is requested ahead.
        assert len(pool.on_demand) < len(pool.asked) / 10


def test_a_worker_starting_while_the_pool_closes_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starting, go = threading.Event(), threading.Event()

    class Late:
        def __init__(self, timeout: float) -> None:
            self._ended = threading.Event()
            starting.set()
            go.wait(10)

        def prepare(self, stages: Sequence[str], recipe: Recipe) -> None:
            pass

        def ask(self, task: WindowTask) -> None:
            pass

        def answer(self) -> None:
            self._ended.wait(10)
            raise WorkerLost("died", MAX_DEATHS)

        def interrupt(self) -> None:
            self._ended.set()

        def kill(self) -> None:
            self._ended.set()

    monkeypatch.setattr("shards.windows.worker_pool.WorkerProcess", Late)
    monkeypatch.setattr("shards.windows.worker_pool.STOP_SECONDS", 0.0)
    path = str(write_shard(tmp_path / "a.jsonl", record(words(1, 30))))
    data = config([{"name": "a", "paths": [path]}], num_workers=1)
    index = build(path, data.cell_bytes, data.max_decoder_window)
    pool = WorkerPool([data], tools_of(data).recipe())
    pool.submit(WindowRequest(WindowId(0, 0, 0, 0), whole_shard(index, path), 0.0))
    assert starting.wait(10)
    pool.close()
    go.set()
    pool._threads[0].join(2)
    assert not pool._threads[0].is_alive()
