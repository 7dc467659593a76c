"""The invariant: a global batch depends on data, config, seed and step, and on nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards import (
    Batch,
    CheckpointError,
    ConfigError,
    DataConfig,
    Loader,
    MaxOverflow,
    OverflowTolerance,
    ShardError,
    Tokenizer,
    batch_after,
    check_fingerprint,
    document,
    merge_states,
    read_documents,
)
from shards.windows.worker_process import WorkerProcess
from tests.examples import examples
from tests.shards.corpora import (
    ROOT,
    SAMPLE,
    TOKENIZER,
    config,
    ranks_of,
    record,
    words,
    write_shard,
    write_three_sources,
)

Row = tuple[int, bytes, bytes]  # slot, tokens, segment ids
SUFFIXES = [".jsonl.zst", ".json.gz", ".jsonl"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write three sources of unlike shards: many short, few long, one with blank lines."""
    return write_three_sources(tmp_path_factory.mktemp("corpus"), SUFFIXES, max_frames=3)


def sources(corpus: Path, weights: tuple[float, ...] = (0.5, 0.3, 0.2), **others: object) -> list[dict[str, object]]:
    return [
        {"name": name, "paths": [str(corpus / f"{name}-*")], "weight": weight, **others}
        for name, weight in zip("abc", weights, strict=True)
    ]


def rows_of(batch: Batch, rank: int, size: int) -> list[Row]:
    return [
        (i * size + rank, tokens.tobytes(), ids.tobytes())
        for i, (tokens, ids) in enumerate(zip(batch.tokens, batch.segment_ids, strict=True))
    ]


def global_batches(
    data: DataConfig, batch: int, count: int, size: int = 1, state: dict[str, object] | None = None, seed: int = 5
) -> tuple[list[list[Row]], list[dict[str, object]]]:
    """Return the global batches that `size` ranks make together, and the merged state after each."""
    loaders = ranks_of(data, batch, seed, size)
    batches, states = [], []
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(json.loads(json.dumps(state)))
    while len(batches) < count:
        parts = [loader.next_batch() for loader in loaders]
        if not any(part.num_rows for part in parts):  # no step: its lanes have run dry, for now or for good
            if all(loader.ended for loader in loaders):
                break
            continue
        batches.append(sorted(row for rank, part in enumerate(parts) for row in rows_of(part, rank, size)))
        states.append(merge_states([loader.state_dict() for loader in loaders]))
    for loader in loaders:
        loader.close()
    return batches, states


POLICIES = st.sampled_from(
    [
        "best_fit",
        "concat",
        "truncate",
        "pad",
        OverflowTolerance(overflow_tolerance=9),
        MaxOverflow(max_overflow=99),
    ]
)


