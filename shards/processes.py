"""Worker processes for a pass over many files: each takes the next task, and none outlives the caller."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from threading import Thread
from typing import TypeVar

from shards.errors import HeadraceError

Task = TypeVar("Task")
Result = TypeVar("Result")


def in_processes(
    work: Callable[[Task], Result], tasks: Sequence[Task], workers: int
) -> Iterator[tuple[Task, Result | HeadraceError]]:
    """Do tasks in processes and yield each with its result, or the HeadraceError that it raised, as they end.

    When the iterator is closed, or this process ends for whatever reason, the processes end too, amid their tasks.

    Args:
        work: a function of a module, or a partial of one, which each process is sent once.
        tasks: what it is called with.
        workers: number of processes.
    Raises: HeadraceError if a process ends before its task.
    """
    spawn = get_context("spawn")
    waiting = list(reversed(tasks))
    processes = {}
    busy: dict[Connection, Task] = {}
    try:
        for _ in range(min(workers, len(tasks))):
            here, there = spawn.Pipe()
            processes[here] = spawn.Process(target=_serve, args=(there, work), daemon=True)
            processes[here].start()
            there.close()  # so that its end is seen here
            busy[here] = waiting.pop()
            here.send(busy[here])
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                try:
                    result: Result | HeadraceError = connection.recv()
                except EOFError:
                    processes[connection].join()
                    raise HeadraceError(
                        f"a worker process ended with status {processes[connection].exitcode} during {busy[connection]}"
                        "; if memory ran out, use fewer workers; what is done is kept: start again for the rest"
                    ) from None
                task = busy.pop(connection)
                if waiting:
                    busy[connection] = waiting.pop()
                    connection.send(busy[connection])
                yield task, result
    finally:
        for process in processes.values():
            process.kill()
            process.join()


def _serve(connection: Connection, work: Callable[[Task], Result]) -> None:
    """Do tasks that arrive, in a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller's process handles it and ends this one
    Thread(target=end_with_parent, daemon=True).start()
    while True:
        task: Task = connection.recv()
        try:
            connection.send(work(task))
        except HeadraceError as error:
            connection.send(error)


def end_with_parent() -> None:
    """Wait until the process that started this one is gone, for whatever reason, then end this one."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
