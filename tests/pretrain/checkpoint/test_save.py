"""Whatever happens to a save - a kill, a power cut, a failing disk, a flipped bit - a valid checkpoint exists."""

from __future__ import annotations

import errno
import gc
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint.resume import choose
from pretrain.checkpoint.save import Saver
from pretrain.checkpoint.staging import Staging
from pretrain.checkpoint.state import DataState, RunState, read_data, read_state
from pretrain.checkpoint.store import COMPLETE, CheckpointConfig, CheckpointStore
from pretrain.run.events import log_event
from pretrain.run.run_folder import RunFolder
from shards import CheckpointError, ConfigError
from tests.pretrain.checkpoint.disk import KILLED, Disk, Moment, Operation, Recording

PATIENCE = 3000  # checks, 10 ms apart, for what a thread should have done long before


class OneRank:
    """A process group of one that needs no network, so that a forked child can continue with it."""

    rank, world_size, is_main, device = 0, 1, True, torch.device("cpu")

    def broadcast_object(self, value: object) -> object:
        return value

    def gather_objects(self, value: object) -> list[object]:
        return [value]

    def any(self, value: bool) -> bool:
        return value

    def together(self, action: Callable[[], object]) -> object:
        return action()

    def barrier(self) -> None:
        pass


class Model:
    """Two files of tensors, which training changes in place."""

    def __init__(self) -> None:
        self.weights, self.moments = torch.zeros(50), [torch.zeros(20, 10), torch.zeros(7)]

    def train(self, step: int) -> None:
        for tensor in (self.weights, *self.moments):
            tensor.fill_(step)

    def save(self, folder: Path, take: Callable[[Path, object], None]) -> None:
        take(folder / "engine" / "weights.pt", {"weights": self.weights})
        take(folder / "engine" / "optimizer.pt", {"moments": self.moments, "same": self.moments[0]})


class Run:
    """A run folder, and a training that saves to it."""

    def __init__(self, root: Path, **config: object) -> None:
        self.folder, self.model = RunFolder(root), Model()
        self.folder.create()
        settings = CheckpointConfig.model_validate({"keep": 1, "reserve_bytes": 0, **config})
        self.store = CheckpointStore(self.folder.checkpoints, settings, expected_bytes=1000)

    @contextmanager
    def saver(self) -> Iterator[Saver]:
        topology: Any = OneRank()
        with Saver(self.store, self.model, topology, self.folder, None, log_event) as saver:
            yield saver

    def begin(self, saver: Saver, step: int) -> None:
        """Train to a step, start saving it, and train on."""
        self.model.train(step)
        self.folder.metrics.append({"step": step})
        if step == 20:  # the first evaluation makes a file
            self.folder.evals.append({"step": step})
        saver.save(state(step), DataState({"lanes": step}, {}))
        self.model.train(step + 1)

    def save(self, step: int) -> None:
        with self.saver() as saver:
            self.begin(saver, step)
            saver.finish()

    def newest(self) -> int:
        """Choose a checkpoint as a start does, check that every file is of its step, and return that step."""
        topology: Any = OneRank()
        self.store.discard_incomplete()
        choice = choose(self.store, topology)
        checkpoint = choice.checkpoint
        assert checkpoint is not None
        for newer in choice.damaged:
            self.store.set_aside(newer)
        step = checkpoint.step
        assert sorted(path.name for path in checkpoint.folder.iterdir()) == [
            COMPLETE, "data.json", "engine", "state.json",
        ]  # fmt: skip
        assert read_state(checkpoint).step == step
        assert read_data(checkpoint).cursors == {"lanes": step}
        weights = torch.load(checkpoint.folder / "engine" / "weights.pt")["weights"]
        optimizer = torch.load(checkpoint.folder / "engine" / "optimizer.pt")
        assert [t.shape for t in optimizer["moments"]] == [(20, 10), (7,)]
        for tensor in (weights, *optimizer["moments"], optimizer["same"]):
            assert bool((tensor == step).all())
        self.folder.cut_back(step, "resumed")
        assert [record["step"] for record in self.folder.metrics.read()][-1] == step
        if step == 20:
            assert [record["step"] for record in self.folder.evals.read()] == [20]
        return step


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable every fsync, whose effect is tested by simulated power cuts."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def state(step: int) -> RunState:
    return RunState(step, 0, {}, "", restarts=0, config_hash="", tp_size=1, dp_size=1, zero_stage=1)


