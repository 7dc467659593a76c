"""Makes windows ahead of their use, in worker processes; or on demand, in this one. lane -> pool -> worker.

Results are taken by name, so neither timing nor the number of workers can change what is delivered.
"""

import contextlib
import fcntl
import heapq
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple, Protocol

from shards import wire
from shards.config import DataConfig
from shards.errors import HeadraceError, ShardError
from shards.window import Window, WindowMaker, WindowTask

TASKS_IN_WORKER = 2  # one being made, one waiting, so that no worker idles while its answer travels
MAX_DEATHS = 10  # of workers in turn at one window: chance may kill a few, and each costs little
MAX_STALLS = 3  # each costs a whole time-out
STOP_SECONDS = 2.0
PIPE_BYTES = 1 << 20  # sixteen times the default: a worker and its thread wait for each other less often
NOW = -1.0  # due before anything that is only expected to be needed


class WindowId(NamedTuple):
    """The name of a window as a lane meets it."""

    source: int
    lane: int
    segment: int  # the lane's q-th
    window: int  # in the segment


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

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._maker: WindowMaker | None = WindowMaker(config)

    def request(self, name: WindowId, task: WindowTask, due: float) -> None:
        """Does nothing: there is nobody to work ahead."""

    def take(self, name: WindowId, task: WindowTask) -> Window:
        # Taken out while it is at work: one that was interrupted may hold half of a change, and is not used again.
        maker, self._maker = self._maker or WindowMaker(self._config), None
        window = maker.make(task)
        self._maker = maker
        return window

    def clear(self) -> None:
        """Does nothing: nothing is held."""

    def close(self) -> None:
        if self._maker is not None:
            self._maker.close()


class _WorkerLost(Exception):
    """A worker died, or took too long; `limit` is how many may be lost at one window before that is an error."""

    def __init__(self, message: str, limit: int) -> None:
        super().__init__(message)
        self.limit = limit


class _Worker:
    """One worker process, seen from the parent."""

    def __init__(self, config: str, timeout: float) -> None:
        self._timeout = timeout
        root = str(Path(__file__).resolve().parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "shards.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # One thread each: as many workers as the user asked for, and no more.
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        # Beyond what the user may have in pipes, or not on Linux, it works as well, only with more waiting.
        with contextlib.suppress(OSError, AttributeError):
            fcntl.fcntl(self._stdout, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._send(wire.Request(0, config=config))

    def ask(self, number: int, task: WindowTask) -> None:
        self._send(wire.Request(number, task=task))

    def answer(self) -> tuple[int, Window | HeadraceError]:
        """Waits for the next answer. Raises: _WorkerLost."""
        deadline = time.monotonic() + self._timeout
        return wire.receive_window(lambda size: self._read(size, deadline))

    def _send(self, request: wire.Request) -> None:
        try:
            os.write(self._stdin, wire.encode_request(request))  # far smaller than the pipe: never written in part
        except OSError as error:
            raise _WorkerLost(f"cannot be written to: {error.strerror}", MAX_DEATHS) from None

    def _read(self, size: int, deadline: float) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            ready, _, _ = select.select([self._stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise _WorkerLost(f"gave no answer for {self._timeout:g} s", MAX_STALLS)
            got = os.readv(self._stdout, [view])
            if not got:
                raise _WorkerLost(f"died (exit status {self._process.wait()})", MAX_DEATHS)
            view = view[got:]
        return data

    def interrupt(self) -> None:
        self._process.kill()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


class WorkerPool:
    """`num_workers` processes that make the most urgent windows first. A worker that dies or hangs is replaced."""

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._settings = config.model_dump_json()
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
        self._workers: dict[int, _Worker] = {}
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
        """Ends the workers."""
        with self._lock:
            self._closed = True
            self._changed.notify_all()
            for worker in self._workers.values():
                worker.interrupt()  # its thread sees the pipe end, and reaps it
        for thread in self._threads:
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
        except Exception as error:  # such as no memory for another process
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
            try:
                worker = self._worker(slot)
                for number in fresh:
                    asked.append(number)
                    worker.ask(number, self._making[number][1])
                if not asked:
                    continue
                number, result = worker.answer()
            except _WorkerLost as lost:
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

    def _worker(self, slot: int) -> _Worker:
        worker = self._workers.get(slot)
        if worker is None:
            worker = _Worker(self._settings, self._config.worker_timeout)
            with self._lock:
                self._workers[slot] = worker
                if self._closed:
                    worker.interrupt()  # `close` has not seen it
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

    def _retry(self, numbers: list[int], lost: _WorkerLost) -> None:
        """Gives a lost worker's tasks to the next one; the first, which it was at, only so many times."""
        with self._lock:
            name, task = self._making[numbers[0]]
            losses = self._losses[name] = self._losses.get(name, 0) + 1
            if losses >= lost.limit:
                raw = task.raw
                error = ShardError(
                    f"{raw.path}: raw bytes {raw.start} to {raw.stop}: {losses} workers in turn were lost on them, "
                    f"the last {lost}; if memory ran out, lower data.num_workers; if time, raise data.worker_timeout"
                )
                self._deliver(numbers.pop(0), error)
            for number in numbers:
                name, task = self._making.pop(number)
                if number in self._unwanted:
                    self._unwanted.remove(number)
                else:
                    self._queue(name, task, NOW)
