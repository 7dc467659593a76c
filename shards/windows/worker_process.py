"""One worker process as its parent sees it: started, given requests, listened to, ended.

worker_pool -> worker_process -> worker_protocol, worker.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from shards.errors import HeadraceError, ShardError
from shards.windows import worker_protocol
from shards.windows.recipe import Recipe
from shards.windows.window import Window, WindowTask

MAX_DEATHS = 10  # workers lost in a row on one window: a few may die by chance, and each costs little
_MAX_STALLS = 3  # each costs a whole timeout
PIPE_BYTES = 1 << 20  # sixteen times the default, so that a worker and its thread wait for each other less often
_MAX_POLL_SECONDS = 3600.0  # at a time, since poll counts milliseconds in 32 bits
_STDERR = 2
_MAX_WORDS_BYTES = 4000  # end of a lost worker's output, for the error


class WorkerLost(Exception):
    """A worker died or took too long; `limit` is how many may be lost on one window before that is an error."""

    def __init__(self, message: str, limit: int) -> None:
        super().__init__(message)
        self.limit = limit


class WorkerProcess:
    """One worker process, seen from the parent."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._ready = False
        self._words = b""  # end of what it wrote to stderr since its last answer
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            # -P: files in the current folder must not shadow the worker's modules
            [sys.executable, "-P", "-m", "shards.windows.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # One thread each, so that there are as many as the user asked for and no more.
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        )
        pipes = (self._process.stdin, self._process.stdout, self._process.stderr)
        self._pipes = [pipe for pipe in pipes if pipe is not None]
        self._stdin, self._stdout, self._stderr = (pipe.fileno() for pipe in self._pipes)
        os.set_blocking(self._stderr, False)
        self._poll = select.poll()  # not select, which refuses descriptors beyond 1,023
        for descriptor in (self._stdout, self._stderr):
            self._poll.register(descriptor, select.POLLIN)
        # If the user's limit on pipes is reached, or not on Linux, it works as well, only with more waiting.
        with contextlib.suppress(OSError, AttributeError):
            fcntl.fcntl(self._stdout, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def prepare(self, stages: Sequence[str], recipe: Recipe) -> None:
        """Wait until it can make windows. Raises: HeadraceError if it cannot, with its own message; WorkerLost."""
        self._send(worker_protocol.Request(stages=tuple(stages), recipe=recipe))
        deadline = time.monotonic() + self._timeout
        error = worker_protocol.receive_ready(lambda size: self._read(size, deadline))
        if error is not None:
            raise error
        self._ready, self._words = True, b""

    def ask(self, task: WindowTask) -> None:
        """Send a task. Raises: WorkerLost."""
        self._send(worker_protocol.Request(task=task))

    def answer(self) -> Window | HeadraceError:
        """Wait for the answer to the oldest unanswered task. Raises: WorkerLost."""
        deadline = time.monotonic() + self._timeout
        received = worker_protocol.receive_window(lambda size: self._read(size, deadline))
        self._words = b""
        return received

    def _send(self, request: worker_protocol.Request) -> None:
        view = memoryview(worker_protocol.encode_request(request))
        try:
            while view:
                view = view[os.write(self._stdin, view) :]
        except BrokenPipeError:
            raise self._death() from None

    def _read(self, size: int, deadline: float) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            if not self._wait(deadline):
                patience = f"gave no answer for {self._timeout:g} s; if it needs longer, raise data.worker_timeout"
                raise WorkerLost(patience + self._last_words(), _MAX_STALLS)
            got = os.readv(self._stdout, [view])
            if not got:
                raise self._death()
            view = view[got:]
        return data

    def _wait(self, deadline: float) -> bool:
        """Wait for more of an answer, forwarding stderr meanwhile; return False if nothing comes in time."""
        while True:
            left = deadline - time.monotonic()
            ready = dict(self._poll.poll(1000 * min(max(0.0, left), _MAX_POLL_SECONDS)))
            if self._stderr in ready and not self._pass_on():
                self._poll.unregister(self._stderr)  # closed
            if self._stdout in ready:
                return True
            if left <= 0:
                return False

    def _pass_on(self) -> bool:
        """Copy what the worker wrote to stderr to this process's, and keep the end; False if there is nothing."""
        try:
            data = os.read(self._stderr, PIPE_BYTES)
        except BlockingIOError:
            return False
        self._words = (self._words + data)[-_MAX_WORDS_BYTES:]
        with contextlib.suppress(OSError):  # stderr of this process may be closed
            os.write(_STDERR, data)
        return bool(data)

    def _last_words(self) -> str:
        while self._pass_on():
            pass
        words = self._words.decode(errors="replace").strip()
        return f"; it wrote:\n{words}\n" if words else ""

    def _death(self) -> Exception:
        """Return the error for a worker that has ended: bad luck, or a failure that any worker would have."""
        status = self._process.wait()
        if not self._ready and status >= 0:  # it exited on its own, not by a signal
            return ShardError(f"a worker could not start (exit status {status}){self._last_words()}")
        memory = "; if memory ran out, lower data.num_workers" if status == -signal.SIGKILL else ""
        return WorkerLost(f"died (exit status {status}){memory}{self._last_words()}", MAX_DEATHS)

    def interrupt(self) -> None:
        """End it, whichever thread is waiting for it."""
        self._process.kill()

    def kill(self) -> None:
        """End it and release its resources."""
        self._process.kill()
        self._process.wait()
        for pipe in self._pipes:
            pipe.close()
