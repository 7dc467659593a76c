"""Makes windows ahead of their use, in worker processes; or on demand, in this one.

lane -> worker_pool -> worker_process. Results are taken by name, so neither timing nor the number of workers can change
what is delivered.
"""

import heapq
import os
import threading
from typing import Protocol

from shards.config import DataConfig
from shards.errors import HeadraceError, ShardError
from shards.plan.segments import WindowId
from shards.windows.recipe import Recipe
from shards.windows.window import Window, WindowMaker, WindowTask
from shards.windows.worker_process import WorkerLost, WorkerProcess

TASKS_IN_WORKER = 2  # one being made, one waiting, so that no worker idles while its answer travels
STOP_SECONDS = 2.0
NOW = -1.0  # due before anything that is only expected to be needed


class Pool(Protocol):
    """Where lanes get their windows from."""

    ahead: int  # how many windows it is of use to request before they are needed, whatever their size

    def request(self, name: WindowId, task: WindowTask, due: float) -> None: ...

    def take(self, name: WindowId, task: WindowTask) -> Window: ...

    def clear(self) -> None: ...

    def close(self) -> None: ...


class InProcess:
    """Makes each window when it is taken."""

    ahead = 0

    def __init__(self, config: DataConfig, recipe: Recipe) -> None:
        self._config, self._recipe = config, recipe
        self._maker: WindowMaker | None = WindowMaker(config, recipe)

    def request(self, name: WindowId, task: WindowTask, due: float) -> None:
        """Does nothing: there is nobody to work ahead."""

    def take(self, name: WindowId, task: WindowTask) -> Window:
        # Taken out while it is at work: one that was interrupted may hold half of a change, and is not used again.
        maker, self._maker = self._maker or WindowMaker(self._config, self._recipe), None
        window = maker.make(task)
        self._maker = maker
        return window

    def clear(self) -> None:
        """Does nothing: nothing is held."""

    def close(self) -> None:
        if self._maker is not None:
            self._maker.close()


