"""A sweep's runs are all trained, once, at most so many at a time, however often the sweep is killed."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from pretrain.commands.sweep import follow
from pretrain.run.lease import Lease
from pretrain.sweep.halving import figure_of
from pretrain.sweep.local import Halving, LocalSweep, Plan
from pretrain.sweep.slot import Slot
from pretrain.sweep.table import line_of, sweep_table
from shards import ConfigError

pytestmark = pytest.mark.distributed

TRAINER = Path(__file__).with_name("trainer.py")
DEADLINE = 120.0  # seconds


def plans_in(folder: Path, count: int, steps: int = 20, failing: int | None = None) -> list[Plan]:
    """Plan runs of which each trains better than the one before."""
    names = [f"rate-{i + 1}" for i in range(count)]
    return [
        Plan(
            name=name,
            settings={"optim.learning_rate": str(i + 1)},
            folder=folder / name,
            identity=f"config {i}",
            steps=steps,
            words=(str(TRAINER), str(folder / name), str(steps), *(["fail"] if i == failing else [])),
        )
        for i, name in enumerate(names)
    ]


def slots_of(jobs: int) -> list[Slot]:
    return [Slot({**os.environ, "OMP_NUM_THREADS": str(number)}, is_warm=False) for number in range(jobs)]


def sweep_of(folder: Path, jobs: int, halving: Halving | None = None, **changes: int) -> LocalSweep:
    return LocalSweep(folder / "x.sweep", plans_in(folder, 8, **changes), slots_of(jobs), halving)


def run_until(sweep: LocalSweep, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, [(point.plan.name, point.state, point.note) for point in sweep.points]
        sweep.advance()
        assert sum(point.slot is not None for point in sweep.points) <= 2
        time.sleep(0.01)


def steps_of(folder: Path) -> dict[str, int]:
    """Count the records of each run that has any."""
    return {path.parent.name: len(path.read_text().splitlines()) for path in sorted(folder.glob("*/metrics.jsonl"))}


def starts_of(folder: Path) -> dict[str, list[str]]:
    return {path.parent.name: path.read_text().splitlines() for path in sorted(folder.glob("*/starts"))}


def work(folder: Path) -> None:
    sweep = sweep_of(folder, 2)
    run_until(sweep, lambda: sweep.is_done)


def test_a_sweep_killed_twice_goes_on_and_finishes(tmp_path: Path) -> None:
    for wanted in (30, 100):
        process = multiprocessing.get_context("fork").Process(target=work, args=(tmp_path,))
        process.start()
        deadline = time.monotonic() + DEADLINE
        while sum(steps_of(tmp_path).values()) < wanted:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.join()
        time.sleep(0.5)
        found = steps_of(tmp_path)
        time.sleep(0.3)
        assert steps_of(tmp_path) == found, "its runs stop with it"
        assert sum(found.values()) < 160
    sweep = sweep_of(tmp_path, 2)
    run_until(sweep, lambda: sweep.is_done)
    assert steps_of(tmp_path) == {f"rate-{i + 1}": 20 for i in range(8)}
    starts = starts_of(tmp_path)
    assert sum(len(of_run) for of_run in starts.values()) > 8, "some were interrupted"
    assert {line.split()[1] for of_run in starts.values() for line in of_run} == {"0", "1"}, "two slots"
    again = sweep_of(tmp_path, 2)
    assert again.is_done
    again.advance()
    assert starts_of(tmp_path) == starts, "nothing is trained again"


def test_a_failed_run_is_named_and_the_others_finish(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, 2, failing=3, steps=2)
    run_until(sweep, lambda: sweep.is_done)
    assert [point.state for point in sweep.points] == [*["finished"] * 3, "failed", *["finished"] * 4]
    failed = sweep.points[3]
    assert failed.note == f"exit code 1, see {sweep.log_of(failed)}"
    assert "rate-4: failed: exit code 1" in line_of(failed)
    console = Console(width=150, record=True, file=Path(os.devnull).open("w"))  # noqa: SIM115
    console.print(sweep_table(sweep.points))
    table = console.export_text()
    assert "7 finished, 1 failed" in table
    assert "0.1250" in table, "the loss of the last run"
    assert sweep_of(tmp_path, 2).points[3].state == "waiting", "a failed run is tried again by the next start"


def test_a_run_whose_slots_server_is_killed_saves_and_goes_on(tmp_path: Path) -> None:
    others = set(psutil.Process().children())  # of other tests
    sweep = LocalSweep(tmp_path / "x.sweep", plans_in(tmp_path, 3, steps=60), slots_of(2))
    run_until(sweep, lambda: all(point.history.last_step > 0 for point in sweep.points[:2]))
    servers = {child.pid for child in set(psutil.Process().children()) - others}
    assert len(servers) == 2
    os.kill(servers.pop(), signal.SIGKILL)
    run_until(sweep, lambda: sweep.is_done)
    assert [point.state for point in sweep.points] == ["finished"] * 3
    assert steps_of(tmp_path) == {f"rate-{i + 1}": 60 for i in range(3)}
    assert sum(len(of_run) for of_run in starts_of(tmp_path).values()) == 4, "one was interrupted"
    assert not set(psutil.Process().children()) - others, "the servers end with the sweep"


def test_a_server_that_cannot_start_is_told_with_its_error(tmp_path: Path) -> None:
    (tmp_path / "yaml.py").write_text("raise RuntimeError('no such library')")
    slot = Slot({**os.environ, "PYTHONPATH": str(tmp_path)}, is_warm=True)
    sweep = LocalSweep(tmp_path / "x.sweep", plans_in(tmp_path, 1), [slot])
    run_until(sweep, lambda: sweep.is_done)
    assert sweep.points[0].note == f"exit code 1, see {sweep.log_of(sweep.points[0])}"
    assert "RuntimeError: no such library" in sweep.log_of(sweep.points[0]).read_text()


def test_a_run_that_another_process_trains_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "rate-1").mkdir()
    sweep = sweep_of(tmp_path, 2, steps=2)
    with Lease(tmp_path / "rate-1" / "lease"):
        run_until(sweep, lambda: all(point.state == "finished" for point in sweep.points[1:]))
        assert sweep.points[0].state == "held"
        assert "rate-1" not in steps_of(tmp_path)
    run_until(sweep, lambda: sweep.is_done)
    assert sweep.points[0].state == "finished"


def test_a_sweep_that_is_asked_to_stop_lets_its_runs_save(tmp_path: Path) -> None:
    sweep, said = sweep_of(tmp_path, 2, steps=1000), io.StringIO()
    timer = threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert not follow(sweep, Console(file=said, width=100))
    timer.join()
    assert "stopping: each run saves its state" in said.getvalue()
    assert "rate-1: training" in said.getvalue()
    assert [point.state for point in sweep.points] == ["waiting"] * 8
    assert all(point.slot is None for point in sweep.points)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_halving_by_a_domain_that_is_not_there_is_refused_and_the_runs_save(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, 2, Halving.of(figure_of("wiki/bits_per_byte"), 8, 1000, 5), steps=1000)
    with pytest.raises(ConfigError, match="--halve wiki/bits_per_byte: rate-. was evaluated on no such .* on macro"):
        follow(sweep, Console(file=io.StringIO()))
    assert [point.state for point in sweep.points] == ["waiting"] * 8


@pytest.mark.parametrize("interrupted", [False, True])
def test_halving_trains_the_best_run_to_its_end_and_no_other(tmp_path: Path, interrupted: bool) -> None:
    halving = Halving.of(figure_of("macro/bits_per_byte"), 8, 200, 5)
    assert halving.rungs == [25, 50, 100]
    sweep = sweep_of(tmp_path, 2, halving, steps=200)
    if interrupted:
        run_until(sweep, lambda: sum(point.state == "out" for point in sweep.points) >= 4)
        sweep.stop()
        sweep = sweep_of(tmp_path, 2, halving, steps=200)
    run_until(sweep, lambda: sweep.is_done)
    # The last run is the best; a run that is out was stopped soon after its rung.
    assert [point.state for point in sweep.points] == [*["out"] * 7, "finished"]
    notes = [point.note for point in sweep.points]
    assert notes[:7] == [*["stopped at step 25"] * 4, *["stopped at step 50"] * 2, "stopped at step 100"]
    found = steps_of(tmp_path)
    assert found["rate-8"] == 200
    assert all(25 <= found[f"rate-{i}"] < 200 for i in range(1, 8))
