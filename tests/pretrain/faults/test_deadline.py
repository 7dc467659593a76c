"""The last save begins early enough for the job's end, whatever a save and a step take."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from pretrain.faults.deadline import Deadline, job_end


@pytest.mark.parametrize(("step_seconds", "save_seconds"), [(1.0, 10.0), (30.0, 200.0), (0.1, 0.5)])
def test_a_save_begun_at_the_deadline_finishes_in_time(step_seconds: float, save_seconds: float) -> None:
    now = [0.0]
    deadline = Deadline(end=3600.0, clock=lambda: now[0])
    while not deadline.reached(step_seconds, save_seconds):
        now[0] += step_seconds
    # At worst a periodic save has just begun, one step is trained beside it, and the last save waits for it.
    assert now[0] + step_seconds + 2 * save_seconds < 3600
    assert now[0] > 3600 - 3 * save_seconds - 3 * step_seconds - 30  # but not much earlier
    now[0] = 0.0
    assert deadline.reached(step_seconds, save_seconds), "a decision to stop is final"


def test_a_longer_save_moves_the_deadline_forward() -> None:
    deadline = Deadline(end=1000.0, clock=lambda: 500.0)
    assert not deadline.reached(1.0, 10.0)
    assert deadline.reached(1.0, 400.0)


def test_without_an_end_there_is_no_deadline() -> None:
    assert not Deadline(None).reached(1e9, 1e9)
    assert job_end({}) is None


@pytest.mark.parametrize(("said", "end"), [("2026-11-24T12:00:00", True), ("NONE", False), ("sudden nonsense", False)])
def test_slurm_is_asked_if_the_environment_does_not_say(
    said: str, end: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\n[ $3 = 7 ] && echo '{said}'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = job_end({"SLURM_JOB_ID": "7"})
    assert found == (datetime(2026, 11, 24, 12).timestamp() if end else None)


def test_the_end_time_of_a_job_is_parsed() -> None:
    assert job_end({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1795000000"}) == 1795000000.0
