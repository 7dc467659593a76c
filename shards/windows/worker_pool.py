"""Pools that make windows: ahead of their use in worker processes, or on demand in this one.

worker_process -> worker_pool -> prefetch. Each result goes to its own request, so neither timing nor the number of
workers can change what is delivered.
"""

from __future__ import annotations

import heapq
import itertools
import os
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from shards.config import DataConfig
from shards.errors import HeadraceError, ShardError
from shards.plan.segments import WindowId
from shards.windows.recipe import Recipe, Tools
from shards.windows.window import Window, WindowMaker, WindowTask
from shards.windows.worker_process import WorkerLost, WorkerProcess

_TASKS_IN_WORKER = 2  # one in progress and one waiting, so that no worker idles while its answer travels
STOP_SECONDS = 2.0
NOW = -1.0  # due before anything that is only expected to be needed


@dataclass(eq=False)
class WindowRequest:
    """A window that will be taken: how to make it, how soon it is needed, and its result."""

    name: WindowId
    task: WindowTask
    due: float  # smaller values are made sooner
    # The pool's fields, under its lock:
    is_waiting: bool = False  # in line, and not yet given to a worker
    is_dropped: bool = False  # nobody will take it
    losses: int = 0  # workers lost while they were making it
    result: Window | HeadraceError | None = None  # until it is taken


class Pool(Protocol):
    """A place where windows are made."""

    ahead: int  # number of windows worth requesting before they are needed, whatever their size

    def submit(self, request: WindowRequest) -> None: ...

    def wait_for(self, request: WindowRequest) -> Window: ...

    def clear(self) -> None: ...

    def close(self) -> None: ...


class InProcess:
    """A pool that makes each window when it is waited for."""

    ahead = 0

    def __init__(self, stages: Sequence[DataConfig], recipe: Recipe, tools: Tools) -> None:
        """Use this process's tools.

        Args:
            tools: tools of this process, which the recipe describes.
        """
        self._stages, self._recipe = stages, recipe
        self._maker: WindowMaker | None = WindowMaker(stages, tools)

    def submit(self, request: WindowRequest) -> None:
        """Do nothing, since there is nobody to work ahead."""

    def wait_for(self, request: WindowRequest) -> Window:
        """Make a window.

        Raises: ShardError if it cannot be made; ConfigError if the tools must be opened again after an interrupt and
            their files have changed.
        """
        # An interrupted maker may be in an inconsistent state, so it is not used again
        maker, self._maker = self._maker or WindowMaker(self._stages, self._recipe.open(self._stages)), None
        window = maker.make(request.task)
        self._maker = maker
        return window

    def clear(self) -> None:
        """Do nothing, since nothing is held."""

    def close(self) -> None:
        """Close open shards."""
        if self._maker is not None:
            self._maker.close()