class WorkerPool:
    """`num_workers` processes that make the most urgent windows first. A worker that dies or hangs is replaced."""

    def __init__(self, config: DataConfig, recipe: Recipe) -> None:
        self._config, self._recipe = config, recipe
        self._pid = os.getpid()
        self.ahead = TASKS_IN_WORKER * config.num_workers
        # `with` takes the lock itself, not the condition, whose __enter__ an interrupt could leave with the lock held.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._closed = False
        self._waiting: list[tuple[float, int, WindowId]] = []  # heap; a name may stand here twice, the first counts
        self._tasks: dict[WindowId, WindowTask] = {}  # asked for and not yet given to a worker
        self._making: dict[int, tuple[WindowId, WindowTask]] = {}  # by number, given to a worker
        self._unwanted: set[int] = set()  # those of `_making` that `clear` came upon
        self._losses: dict[WindowId, int] = {}  # how many workers were lost while they were at it
        self._results: dict[WindowId, Window | HeadraceError] = {}
        self._next_number = 1
        self._failure: Exception | None = None  # of a thread below, which then is gone
        self._workers: dict[int, WorkerProcess] = {}
        self._threads = [
            threading.Thread(target=self._serve, args=(slot,), name=f"shards-pool-{slot}", daemon=True)
            for slot in range(config.num_workers)
        ]
        for thread in self._threads:
            thread.start()

    def request(self, name: WindowId, task: WindowTask, due: float) -> None:
        """Asks for a window that will be taken; the smaller `due`, the sooner it is made."""
        with self._lock:
            self._queue(name, task, due)

    def take(self, name: WindowId, task: WindowTask) -> Window:
        """Waits for a window, requested or not, and hands it over. Raises: what making it raised."""
        with self._lock:
            making = (made for number, (made, _) in self._making.items() if number not in self._unwanted)
            if name not in self._results and name not in making:
                self._queue(name, task, NOW)
            while name not in self._results:
                if self._closed:
                    raise ShardError("the loader is closed")
                if isinstance(self._failure, HeadraceError):
                    raise self._failure
                if self._failure is not None:
                    raise ShardError(f"no workers can be had: {self._failure!r}") from self._failure
                self._changed.wait()
            result = self._results.pop(name)
        if isinstance(result, HeadraceError):
            raise result
        return result

    def clear(self) -> None:
        """Forgets all requests and what was made for them; what is being made is thrown away when it comes."""
        with self._lock:
            self._waiting.clear()
            self._tasks.clear()
            self._results.clear()
            self._unwanted.update(self._making)

    def close(self) -> None:
        """Ends the workers. May be called again, and by the collection of garbage in any thread."""
        if os.getpid() != self._pid:
            return  # a fork: the workers are not its own, and the lock may be held by a thread that it does not have
        with self._lock:
            self._closed = True
            self._changed.notify_all()
            for worker in self._workers.values():
                worker.interrupt()  # its thread sees the pipe end, and reaps it
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(STOP_SECONDS)

    def _queue(self, name: WindowId, task: WindowTask, due: float) -> None:
        self._next_number += 1
        heapq.heappush(self._waiting, (due, self._next_number, name))
        self._tasks[name] = task  # last: should an interrupt come before, no thread looks for what is not in line
        self._changed.notify_all()

    def _serve(self, slot: int) -> None:
        """One worker's thread; what ends it before the pool is closed, `take` raises."""
        try:
            self._keep_busy(slot)
        except Exception as error:  # such as no memory for another process, or one that cannot do its work
            with self._lock:
                self._failure = error
                self._changed.notify_all()
        finally:
            self._drop_worker(slot)

    def _keep_busy(self, slot: int) -> None:
        """Hands out tasks, takes in answers, replaces the worker when it is lost."""
        asked: list[int] = []  # numbers that this worker has, in their order
        while True:
            with self._lock:
                while not self._closed and not self._tasks and not asked:
                    self._changed.wait()
                if self._closed:
                    return
                fresh = self._next_tasks(TASKS_IN_WORKER - len(asked))
            if not fresh and not asked:
                continue
            try:
                worker = self._worker(slot)
                for number in fresh:
                    asked.append(number)
                    worker.ask(number, self._making[number][1])
                number, result = worker.answer()
            except WorkerLost as lost:
                asked = sorted({*asked, *fresh})
                self._drop_worker(slot)
                self._retry(asked, lost)
                asked = []
                continue
            asked.remove(number)
            self._deliver(number, result)

    def _next_tasks(self, count: int) -> list[int]:
        """Moves up to `count` of the most urgent tasks to `_making`; their numbers. The lock is held."""
        numbers: list[int] = []
        while self._waiting and len(numbers) < count:
            _, number, name = heapq.heappop(self._waiting)
            if (task := self._tasks.pop(name, None)) is not None:
                self._making[number] = (name, task)
                numbers.append(number)
        return numbers

    def _worker(self, slot: int) -> WorkerProcess:
        worker = self._workers.get(slot)
        if worker is None:
            worker = WorkerProcess(self._config.worker_timeout)
            with self._lock:
                self._workers[slot] = worker
                if self._closed:
                    worker.interrupt()  # `close` has not seen it
            worker.prepare(self._config.model_dump_json(), self._recipe)
        return worker

    def _drop_worker(self, slot: int) -> None:
        with self._lock:
            worker = self._workers.pop(slot, None)
        if worker is not None:
            worker.kill()

    def _deliver(self, number: int, result: Window | HeadraceError) -> None:
        with self._lock:
            name, _ = self._making.pop(number)
            self._losses.pop(name, None)
            if number in self._unwanted:
                self._unwanted.remove(number)
                return
            self._results[name] = result
            self._changed.notify_all()

    def _retry(self, numbers: list[int], lost: WorkerLost) -> None:
        """Gives a lost worker's tasks to the next one; the first, which it was at, only so many times."""
        with self._lock:
            name, task = self._making[numbers[0]]
            losses = self._losses[name] = self._losses.get(name, 0) + 1
            if losses >= lost.limit:
                error = ShardError(f"{task}: {losses} workers in turn were lost on them; the last {lost}")
                self._deliver(numbers.pop(0), error)
            for number in numbers:
                name, task = self._making.pop(number)
                if number in self._unwanted:
                    self._unwanted.remove(number)
                else:
                    self._queue(name, task, NOW)
