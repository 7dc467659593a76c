"""Ranks wait for rank 0 as long as it makes progress, learn when it cannot start, and give up when it hangs."""

from __future__ import annotations

import multiprocessing
import time
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

TIMEOUT = 1.5  # seconds that a rank waits; rank 0 is busy for longer


def get_on(barrier: StartupBarrier) -> None:
    for _ in range(30):
        barrier.advance()
        time.sleep(0.1)


def hang(barrier: StartupBarrier) -> None:
    time.sleep(2 * TIMEOUT)


def failing(error: BaseException) -> Callable[[StartupBarrier], NoReturn]:
    def fail(barrier: StartupBarrier) -> NoReturn:
        raise error

    return fail


def rank(number: int, port: int, work: Callable[[StartupBarrier], None], said: Connection, may_go: Event) -> None:
    pytest.MonkeyPatch().setattr("os.environ", rank_environment(number, 2, port))
    try:
        with StartupBarrier(timeout_minutes=TIMEOUT / 60) as barrier:
            if barrier.is_host:
                work(barrier)
            else:
                barrier.wait()
    except BaseException as error:
        said.send((type(error), str(error)))
    else:
        said.send((None, ""))
    may_go.wait(60)  # as training would, since the store ends with rank 0


def meet(work: Callable[[StartupBarrier], None]) -> tuple[type[BaseException] | None, str]:
    """Return the type and message of the error on the rank that waits while rank 0 works."""
    context = multiprocessing.get_context("fork")
    port, pipes = free_port(), [context.Pipe(duplex=False) for _ in range(2)]
    may_go = context.Event()
    ranks = [context.Process(target=rank, args=(i, port, work, pipes[i][1], may_go)) for i in range(2)]
    for process in ranks:
        process.start()
    outcome: tuple[type[BaseException] | None, str] = pipes[1][0].recv()
    may_go.set()
    for process in ranks:
        process.join()
    return outcome


def test_a_rank_0_that_gets_on_is_waited_for_beyond_the_time_out() -> None:
    assert meet(get_on) == (None, "")


def test_a_rank_0_that_hangs_is_not() -> None:
    kind, message = meet(hang)
    assert kind is HeadraceError
    assert "parallel.timeout_minutes" in message


@pytest.mark.parametrize(
    ("error", "heard"),
    [(ShardError("no such shard"), ConfigError), (ValueError("a bug"), HeadraceError), (Stopped(), Stopped)],
)
def test_a_rank_0_that_cannot_start_is_heard_of(error: BaseException, heard: type[BaseException]) -> None:
    kind, message = meet(failing(error))
    assert kind is heard
    assert ("rank 0" in message) == (heard is not Stopped)
