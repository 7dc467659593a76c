"""What is made ahead: nothing is kept that nobody will take, and what lanes will need is asked for in time."""

import time
from pathlib import Path

from shards.index import build
from shards.pool import WindowId, WorkerPool
from shards.window import WindowMaker, WindowTask
from tests.shards.corpora import config, record, words, write_shard


def test_a_cleared_pool_keeps_nothing_of_what_was_being_made(tmp_path: Path) -> None:
    path = str(write_shard(tmp_path / "a.jsonl", b"".join(record(words(i, 30)) for i in range(400))))
    data = config([{"name": "a", "paths": [path]}], num_workers=1)
    index = build(path, data.cell_bytes, data.max_decoder_window)
    task = WindowTask(0, index.raw_range(path, 0, index.raw_bytes), 0, 400, 1)
    names = [WindowId(0, lane, 0, 0) for lane in range(4)]
    pool = WorkerPool(data)
    try:
        for name in names:
            pool.request(name, task, 0.0)
        pool.take(names[0], task)  # the worker is at the next by now
        pool.clear()
        again = pool.take(names[1], task)
        deadline = time.monotonic() + 10
        while pool._making and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not pool._results
    finally:
        pool.close()
    assert (again.rows.tokens == WindowMaker(data).make(task).rows.tokens).all()