@settings(max_examples=examples(25), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_batches_do_not_depend_on_ranks_or_restarts(corpus: Path, draw: st.DataObject) -> None:
    lanes = draw.draw(st.sampled_from([2, 4, 6, 12]), "lanes")
    batch = draw.draw(st.sampled_from([2, 4, 12, 24]), "batch")
    weights = draw.draw(st.tuples(*[st.floats(0.01, 1.0)] * 3), "weights")
    changes = draw.draw(st.sampled_from([(), ({"step": 3, "weights": {"a": 0.0, "c": 1.0}},)]), "changes")
    epochs = draw.draw(st.sampled_from([None, 1, 2]), "epochs")
    data = config(
        sources(corpus, weights, max_epochs=epochs),
        lanes=lanes,
        packing=draw.draw(POLICIES, "packing"),
        weight_changes=changes,
        window_bytes=draw.draw(st.sampled_from([512, 2048]), "window_bytes"),
    )
    sizes = [size for size in (1, 2, 3, 4, 6) if lanes % size == batch % size == 0]
    expected, states = global_batches(data, batch, 12)
    first, second = (draw.draw(st.sampled_from(sizes), "ranks") for _ in range(2))
    assert global_batches(data, batch, 12, first) == (expected, states)
    stop = draw.draw(st.integers(0, len(states)), "stop")
    count = 2 if len(expected) < 12 else min(2, 12 - stop)  # a run that ended earlier ends there again
    again, after = global_batches(data, batch, count, first, states[stop - 1] if stop else None)
    assert again == expected[stop : stop + 2]
    # R -> R' -> R, resumed from the state of a resumed run.
    if tail := expected[stop + len(after) :][:3]:
        saved = (after or states[:stop] or [None])[-1]
        assert global_batches(data, batch, len(tail), second, saved)[0] == tail


@pytest.mark.distributed
def test_workers_make_the_same_batches(corpus: Path) -> None:
    plain, states = global_batches(config(sources(corpus), lanes=4), 8, 20)
    several = config(sources(corpus), lanes=4, num_workers=3, prefetch_bytes=9000)
    assert global_batches(several, 8, 20) == (plain, states)
    single = config(sources(corpus), lanes=4, num_workers=1, prefetch_bytes=3000)
    assert global_batches(single, 8, 9, 2, states[10])[0] == plain[11:]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write shards of a few hundred rows in all, with an id for each document."""
    folder = tmp_path_factory.mktemp("small")
    for shard in range(3):
        lines = [record(words(i, 3 + i * i % 50), id=f"{shard}-{i}") for i in range(40)]
        write_shard(folder / f"{shard}{SUFFIXES[shard]}", b"".join(lines), frames=2)
    return folder


@settings(max_examples=examples(5), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_a_run_resumes_across_an_epochs_end_with_any_workers_and_ranks(small: Path, draw: st.DataObject) -> None:
    lanes, batch = draw.draw(st.sampled_from([(2, 4), (4, 4), (6, 12)]), "lanes, batch")
    source = {"name": "a", "paths": [str(small / "*")], "max_epochs": draw.draw(st.sampled_from([None, 2]), "epochs")}
    data = config([source], lanes=lanes, packing=draw.draw(POLICIES, "packing"), window_bytes=1024)
    with Loader(data, batch, 5) as loader:
        ends = next(k for k, made in enumerate(loader) if made.epochs["a"] > 1)
    expected, states = global_batches(data, batch, ends + 6)
    stop = draw.draw(st.integers(max(1, ends - 2), min(ends + 2, len(states))), "stop")
    size = draw.draw(st.sampled_from([1, 2]), "ranks")
    workers = draw.draw(st.integers(0, 2), "workers")
    data = data.model_copy(update={"num_workers": workers, "prefetch_bytes": draw.draw(st.sampled_from([0, 8192]))})
    again = global_batches(data, batch, ends + 6 - stop, size, states[stop - 1])
    assert again == (expected[stop:], states[stop:])


@settings(max_examples=examples(5), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lanes=st.sampled_from([2, 3, 7]),
    packing=POLICIES.filter(lambda packing: not isinstance(packing, MaxOverflow)),  # which leaves documents out
    window_bytes=st.sampled_from([512, 2048]),
    workers=st.integers(0, 2),
)
def test_each_document_begins_once_in_each_epoch_whatever_its_lane(
    small: Path, lanes: int, packing: str, window_bytes: int, workers: int
) -> None:
    ids = {
        (document.shard, document.line): document.id
        for path in sorted(small.glob("*"))
        if path.name.endswith(tuple(SUFFIXES))
        for document in read_documents(path)
    }
    source: dict[str, object] = {"name": "a", "paths": [str(small / "*")]}
    data = config([source], lanes=lanes, packing=packing, window_bytes=window_bytes, num_workers=workers)
    begun: dict[int, list[str | None]] = {0: [], 1: [], 2: [], 3: []}
    with Loader(data, lanes) as loader:  # a row of each lane per batch, so the state says which segment it is from
        segments = loader._leg.sources[0].plan.num_segments
        for batch in loader:
            cursors = batch.state["lanes"]
            assert isinstance(cursors, dict)
            epochs = [(cursors[str(v)]["sources"][0][1] * lanes + v) // segments for v in range(lanes)]
            if min(epochs) == 2:
                break
            for origin in batch.origins():
                if origin.start == 0 and origin.stop > 1:  # a row's last token is also the first of the next row
                    begun[min(epochs[origin.slot], 3)].append(ids[origin.shard, origin.line])
    for epoch in (0, 1):
        assert sorted(begun[epoch], key=str) == sorted(ids.values(), key=str)
    assert len(set(ids.values())) == 120


@pytest.mark.parametrize("packing", ["best_fit", "concat", "pad"])
def test_each_document_comes_once_an_epoch_and_complete(corpus: Path, packing: str) -> None:
    """End at the epoch's end with a single lane: every token after a document's first was a target once."""
    data = config([{"name": "all", "paths": [str(corpus / "*")], "max_epochs": 1}], lanes=1, packing=packing)
    tokenizer, wanted = Tokenizer(TOKENIZER), Counter()
    for path in sorted(corpus.glob("*")):
        if not path.name.endswith(tuple(SUFFIXES)):
            continue
        for found in read_documents(path):
            n = len(tokenizer.encode_document(found.text))
            wanted.update((str(path), found.line, t) for t in range(1, n))
    got: Counter[tuple[str, int, int]] = Counter()
    with Loader(data, 1) as loader:
        for batch in loader:
            for origin in batch.origins():
                got.update((origin.shard, origin.line, t) for t in range(origin.start + 1, origin.stop))
    assert got == wanted


def test_a_batch_describes_what_it_holds(corpus: Path) -> None:
    data = config(sources(corpus), lanes=4, packing="pad")
    with Loader(data, 8, seed=3) as loader:
        for batch in (next(loader) for _ in range(5)):
            ids = batch.segment_ids
            assert batch.tokens.dtype == ids.dtype == np.int32
            assert batch.n_targets == ((ids[:, 1:] == ids[:, :-1]) & (ids[:, :-1] > 0)).sum()
            assert batch.padding_tokens == (ids == 0).sum()
            assert sum(batch.source_tokens.values()) == (ids > 0).sum()
            for origin in batch.origins():
                found = document(origin.shard, origin.line, next(s for s in data.sources if s.name == origin.source))
                piece = Tokenizer(TOKENIZER).encode_document(found.text)[origin.start : origin.stop]
                assert piece.tolist() == batch.tokens[origin.slot][: len(piece)].tolist()


def test_squared_lengths_are_those_of_the_segments(corpus: Path) -> None:
    with Loader(config(sources(corpus), lanes=4, seq_len=512), 8, seed=3) as loader:
        for batch in (next(loader) for _ in range(5)):
            lengths = [np.unique(row[row > 0], return_counts=True)[1] for row in batch.segment_ids]
            assert max(map(len, lengths)) > 1
            assert batch.squared_lengths == sum(int((of_row**2).sum()) for of_row in lengths)


def test_row_hashes_add_up_over_ranks_and_differ_between_slots(corpus: Path) -> None:
    data = config(sources(corpus), lanes=4)
    loaders = [Loader(data, 8, 5, *ranks) for ranks in ((0, 1), (0, 2), (1, 2))]
    whole, *halves = (next(loader) for loader in loaders)
    assert whole.row_hash == sum(half.row_hash for half in halves) % 2**64
    assert next(loaders[0]).row_hash != whole.row_hash
    assert next(Loader(data, 8, 6)).row_hash != whole.row_hash


def test_provenance_rebuilds_a_step_from_an_older_state(corpus: Path) -> None:
    data = config(sources(corpus), lanes=4)
    with Loader(data, 8, seed=3) as loader:
        batches = [next(loader) for _ in range(7)]
    for again, batch in ((batch_after(data, 8, 3, batches[2].state, 3), 6), (batch_after(data, 8, 3, None, 1), 1)):
        assert list(again.origins()) == list(batches[batch].origins())
        assert again.row_hash == batches[batch].row_hash


def test_shares_follow_weights_and_their_changes(corpus: Path) -> None:
    data = config(
        sources(corpus, (0.6, 0.3, 0.1)),
        lanes=4,
        packing="truncate",
        weight_changes=[{"step": 50, "weights": {"a": 0.0, "c": 0.7}}],
    )
    before, after = Counter[str](), Counter[str]()
    with Loader(data, 8) as loader:
        for step in range(100):
            rows = Counter(origin.source for origin in next(loader).origins())
            (before if step < 50 else after).update(rows)
    # 4 lanes, each within two rows of its share.
    for counts, shares in ((before, (0.6, 0.3, 0.1)), (after, (0.0, 0.3, 0.7))):
        for name, share in zip("abc", shares, strict=True):
            assert abs(counts[name] - 400 * share) <= 8


def test_an_exhausted_source_leaves_the_rest_to_share(corpus: Path) -> None:
    listed = sources(corpus)
    listed[0]["max_epochs"] = 1
    data = config(listed, lanes=2, packing="truncate")
    with Loader(data, 2) as loader:
        drawn = [Counter(origin.source for origin in next(loader).origins()) for _ in range(400)]
        epochs = next(loader).epochs
    assert not any(counts["a"] for counts in drawn[-200:])
    late = sum(drawn[-200:], Counter())
    assert abs(late["b"] - 400 * 0.6) <= 4
    assert epochs["a"] == 1.0


def test_states_of_another_run_are_refused(corpus: Path) -> None:
    with Loader(config(sources(corpus), lanes=4), 8) as loader:
        next(loader)
        state = loader.state_dict()
    with Loader(config(sources(corpus), lanes=8), 8) as other, pytest.raises(CheckpointError, match=r"data\.lanes=4"):
        other.load_state_dict(state)
    with Loader(config(sources(corpus), lanes=4), 8, 0, 1, 2) as half:
        next(half)
        with pytest.raises(CheckpointError, match="lane 0 of 4"):
            merge_states([half.state_dict()])
        with Loader(config(sources(corpus), lanes=4), 8) as whole, pytest.raises(CheckpointError, match="lacks lane 0"):
            whole.load_state_dict(half.state_dict())
        with pytest.raises(CheckpointError, match="damaged"):
            half.load_state_dict(state | {"lanes": {"1": {"rows": "x"}}})
        with pytest.raises(CheckpointError, match="version 7"):
            half.load_state_dict(state | {"version": 7})


def test_impossible_splits_are_refused_and_possible_ones_listed(corpus: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.global_batch_size=8 cannot be split over 5 .* work: 1, 2, 4, 8$"):
        Loader(config(sources(corpus), lanes=12), 8, 0, 0, 5)


def test_too_few_lanes_for_much_data_are_warned_of_once(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("shards.leg.LARGE_RUN_BYTES", 1)
    for rank in range(4):
        Loader(config(sources(corpus), lanes=8), 8, 0, rank, 4).close()
    assert ["data.lanes=8" in line for line in caplog.messages] == [True]


def test_a_fingerprint_shows_what_differs(corpus: Path, tmp_path: Path) -> None:
    def fingerprint(listed: list[dict[str, object]], **changes: object) -> dict[str, object]:
        with Loader(config(listed, lanes=4, **changes), 8) as loader:
            return json.loads(json.dumps(loader.fingerprint))

    old = fingerprint(sources(corpus))
    check_fingerprint(old, fingerprint(sources(corpus), num_workers=1, prefetch_bytes=1))
    with pytest.raises(ConfigError, match=r"data.seq_len: the run was begun with 32, now it is 16"):
        check_fingerprint(old, fingerprint(sources(corpus), seq_len=16))
    with pytest.raises(ConfigError, match=r"data.sources\[1\].weight"):
        check_fingerprint(old, fingerprint(sources(corpus, (0.5, 0.4, 0.2))))
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in corpus.glob("?-*"):
        if path.name.endswith(tuple(SUFFIXES)):
            (moved / path.name).write_bytes(path.read_bytes())
    check_fingerprint(old, fingerprint(sources(moved)))
    write_shard(moved / "b-3.jsonl.zst", record("changed") * 9)
    with pytest.raises(ShardError, match=r"b-3\.jsonl\.zst.*its content changed"):
        check_fingerprint(old, fingerprint(sources(moved)))
    write_shard(moved / "c-9.jsonl.zst", record("more") * 9)
    (moved / "b-3.jsonl.zst").write_bytes((corpus / "b-3.jsonl.zst").read_bytes())
    with pytest.raises(ShardError, match=r"'c'.*begun with 2 shards, now there are 3"):
        check_fingerprint(old, fingerprint(sources(moved)))


def workers_of(pid: int) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended since it was listed
            if child.status() != psutil.STATUS_ZOMBIE and "shards.windows.worker" in child.cmdline():
                found.append(child)
    return found


def test_lost_and_hung_workers_are_replaced(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wait = WorkerProcess._wait

    def wait_unless_stopped(worker: WorkerProcess, deadline: float) -> bool:
        """Treat a worker as out of time once it is stopped, however slow this machine is."""
        while not wait(worker, time.monotonic() + 0.02):
            if psutil.Process(worker._process.pid).status() == psutil.STATUS_STOPPED:
                return False
        return True

    monkeypatch.setattr(WorkerProcess, "_wait", wait_unless_stopped)
    plain, _ = global_batches(config(sources(corpus), lanes=4), 8, 30)
    data = config(sources(corpus), lanes=4, num_workers=2, prefetch_bytes=0)
    with Loader(data, 8, 5) as loader:
        for step, expected in enumerate(plain):
            assert sorted(rows_of(next(loader), 0, 1)) == expected
            if step % 10 == 5:
                for worker in workers_of(os.getpid())[:1]:
                    os.kill(worker.pid, signal.SIGKILL if step < 10 else signal.SIGSTOP)
    assert not workers_of(os.getpid())


def test_a_window_that_kills_every_worker_is_an_error(corpus: Path) -> None:
    data = config(sources(corpus), lanes=4, num_workers=1, worker_timeout=0.001)
    with Loader(data, 8, 5) as loader, pytest.raises(ShardError, match="3 workers in a row were lost"):
        next(loader)


PROGRAM = """
import signal, sys, time
from shards import Loader
from tests.shards.corpora import config
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits "ignore"
loader = Loader(config([{"name": "a", "paths": [sys.argv[1]]}], num_workers=2), 8)
next(loader)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def loading_process(corpus: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(corpus / "a-*")], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.distributed
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_parent_and_never_load_torch(
    loading_process: subprocess.Popen[str], ending: signal.Signals
) -> None:
    workers = workers_of(loading_process.pid)
    assert len(workers) == 2
    for worker in workers:
        assert not any("torch" in mapped.path for mapped in worker.memory_maps())
    loading_process.send_signal(ending)
    loading_process.wait(timeout=10)
    deadline = time.monotonic() + 5
    while any(worker.is_running() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(worker.is_running() for worker in workers)


def test_the_bundled_sample_streams(tmp_path: Path) -> None:
    data = config(
        [{"name": "pile", "paths": [str(SAMPLE / "pile-*")], "source_from": "meta.pile_set_name"}],
        window_bytes=1 << 16,
        seq_len=128,
        index_dir=tmp_path,  # an index beside the sample would be found by other tests
    )
    with Loader(data, 16) as loader:
        batch = next(loader)
    assert set(batch.source_tokens) <= {
        f"pile/{name}" for name in ("wiki", "books", "code", "docs", "math", "legal", "multilingual", "dialog")
    }
    assert batch.padding_tokens < 0.1 * batch.tokens.size


def test_a_loader_that_cannot_start_workers_says_so(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr("shards.windows.worker_process.subprocess.Popen", refuse)
    with (
        Loader(config(sources(corpus), num_workers=1), 8) as loader,
        pytest.raises(ShardError, match="allocate memory"),
    ):
        next(loader)