def two_saves_begun(root: Path) -> Run:
    """Make a run with a checkpoint of step 10, and what a killed save left of step 20."""
    run = Run(root)
    run.save(10)
    run.store.prepare(20)
    run.store.folder_of(20).joinpath("engine", "half.pt").write_bytes(b"half")
    return run


def operations(root: Path) -> list[Operation]:
    """Record what a save of step 20 does to the files, in order."""
    run = two_saves_begun(root)
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(root, patch)
        run.save(20)
    assert run.newest() == 20
    assert {operation.kind for operation in disk.operations} == {
        "create", "write", "fsync", "open", "mkdir", "rename", "unlink", "rmdir",
    }  # fmt: skip
    return disk.operations


def moments(done: list[Operation]) -> Iterator[tuple[int, Moment]]:
    """Yield every moment at which a kill leaves something else on the disk than a kill at the one before."""
    yield 0, "before"
    for number, operation in enumerate(done):
        if operation.kind == "write":
            yield number, "within"
        yield number, "after"


@pytest.mark.distributed
def test_a_kill_at_any_operation_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    done = operations(tmp_path / "whole")
    two_saves_begun(tmp_path / "begun")
    gc.freeze()  # otherwise a collection in the child copies every page of torch's objects
    found = []
    for number, moment in moments(done):
        root = tmp_path / "killed"
        shutil.copytree(tmp_path / "begun", root)
        run = Run(root)
        child = os.fork()
        if child == 0:
            with suppress(BaseException):
                torch.set_num_threads(1)
                Disk(root, pytest.MonkeyPatch(), kill=(number, moment))
                run.save(20)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED, f"{number} {moment}"
        found.append(run.newest())
        run.save(30)
        assert run.newest() == 30, f"{number} {moment}"
        shutil.rmtree(root)
    assert found == sorted(found)
    assert set(found) == {10, 20}


def test_a_power_cut_at_any_operation_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    done = operations(tmp_path / "whole")
    two_saves_begun(tmp_path / "begun")
    recording = Recording(tmp_path / "begun", done_in=tmp_path / "whole")
    found: dict[str, list[int]] = {}
    for operation in done:
        recording.replay(operation)
        folder = tmp_path / "cut"
        folder.mkdir()
        for what in recording.leavings(folder):
            found.setdefault(what, []).append(Run(folder / what).newest())
        shutil.rmtree(folder)
    assert all(steps == sorted(steps) and set(steps) == {10, 20} for steps in found.values())


@pytest.mark.parametrize(
    ("code", "lasting"),
    [(errno.ENOSPC, True), (errno.EACCES, False)],  # one that is a plain OSError, one with a class of its own
)
def test_an_error_at_any_operation_is_reported_and_the_next_save_succeeds(
    tmp_path: Path, code: int, lasting: bool, caplog: pytest.LogCaptureFixture
) -> None:
    count = len(operations(tmp_path / "whole"))
    root = tmp_path / "failing"
    run = Run(root)
    for number in range(count):
        two_saves_begun(root)
        repaired = threading.Event()

        def fail(
            at: int, operation: Operation, number: int = number, repaired: threading.Event = repaired
        ) -> OSError | None:
            of_the_save = operation.path.suffix != ".jsonl" or operation.kind == "fsync"
            due = at >= number if lasting else at == number
            return OSError(code, os.strerror(code)) if due and of_the_save and not repaired.is_set() else None

        caplog.clear()
        with pytest.MonkeyPatch.context() as patch, run.saver() as saver:
            Disk(root, patch, fail)
            run.begin(saver, 20)
            with suppress(CheckpointError):
                saver.finish()
                assert run.store.is_complete(20), f"{number}: a lost save that was not reported"
            if not run.store.is_complete(20):
                assert os.strerror(code) in caplog.text, f"{number}: an error that was not reported"
            assert run.store.steps(), f"{number}: no checkpoint is left"
            repaired.set()
            run.begin(saver, 30)
            saver.finish()
        assert run.newest() == 30
        shutil.rmtree(root)