class WorkerPool:
    """A pool of `num_workers` processes that make the most urgent windows first; one that dies or hangs is replaced."""

    def __init__(self, stages: Sequence[DataConfig], recipe: Recipe) -> None:
        self._stages, self._recipe = stages, recipe
        config = stages[0]
        self._pid = os.getpid()
        self.ahead = _TASKS_IN_WORKER * config.num_workers
        # `with` takes the lock itself, since an interrupt in the condition's __enter__ could leave the lock held.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._closed = False
        self._numbers = itertools.count()
        # Heap of (due, number, request). One that became urgent is in it twice; `is_waiting` is True until it is taken.
        self._waiting: list[tuple[float, int, WindowRequest]] = []
        self._asked: list[deque[WindowRequest]] = [deque() for _ in range(config.num_workers)]  # one for each worker
        self._failure: Exception | None = None  # what ended one of the threads below
        self._workers: dict[int, WorkerProcess] = {}
        self._threads = [
            threading.Thread(target=self._serve, args=(slot,), name=f"shards-pool-{slot}", daemon=True)
            for slot in range(config.num_workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, request: WindowRequest) -> None:
        """Put a request in line."""
        with self._lock:
            self._queue(request)

    def wait_for(self, request: WindowRequest) -> Window:
        """Wait for a window that was submitted, and return it. Raises: what making it raised."""
        with self._lock:
            if request.is_waiting and request.due > NOW:
                request.due = NOW
                self._queue(request)
            while request.result is None:
                if self._closed:
                    raise ShardError("the loader is closed")
                if isinstance(self._failure, HeadraceError):
                    raise self._failure
                if self._failure is not None:
                    raise ShardError(f"cannot start workers: {self._failure!r}") from self._failure
                self._changed.wait()
            result, request.result = request.result, None
        if isinstance(result, HeadraceError):
            raise result
        return result

    def clear(self) -> None:
        """Drop all requests; windows in progress are thrown away when they arrive."""
        with self._lock:
            self._waiting.clear()
            for request in itertools.chain(*self._asked):
                request.is_dropped = True

    def close(self) -> None:
        """End the workers. This may be called again, and by garbage collection in any thread."""
        if os.getpid() != self._pid:
            return  # in a fork: the workers are not its own, and a thread that it does not have may hold the lock
        with self._lock:
            self._closed = True
            self._changed.notify_all()
            for worker in self._workers.values():
                worker.interrupt()  # its thread sees the pipe end and reaps it
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(STOP_SECONDS)

    def _queue(self, request: WindowRequest) -> None:
        request.is_waiting = True
        heapq.heappush(self._waiting, (request.due, next(self._numbers), request))
        self._changed.notify_all()

    def _serve(self, slot: int) -> None:
        """Run one worker's thread; `wait_for` raises what ends it before the pool is closed."""
        try:
            self._keep_busy(slot)
        except Exception as error:  # such as no memory for another process, or a worker that cannot do its work
            with self._lock:
                self._failure = error
                self._changed.notify_all()
        finally:
            self._drop_worker(slot)

    def _keep_busy(self, slot: int) -> None:
        """Hand out tasks, take in answers, and replace the worker when it is lost."""
        asked = self._asked[slot]  # in the order of the answers
        while True:
            with self._lock:
                while not self._closed and not self._waiting and not asked:
                    self._changed.wait()
                if self._closed:
                    return
                fresh = self._next_requests(_TASKS_IN_WORKER - len(asked))
                asked.extend(fresh)
            if not asked:
                continue
            try:
                worker = self._worker(slot)
                for request in fresh:
                    worker.ask(request.task)
                self._deliver(slot, worker.answer())
            except WorkerLost as lost:
                self._drop_worker(slot)
                self._retry(slot, lost)

    def _next_requests(self, count: int) -> list[WindowRequest]:
        """Take up to `count` of the most urgent requests out of the line. The lock must be held."""
        found: list[WindowRequest] = []
        while self._waiting and len(found) < count:
            _, _, request = heapq.heappop(self._waiting)
            if request.is_waiting:
                request.is_waiting = False
                found.append(request)
        return found

    def _worker(self, slot: int) -> WorkerProcess:
        worker = self._workers.get(slot)
        if worker is None:
            worker = WorkerProcess(self._stages[0].worker_timeout)
            with self._lock:
                self._workers[slot] = worker
                if self._closed:
                    worker.interrupt()  # `close` did not see it
            worker.prepare([stage.model_dump_json() for stage in self._stages], self._recipe)
        return worker

    def _drop_worker(self, slot: int) -> None:
        with self._lock:
            worker = self._workers.pop(slot, None)
        if worker is not None:
            worker.kill()

    def _deliver(self, slot: int, result: Window | HeadraceError) -> None:
        """Give a worker's first request its result."""
        with self._lock:
            request = self._asked[slot].popleft()
            if not request.is_dropped:
                request.result = result
                self._changed.notify_all()

    def _retry(self, slot: int, lost: WorkerLost) -> None:
        """Queue a lost worker's requests again; the first, which it was making, only a limited number of times."""
        with self._lock:
            asked = self._asked[slot]
            first = asked[0]
            first.losses += 1
            if first.losses >= lost.limit:
                self._deliver(
                    slot, ShardError(f"{first.task}: {first.losses} workers in a row were lost on it; the last {lost}")
                )
            for request in asked:
                if not request.is_dropped:
                    request.due = NOW
                    self._queue(request)
            asked.clear()
