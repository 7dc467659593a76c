"""A part that hangs ends the process with its stacks in the log; a slow first part or a slow save does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pretrain.faults.watchdog import Watchdog
from pretrain.journal import Journal
from pretrain.run.metrics import MetricsConfig
from pretrain.run.run_folder import RunFolder

HANGS = """
import time
from types import SimpleNamespace
from pretrain.faults import watchdog as module

now = 0.0
module.time = SimpleNamespace(monotonic=lambda: now)  # so that a slow machine is no hang

def pass_seconds(seconds):
    global now
    now += seconds
    time.sleep(0.1)  # the watchdog looks a few times

def the_culprit():
    pass_seconds(1.0)
    time.sleep(60)

with module.Watchdog(0.04, 3, lambda event: print(event.step, event.kind, flush=True)) as watchdog:
    watchdog.begin("step", "step 1", 0)
    pass_seconds(1.0)
    watchdog.end()
    pass_seconds(1.0)  # a save
    for step in range(2, 6):
        watchdog.begin("step", f"step {step}", step - 1)
        pass_seconds(0.03)
        watchdog.renew()
        pass_seconds(0.03)
    watchdog.end()
    print("alive", flush=True)
    watchdog.begin("step", "step 6", 5)
    the_culprit()
"""


def hang(folder: Path, command: str) -> None:
    """Hang in the second step of a run that tells a command of its events."""
    tracker: Any = SimpleNamespace(alert=lambda event: None)
    journal = Journal(RunFolder(folder), tracker, MetricsConfig.model_validate({"on_event": command}), 9, "a")
    with journal._hook, Watchdog(0.1, 0, journal.tell_last) as watchdog:
        for _ in range(2):
            watchdog.begin("step", "step 1", 0)
        time.sleep(60)


def test_the_command_is_told_of_a_hang_before_the_process_ends(tmp_path: Path) -> None:
    told = tmp_path / "told"
    tell = 'import sys, time; time.sleep(1); open(sys.argv[1], "w").write(sys.stdin.read())'
    command = f"{sys.executable} -c '{tell}' {told}"
    child = os.fork()  # a process of its own would import torch first
    if child == 0:
        with suppress(BaseException):
            hang(tmp_path, command)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75
    assert json.loads(told.read_text())["kind"] == "stall"


def test_a_part_that_hangs_ends_the_process_and_shows_where() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=50)
    assert done.stdout == "alive\n5 stall\n", done.stderr
    assert done.returncode == 75
    assert "rank 3: step 6 has taken more than train.stall_timeout=0.04 s" in done.stderr
    assert "in the_culprit" in done.stderr