def test_a_flipped_bit_in_any_file_is_detected(tmp_path: Path) -> None:
    run = Run(tmp_path, keep=2)
    run.save(10)
    run.save(20)
    newest = run.store.folder_of(20)
    files = [path for path in newest.rglob("*") if path.is_file()]
    assert len(files) == 5
    for path in files:
        content = path.read_bytes()
        # COMPLETE vouches for the other files, so many places in it are tried.
        places = range(0, 8 * len(content), 7 if path.name == COMPLETE else 4 * len(content) - 1)
        for place in places:
            flipped = bytearray(content)
            flipped[place // 8] ^= 1 << place % 8
            path.write_bytes(flipped)
            assert damaged(run.store, 20), f"bit {place} of {path.name}"
        assert run.newest() == 10
        run.store.folder_of(20).with_suffix(".damaged").rename(newest)
        path.write_bytes(content)
    assert not damaged(run.store, 20)


def damaged(store: CheckpointStore, step: int) -> bool:
    try:
        return bool(store.open(step).broken_files())
    except CheckpointError:
        return True


def test_a_save_never_overtakes_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(tmp_path, keep=9)
    writing, may_go_on = threading.Event(), threading.Event()

    def wait(at: int, operation: Operation) -> None:
        if operation.kind == "write" and operation.path.name == "optimizer.pt":
            writing.set()
            may_go_on.wait()

    with pytest.MonkeyPatch.context() as patch, run.saver() as saver:
        disk = Disk(tmp_path, patch, wait)
        run.begin(saver, 10)  # training continues while the first file waits for us
        writing.wait()
        assert saver.busy
        saver.settle(busy=True)
        assert not run.store.is_complete(10)
        threading.Timer(0.2, may_go_on.set).start()
        run.begin(saver, 20)
        assert run.store.is_complete(10)
        saver.finish()
    touched = ["step_00000020" in str(operation.path) for operation in disk.operations]
    assert touched.index(True) > max(
        number for number, operation in enumerate(disk.operations) if "step_00000010" in str(operation.path)
    )
    assert run.newest() == 20


def test_a_save_is_completed_during_an_evaluation(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with run.saver() as saver:
        run.begin(saver, 10)
        for _ in range(PATIENCE):
            saver.pulse()
            if run.store.is_complete(10):
                break
            time.sleep(0.01)
        assert run.newest() == 10  # although nothing waited for it
        saver.finish()


def test_a_save_is_completed_once_no_rank_is_busy(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with run.saver() as saver:
        run.begin(saver, 10)
        for _ in range(PATIENCE):
            if not saver.busy:
                break
            time.sleep(0.01)
        assert not saver.busy
        saver.settle(busy=True)  # another rank is busy
        assert run.store.steps() == []
        saver.settle(busy=False)
        saver.finish()
        assert run.store.steps() == [10]
        assert saver.seconds is not None
        assert run.store.open(10).seconds == pytest.approx(saver.seconds, abs=1e-3)


def test_a_failed_save_is_retried_for_the_same_step(tmp_path: Path) -> None:
    run = Run(tmp_path)
    failing = True

    def fail(at: int, operation: Operation) -> OSError | None:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if failing and operation.kind == "write" else None

    run.model.train(20)
    with run.saver() as saver, pytest.MonkeyPatch.context() as patch:
        disk = Disk(run.store.root, patch, fail)
        for succeeds in (False, True, True):
            failing = not succeeds
            saver.save(state(20), DataState({"lanes": 20}, {}))
            saver.settle(busy=False)  # waits for the files
            assert saver.busy is False
        saver.finish()
    assert run.store.steps() == [20]
    assert [operation.to for operation in disk.operations if operation.to] == [run.store.folder_of(20) / COMPLETE]


def test_a_retry_of_the_same_step_does_not_count_as_another_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that a run stopping at a step whose save failed retries it, and still asks to be restarted."""
    run = Run(tmp_path, max_failed_saves=2)
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=0))
    with run.saver() as saver:
        for _ in range(3):
            run.begin(saver, 20)
            assert saver.failed == 1
        with pytest.raises(CheckpointError, match="2 saves in a row have failed"):
            run.begin(saver, 30)


def test_without_a_copy_the_save_is_complete_before_training_continues(tmp_path: Path) -> None:
    run = Run(tmp_path, asynchronous=False)
    with run.saver() as saver:
        run.begin(saver, 10)
        assert run.newest() == 10


def test_what_does_not_fit_is_refused_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path, keep=3, keep_every=20, every=10)
    for step in (10, 20, 30):
        run.save(step)
    size = sum(path.stat().st_size for path in run.store.folder_of(30).rglob("*") if path.is_file())
    capacity = 4 * size  # the fourth fits; after that an old one has to go

    def usage(path: Path) -> Any:
        used = sum(p.stat().st_size for p in run.store.root.rglob("*") if p.is_file())
        return shutil._ntuple_diskusage(capacity, used, capacity - used)  # type: ignore[attr-defined]

    monkeypatch.setattr(shutil, "disk_usage", usage)
    run.save(40)  # 10 is removed, by count
    assert run.store.steps() == [20, 30, 40]
    capacity = 3 * size + size // 2
    run.save(50)  # there is room for only three, so 30 is removed first; 20 is kept forever
    assert run.store.steps() == [20, 40, 50]
    capacity = 2 * size + size // 2
    before = run.store.steps()
    with run.saver() as saver:
        run.begin(saver, 60)
        assert run.store.steps() == before
        assert not run.store.folder_of(60).exists()
        with pytest.raises(CheckpointError, match="step|saved"):
            saver.finish()
    assert "checkpoint.reserve_bytes" in caplog.text
    with pytest.raises(ConfigError, match="does not fit"):
        run.store.check_room()
    assert run.newest() == 50


def test_the_copy_is_compact_is_reused_and_keeps_shared_tensors_shared() -> None:
    staging = Staging(pinned=False)
    flat = torch.arange(12.0)
    content = {"tied": [flat[2:6], flat[2:6]], "turned": flat.view(3, 4).t(), "shape": flat.shape, "n": {"step": 3}}
    first: Any = staging.copy("a", content)
    flat.zero_()
    content["n"]["step"] = 4  # type: ignore[index]
    assert first["tied"][0].tolist() == [2, 3, 4, 5]
    assert first["tied"][0] is first["tied"][1]
    assert first["tied"][0].untyped_storage().nbytes() == 16
    assert first["turned"].tolist() == torch.arange(12.0).view(3, 4).t().tolist()
    assert isinstance(first["shape"], torch.Size)
    assert first["n"] == {"step": 3}
    second: Any = staging.copy("a", content)
    for again, before in ((second["turned"], first["turned"]), (second["tied"][1], first["tied"][0])):
        assert again.data_ptr() == before.data_ptr()


def test_a_failure_other_than_the_disks_is_logged_with_its_traceback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path)
    run.save(10)
    with run.saver() as saver, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", lambda content, file: 1 / 0)
        run.begin(saver, 20)
        with pytest.raises(CheckpointError, match="division"):
            saver.finish()
    assert any(record.exc_info for record in caplog.records if record.levelno == logging.ERROR)
    assert run.newest() == 10


@pytest.mark.parametrize("place", ["engine", COMPLETE, "disk"])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_repeatedly_failing_saves_end_the_run(
    tmp_path: Path, place: str, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, max_failed_saves=3, asynchronous=asynchronous)
    run.save(10)
    failing = True

    def fail(at: int, operation: Operation) -> OSError | None:
        of_the_place = place in str(operation.path) and operation.kind in ("create", "write")
        return OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)) if failing and of_the_place else None

    def save(saver: Saver, step: int) -> int:
        run.begin(saver, step)
        if place == "disk":
            return saver.failed
        saver.end_current()  # one failure is no error
        return saver.failed

    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=0) if failing else usage(path))
    if place != "disk":
        monkeypatch.setattr(shutil, "disk_usage", usage)
    with run.saver() as saver, pytest.MonkeyPatch.context() as patch:
        Disk(tmp_path, patch, fail)
        assert [save(saver, step) for step in (20, 30)] == [1, 2]
        failing = False
        run.begin(saver, 40)
        saver.finish()
        assert saver.failed == 0
        failing = True
        assert [save(saver, step) for step in (50, 60)] == [1, 2]
        with pytest.raises(CheckpointError, match=r"3 saves in a row have failed \(checkpoint\.max_failed_saves\)"):  # noqa: PT012
            run.begin(saver, 70)
            saver.end_current()
        assert saver.failed == 3
    assert run.newest() == 40
