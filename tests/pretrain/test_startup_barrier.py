"""Ranks wait for rank 0 as long as it makes progress, learn when it cannot start, and give up when it hangs."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import NoReturn

import pytest

from pretrain.faults.interrupt import Stopped
from pretrain.startup_barrier import StartupBarrier
from pretrain.topology import free_port
from shards import ConfigError, HeadraceError, ShardError
from tests.distributed.ranks import rank_environment

TIMEOUT = 60.0  # seconds that a rank waits, on the clock of Turns


class Turns:
    """The two ranks' clock: rank 0 lets time pass, and goes on once the other rank has looked again."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self._given, self._taken = context.Semaphore(0), context.Semaphore(0)
        self.over = context.Event()  # set once the rank that waits does so no longer
        self._now = 0.0

    def monotonic(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        """Take a turn, on the rank that waits; without one, no time has passed."""
        if self._given.acquire(timeout=0.02):
            self._now += TIMEOUT / 5
            self._taken.release()

    def give(self) -> None:
        """Let a fifth of the time-out pass, on both ranks."""
        self._now += TIMEOUT / 5
        self._given.release()
        while not (self._taken.acquire(timeout=0.02) or self.over.is_set()):
            pass


def get_on(barrier: StartupBarrier, turns: Turns) -> None:
    for turn in range(21):
        if turn % 3 == 0:
            barrier.advance()
        turns.give()


def hang(barrier: StartupBarrier, turns: Turns) -> None:
    for _ in range(20):
        turns.give()


def failing(error: BaseException) -> Callable[[StartupBarrier, Turns], NoReturn]:
    def fail(barrier: StartupBarrier, turns: Turns) -> NoReturn:
        raise error

    return fail


Work = Callable[[StartupBarrier, Turns], None]


def rank(number: int, port: int, work: Work, turns: Turns, said: Connection, may_go: Event) -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr("os.environ", rank_environment(number, 2, port))
    patch.setattr("pretrain.startup_barrier.time", turns)
    try:
        with StartupBarrier(timeout_minutes=TIMEOUT / 60) as barrier:
            if barrier.is_host:
                work(barrier, turns)
            else:
                try:
                    barrier.wait()
                finally:
                    turns.over.set()
    except BaseException as error:
        said.send((type(error), str(error)))
    else:
        said.send((None, ""))
    may_go.wait(60)  # as training would, since the store ends with rank 0


def meet(work: Work) -> tuple[type[BaseException] | None, str]:
    """Return the type and message of the error on the rank that waits while rank 0 works."""
    context = multiprocessing.get_context("fork")
    port, pipes = free_port(), [context.Pipe(duplex=False) for _ in range(2)]
    may_go, turns = context.Event(), Turns()
    ranks = [context.Process(target=rank, args=(i, port, work, turns, pipes[i][1], may_go)) for i in range(2)]
    for process in ranks:
        process.start()
    outcome: tuple[type[BaseException] | None, str] = pipes[1][0].recv()
    may_go.set()
    for process in ranks:
        process.join()
    return outcome


def test_ranks_wait_beyond_the_time_out_while_rank_0_makes_progress() -> None:
    assert meet(get_on) == (None, "")


def test_ranks_give_up_on_a_rank_0_that_hangs() -> None:
    kind, message = meet(hang)
    assert kind is HeadraceError
    assert "parallel.timeout_minutes" in message


@pytest.mark.parametrize(
    ("error", "heard"),
    [(ShardError("no such shard"), ConfigError), (ValueError("a bug"), HeadraceError), (Stopped(), Stopped)],
)
def test_ranks_learn_that_rank_0_cannot_start(error: BaseException, heard: type[BaseException]) -> None:
    kind, message = meet(failing(error))
    assert kind is heard
    assert ("rank 0" in message) == (heard is not Stopped)
