"""A rank wants to stop on a signal or when time is nearly up, but stops only once all ranks have agreed."""

from __future__ import annotations

import logging

import pytest

from pretrain.checkpoint.duration import time_for_last_save
from pretrain.faults.deadline import Deadline
from pretrain.faults.interrupt import LAUNCHER_GRACE_SECONDS, Interrupt
from pretrain.faults.stop import StopPolicy


def test_a_decision_to_stop_is_final() -> None:
    interrupt = Interrupt()
    stop = StopPolicy(interrupt, Deadline(None), save_seconds=0.0)
    assert not stop.wanted()
    interrupt.requested = 15
    assert stop.wanted()
    assert not stop.agreed  # before the other ranks have learned of it
    stop.agree(False)
    assert not stop.agreed
    stop.agree(True)
    stop.agree(False)
    assert stop.agreed


@pytest.mark.parametrize(("step_seconds", "save_seconds"), [(0.0, 200.0), (150.0, 0.0)])
def test_slow_steps_and_saves_move_the_stop_forward(step_seconds: float, save_seconds: float) -> None:
    stop = StopPolicy(Interrupt(), Deadline(end=1000.0, clock=lambda: 700.0), save_seconds=1.0)
    assert not stop.wanted()
    stop.note_step(step_seconds)
    stop.note_save(save_seconds)
    assert stop.wanted()


def test_a_single_slow_step_is_forgotten() -> None:
    stop = StopPolicy(Interrupt(), Deadline(end=1000.0, clock=lambda: 700.0), save_seconds=1.0)
    stop.note_step(500.0)
    for _ in range(50):
        stop.note_step(1.0)
    assert not stop.wanted()


def test_a_save_that_the_launcher_would_cut_short_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    interrupt = Interrupt()
    stop = StopPolicy(interrupt, Deadline(None), save_seconds=0.0)
    too_long = LAUNCHER_GRACE_SECONDS
    assert time_for_last_save(too_long) > LAUNCHER_GRACE_SECONDS
    with caplog.at_level(logging.WARNING):
        stop.note_save(too_long)
        assert not caplog.records  # no launcher will kill this process
        interrupt.has_launcher = True
        stop.note_save(None)
        stop.note_save(0.1)
        assert not caplog.records
        for _ in range(2):
            stop.note_save(too_long)
    assert [record.getMessage().count("start it with torchrun or srun") for record in caplog.records] == [1]
