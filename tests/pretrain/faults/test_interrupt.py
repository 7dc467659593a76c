"""Signals: the first of a kind is recorded, its duplicate does not mean impatience, a repetition exits at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.faults.interrupt import Interrupt
from shards.storage.atomic import write_atomically

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]

# It tells of each signal that it has received, and its clock is a file.
LISTEN = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from pretrain.faults import interrupt as module

def now():
    print("received", flush=True)
    return float(Path(sys.argv[1]).read_text())

module.time = SimpleNamespace(monotonic=now)
with module.Interrupt() as interrupt:
    print("ready", flush=True)
    time.sleep(60)
"""


STARTING = """
import time
from pretrain.faults.interrupt import Interrupt, Stopped
try:
    with Interrupt() as interrupt, interrupt.starting():
        print("ready", flush=True)
        time.sleep(30)
except Stopped:
    print("left in order", flush=True)
    raise SystemExit(75)
"""


def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():  # a thread records it
        time.sleep(0.01)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_recorded_and_the_old_handlers_are_restored(number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in SIGNALS]
    with Interrupt() as interrupt:
        assert interrupt.requested == 0
        os.kill(os.getpid(), number)
        wait_until(lambda: interrupt.requested == number)
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_the_first_signal_counts_and_another_kind_changes_nothing() -> None:
    with Interrupt() as interrupt:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        wait_until(lambda: len(interrupt._first_at) == 3)
        assert interrupt.requested == signal.SIGUSR1


@pytest.mark.distributed
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_the_same_signal_again_exits_at_once(tmp_path: Path, number: signal.Signals, code: int) -> None:
    clock = tmp_path / "clock"
    clock.write_text("100.0")
    command = [sys.executable, "-c", LISTEN, str(clock)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(2):  # the second is the same keystroke by another route
            process.send_signal(number)
            assert process.stdout.readline() == "received\n"
        write_atomically(clock, "101.1")
        process.send_signal(number)
        assert process.stdout.readline() == "received\n"  # it is still alive
        assert process.wait(timeout=60) == code
        assert process.stderr is not None
        said = process.stderr.read()
    assert said.count(number.name) == 2
    assert "again: exiting at once" in said


@pytest.mark.distributed
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_during_a_start_ends_it_cleanly(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", STARTING], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.read() == "left in order\n"
    assert process.returncode == 75
