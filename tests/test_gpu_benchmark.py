"""The measurement on a GPU keeps what its parts have found, however they end, and keeps to its time."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu

PRINTS_ONE = 'print(\'{"settings": "a"}\', flush=True)\n'


def outcome_of(program: str, folder: Path, limit: float = 60.0) -> gpu.Outcome:
    return gpu.run_part([sys.executable, "-c", program], folder, "part", limit)


@pytest.mark.parametrize(
    ("ending", "said"),
    [("", "done"), ("sys.exit(3)", "exit code 3"), ("raise KeyError", "exit code 1"), ("time.sleep(60)", "killed")],
)
def test_what_a_part_found_is_kept_however_it_ends(tmp_path: Path, ending: str, said: str) -> None:
    outcome = outcome_of(f"import sys, time\n{PRINTS_ONE}{ending}", tmp_path, limit=2.0)
    assert outcome.results == [{"settings": "a"}]
    assert said in outcome.ending
    assert gpu.is_sound(outcome) == (said == "done")


def test_a_result_cut_off_is_left_out(tmp_path: Path) -> None:
    assert outcome_of(PRINTS_ONE + "print('{\"settings\": \"b', end='')", tmp_path).results == [{"settings": "a"}]


def test_a_killed_part_leaves_no_process_behind(tmp_path: Path) -> None:
    child = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    outcome = outcome_of(child + "print('{\"pid\": %d}' % p.pid, flush=True)\np.wait()", tmp_path, limit=2.0)
    stat = Path("/proc") / str(outcome.results[0]["pid"]) / "stat"
    deadline = time.monotonic() + 30
    while stat.exists() and stat.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        os.sched_yield()
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_parts_without_time_are_named_as_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = argparse.Namespace(minutes=0.0, parts=["machine", "1b"], device="cpu", tiny=True, out=tmp_path)
    outcomes = gpu.run_all(options)
    assert [outcome.ending for outcome in outcomes.values()] == ["not run: no time left"] * 2
    assert json.loads((tmp_path / "results.json").read_text())["1b"]["ending"] == "not run: no time left"
    assert "not run" in capsys.readouterr().out
    assert not any(map(gpu.is_sound, outcomes.values()))


def test_a_wrong_or_failed_variant_is_an_error_and_one_that_does_not_fit_is_none() -> None:
    def sound(verdict: str) -> bool:
        return gpu.is_sound(gpu.Outcome([{"variant": "a", "verdict": "right"}, {"verdict": verdict}], "done", 1.0))

    assert sound("right")
    assert sound("not for this device: flex needs CUDA")
    assert not sound("WRONG")
    assert not sound("failed: RuntimeError: no kernel")


def test_a_goal_is_met_by_speed_and_share_together() -> None:
    goal = (1000, 0.5)
    slow = {"settings": "slow", "tokens_per_second": 999, "mfu": 0.6}
    fast = {"settings": "fast", "tokens_per_second": 1000, "mfu": 0.5}
    part = {"settings": "part", "tokens_per_second": 3000, "tokens_per_second_of_whole": 900, "mfu": 0.7}
    assert gpu.standing(goal, [fast]).endswith("fast: met.")
    assert gpu.standing(goal, [slow]).endswith("slow: missed.")
    assert "900 tokens/s" in gpu.standing(goal, [fast, part])
    assert "nothing was measured" in gpu.standing(goal, [{"settings": "x", "not_run": "out of memory"}])
