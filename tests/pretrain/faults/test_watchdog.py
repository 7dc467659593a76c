"""A part that hangs ends the process with its stacks in the log; a slow first part or a slow save does not."""

from __future__ import annotations

import subprocess
import sys

HANGS = """
import time
from pretrain.faults.watchdog import Watchdog

def slow():
    time.sleep(1.0)

def the_culprit():
    time.sleep(60)

with Watchdog(0.4, rank=3) as watchdog:
    watchdog.begin("step", "step 1")
    slow()
    watchdog.end()
    slow()  # a save
    for step in range(2, 12):
        watchdog.begin("step", f"step {step}")
        time.sleep(0.1)
    watchdog.end()
    print("alive", flush=True)
    watchdog.begin("step", "step 12")
    the_culprit()
"""


def test_a_part_that_hangs_ends_the_process_and_shows_where() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=50)
    assert done.stdout == "alive\n", done.stderr
    assert done.returncode == 75
    assert "rank 3: step 12 has taken more than train.stall_timeout=0.4 s" in done.stderr
    assert "in the_culprit" in done.stderr
