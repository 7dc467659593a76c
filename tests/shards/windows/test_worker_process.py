"""Workers make what the loading process would make, or say why they cannot; none outlives its loader."""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import sentencepiece

from shards import ConfigError, DataConfig, Loader, ShardError
from shards.windows.recipe import Recipe, Tools
from tests.shards.corpora import ROOT, TOKENIZER, config, record, words, write_shard

pytestmark = pytest.mark.distributed

BATCHES = 40


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = b"".join(record(words(i, 20 + i % 50)) for i in range(200))
    return write_shard(tmp_path_factory.mktemp("corpus") / "a.jsonl.zst", raw)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a tokenizer other than the bundled one."""
    prefix = tmp_path_factory.mktemp("tokenizer") / "other"
    texts = iter([words(i, 40) for i in range(300)])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_prefix=str(prefix), vocab_size=400, model_type="bpe", minloglevel=2
    )
    return prefix.with_suffix(".model")


def data_of(shard: Path, **changes: object) -> DataConfig:
    """Make a config with little prefetching, so that a worker started late makes most windows."""
    values: dict[str, object] = {"num_workers": 1, "prefetch_bytes": 0, "window_bytes": 600, "lanes": 2}
    return config([{"name": "a", "paths": [str(shard)]}], **(values | changes))


def hashes(data: DataConfig) -> list[int]:
    with Loader(data, 8) as loader:
        return [batch.row_hash for batch in itertools.islice(loader, BATCHES)]


def workers() -> list[psutil.Process]:
    living = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in living if "shards.windows.worker" in child.cmdline()]


def kill_workers() -> None:
    for worker in workers():
        worker.send_signal(signal.SIGKILL)


@pytest.mark.parametrize("disturbance", ["replaced", "removed"])
def test_a_replacement_worker_refuses_a_changed_tokenizer(
    shard: Path, other_model: Path, tmp_path: Path, disturbance: str
) -> None:
    model = Path(shutil.copy(TOKENIZER, tmp_path / "t.model"))
    with Loader(data_of(shard, tokenizer=model), 8) as loader:
        next(loader)
        if disturbance == "replaced":
            shutil.copy(other_model, tmp_path / "new")
            (tmp_path / "new").replace(model)
        else:
            model.unlink()
        kill_workers()
        with pytest.raises(ConfigError, match=rf"data\.tokenizer=.*t\.model.*({disturbance}|No such file)"):
            list(itertools.islice(loader, BATCHES))
        with pytest.raises(ConfigError, match="tokenizer"):  # and so it remains
            next(loader)


def test_no_process_makes_windows_with_a_tokenizer_replaced_before_the_first(
    shard: Path, other_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "t.model"

    def replace(tools: Tools) -> Recipe:
        shutil.copy(other_model, model)
        return recipe(tools)

    expected, recipe = hashes(data_of(shard)), Tools.recipe
    monkeypatch.setattr(Tools, "recipe", replace)
    shutil.copy(TOKENIZER, model)
    assert hashes(data_of(shard, tokenizer=model, num_workers=0)) == expected  # it has already been read
    shutil.copy(TOKENIZER, model)
    with pytest.raises(ConfigError, match=r"t\.model.*replaced"):
        hashes(data_of(shard, tokenizer=model, num_workers=1))


def test_the_filter_is_passed_on_to_workers_and_compared(shard: Path, tmp_path: Path) -> None:
    lines = [words(i, 20 + i % 50) for i in range(0, 200, 7)]
    write_shard(tmp_path / "suite/val.jsonl", b"".join(record(line) for line in lines))
    filtered = {"suite": tmp_path / "suite", "splits": ("val",)}
    data = data_of(shard, decontaminate=filtered, index_dir=tmp_path / "index")
    expected = hashes(data.model_copy(update={"num_workers": 0}))
    assert expected != hashes(data_of(shard))
    with Loader(data, 8) as loader:
        found = [next(loader).row_hash]
        shutil.rmtree(tmp_path / "suite")  # its hashes exist, so no worker reads it again
        kill_workers()
        found += [batch.row_hash for batch in itertools.islice(loader, BATCHES - 1)]
        assert found == expected
        (file,) = (tmp_path / "index").glob("headrace-decontaminate-*")
        file.write_bytes(file.read_bytes()[:-8] + b"\0" * 8)  # the bitmap now rules out members of the set
        kill_workers()
        with pytest.raises(ConfigError, match=r"headrace-decontaminate-.*replaced"):
            list(itertools.islice(loader, BATCHES))


def test_workers_import_nothing_from_the_current_folder_or_pythonpath(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = hashes(data_of(shard, num_workers=0))
    write_shard(tmp_path / "shards/__init__.py", b"raise RuntimeError('the wrong package')\n")
    write_shard(tmp_path / "queue.py", b"raise RuntimeError('the wrong queue')\n")
    monkeypatch.chdir(tmp_path)
    assert hashes(data_of(shard)) == expected
    (tmp_path / "queue.py").unlink()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert hashes(data_of(shard)) == expected


EDITED = """
import itertools, os, signal, sys
from pathlib import Path
import psutil, shards
from tests.shards.corpora import config
data = config([{"name": "a", "paths": [sys.argv[1]]}], num_workers=1, prefetch_bytes=0, window_bytes=600, lanes=2)
with shards.Loader(data, 8) as loader:
    next(loader)
    file = Path(shards.__file__).with_name("lane.py")  # any module of the package counts
    file.write_text(file.read_text() + "# edited\\n")
    psutil.Process().children()[0].kill()
    list(itertools.islice(loader, 40))
