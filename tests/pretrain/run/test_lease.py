"""The lease: only one of several live processes holds it; a dead one's is free at once or after its silence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil
import pytest

from pretrain.run.lease import Holder, Lease
from shards import HeadraceError

SILENCE = 1000.0  # seconds that no test waits

HOLD = f"""
import sys, time; from pathlib import Path; from pretrain.run.lease import Lease
with Lease(Path(sys.argv[1]), sys.argv[2] or None, heartbeat=0.1, silence={SILENCE}) as lease:
    print("held", flush=True)
    try:
        while True:
            lease.check()
            time.sleep(0.02)
    except Exception:
        print("lost", flush=True)
        time.sleep(60)
"""


@contextmanager
def holding(path: Path, job_id: str = "") -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), job_id], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def lease(path: Path, job_id: str | None = None) -> Lease:
    return Lease(path, job_id, heartbeat=0.1, silence=SILENCE)


def pretend(path: Path, **changed: object) -> None:
    """Make the holder look like another one, for example a process on another host."""
    holder = msgspec.json.decode(path.read_bytes(), type=Holder)
    with path.open("r+b") as file:  # in place, since its holder identifies it by its inode
        file.truncate()
        file.write(msgspec.json.encode(msgspec.structs.replace(holder, **changed)))


def silence(path: Path, seconds: float) -> None:
    """Make the holder's last sign of life older by some seconds."""
    modified = path.stat().st_mtime - seconds
    os.utime(path, (modified, modified))


def check_for_ever(mine: Lease) -> None:
    while True:
        mine.check()
        time.sleep(0.01)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(seconds: float) -> None:
        raise AssertionError("it waits")

    monkeypatch.setattr(time, "sleep", sleep)


@pytest.fixture
def waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let a third of the silence pass, instead of a moment, wherever the contender waits; list these moments."""
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        silence(tmp_path / "lease", SILENCE / 3)

    monkeypatch.setattr(time, "sleep", sleep)
    return waited


@pytest.mark.usefixtures("no_waiting")
def test_a_second_live_process_is_refused_at_once_and_told_who_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    with holding(path, "4711") as holder:
        with (
            pytest.raises(HeadraceError, match=rf"in use by job 4711, process {holder.pid} on .*run\.name"),
            lease(path),
        ):
            pass
        with pytest.raises(HeadraceError), lease(path, "4711"):  # the same job, but alive
            pass


def test_a_process_killed_on_this_host_frees_the_lease_at_once(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path = tmp_path / "lease"
    with holding(path) as holder:
        holder.send_signal(signal.SIGKILL)
        while psutil.Process(holder.pid).status() != psutil.STATUS_ZOMBIE:  # nobody has waited for it
            time.sleep(0.01)
        request.getfixturevalue("no_waiting")
        with lease(path) as mine:
            mine.check()
    assert not path.exists()


@pytest.mark.parametrize("job_id", ["8", None])
def test_a_process_dead_on_another_host_frees_the_lease_after_its_silence(
    tmp_path: Path, waits: list[float], job_id: str | None
) -> None:
    path = tmp_path / "lease"
    with holding(path, "7"):
        pass
    pretend(path, host="elsewhere")
    with lease(path, job_id):
        assert len(waits) == 3


@pytest.mark.usefixtures("no_waiting")
def test_the_same_job_on_another_host_gets_the_lease_at_once(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    with holding(path, "7"):
        pass
    pretend(path, host="elsewhere")
    with lease(path, "7") as mine:
        mine.check()


@pytest.mark.parametrize("changed", [{"host": "elsewhere"}, {"pid_space": "another container"}])
def test_a_live_process_elsewhere_is_recognized_by_its_next_heartbeat(tmp_path: Path, changed: dict[str, str]) -> None:
    path = tmp_path / "lease"
    with holding(path):
        pretend(path, **changed)
        with pytest.raises(HeadraceError, match="in use by process"), lease(path):
            pass


def test_another_process_with_the_same_pid_is_not_the_holder(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    with holding(path):
        pretend(path, started=1.0)
        with lease(path) as mine:
            mine.check()


def test_a_torn_lease_is_waited_out(tmp_path: Path, waits: list[float]) -> None:
    path = tmp_path / "lease"
    path.write_text('{"token": "a')
    with lease(path):
        assert len(waits) == 3


def test_a_process_suspended_for_too_long_finds_its_lease_lost(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    with holding(path) as holder:
        assert holder.stdout is not None
        holder.send_signal(signal.SIGSTOP)
        while psutil.Process(holder.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        silence(path, SILENCE)
        with lease(path) as mine:
            holder.send_signal(signal.SIGCONT)
            assert holder.stdout.readline() == "lost\n"
            mine.check()  # the process that woke up has not touched it
            assert msgspec.json.decode(path.read_bytes(), type=Holder).pid == os.getpid()


def test_the_holder_learns_that_it_lost_the_lease(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    with lease(path) as mine:
        mine.check()
        path.rename(tmp_path / "away")
        with lease(path) as other:
            with pytest.raises(HeadraceError, match=rf"lost .* to process {os.getpid()}"):
                check_for_ever(mine)  # it is told by its next sign of life
            other.check()


@pytest.mark.parametrize("attempt", range(20))
def test_exactly_one_of_many_contenders_gets_a_dead_lease(tmp_path: Path, attempt: int) -> None:
    path = tmp_path / "lease"
    dead = msgspec.structs.replace(Holder.me(None), started=1.0)
    path.write_bytes(msgspec.json.encode(dead))
    contenders, said = 6, []
    at_once, all_tried = threading.Barrier(contenders), threading.Barrier(contenders)

    def contend() -> None:
        mine = lease(path)
        at_once.wait()
        try:
            with mine:
                said.append("held")
                all_tried.wait()
        except HeadraceError:
            said.append("refused")
            all_tried.wait()

    threads = [threading.Thread(target=contend) for _ in range(contenders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(said) == ["held", *["refused"] * (contenders - 1)]
    assert list(tmp_path.iterdir()) == []