"""


def test_a_replacement_worker_with_other_code_is_refused(shard: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "shards", tmp_path / "shards", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-c", EDITED, str(shard)],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "ShardError: a worker runs another program than the loading process" in done.stderr
    assert "the code of shards/" in done.stderr


def test_a_worker_that_cannot_start_says_why_at_once(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: started.append(args) or popen(*args, **options))
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    with Loader(data_of(shard), 8) as loader, pytest.raises(ShardError, match=r"(?s)could not start.*encodings"):
        next(loader)
    assert len(started) == 1


def test_the_error_includes_what_killed_workers_wrote(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_shard(
        tmp_path / "sitecustomize.py",
        b"import os, sys\nprint('out of luck', file=sys.stderr, flush=True)\nos.kill(os.getpid(), 9)\n",
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Loader(data_of(shard), 8) as loader, pytest.raises(ShardError, match=r"(?s)10 workers in a row.*out of luck"):
        next(loader)
    assert capfd.readouterr().err.count("out of luck") >= 10  # still written to stderr as well


@pytest.fixture
def no_workers() -> Iterator[None]:
    assert not workers()
    yield
    kill_workers()


@pytest.mark.usefixtures("no_workers")
def test_dropping_a_loader_ends_its_workers(shard: Path) -> None:
    loader = Loader(data_of(shard, num_workers=2), 8)
    threads = loader.pool._threads  # type: ignore[attr-defined]
    next(loader)
    running = workers()
    assert running
    del loader
    gc.collect()
    _, left = psutil.wait_procs(running, timeout=30)
    assert not left
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


FORKED = """
import os, sys, threading
from shards import Loader
from tests.shards.corpora import config
loader = Loader(config([{"name": "a", "paths": [sys.argv[1]]}], num_workers=1, prefetch_bytes=0, window_bytes=600), 8)
next(loader)
held, done = threading.Event(), threading.Event()
def hold():
    with loader.pool._lock:
        held.set()
        done.wait()
threading.Thread(target=hold).start()
held.wait()
if not (child := os.fork()):
    done.set()
    sys.exit()  # its copy of the loader does not own the workers, and no thread of it would free the lock
done.set()
assert os.waitpid(child, 0) == (child, 0)
print(sum(1 for _ in zip(range(40), loader)))
"""


def test_a_fork_that_exits_leaves_the_workers_running(shard: Path) -> None:
    command = [sys.executable, "-c", FORKED, str(shard)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout == "40\n"
