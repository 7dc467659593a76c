"""Record the signals that ask a run to stop. signals -> interrupt -> stop.

A thread records them, since Python calls a handler only once the main thread returns from whatever it waits for. `stop`
makes all ranks stop at the same step. During a start there is nothing to save yet, and a signal ends the start. What
may arrive:
- Ctrl-C reaches every process of the terminal; DeepSpeed's launcher sends SIGTERM on top, up to half a minute later;
- Slurm may send SIGUSR1 ahead of the time limit and SIGTERM at it.
So a signal of another kind does not mean impatience; the same one again, after a second, does.

The `deepspeed` command itself dies of a SIGTERM without telling the processes it started, which would go on training
unattended. So a process whose launcher has lost its parent takes that as a request to stop.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

import psutil

STOPPED = 75  # EX_TEMPFAIL: stopped early and wants to continue; Slurm can requeue on it

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_LAUNCHER = "deepspeed.launcher.launch"  # the module between the `deepspeed` command and its ranks
_WATCH_SECONDS = 0.5
_REPEAT_SECONDS = 1.0  # a repeat within this time is the same signal arriving by two routes
_LEAVE_SECONDS = 10.0  # for a start to exit cleanly; it may hang at the rendezvous
LAUNCHER_GRACE_SECONDS = 30.0  # between the launcher's SIGTERM and its SIGKILL


class Stopped(BaseException):
    """A signal ended a start before there was anything to save; not an error, so that nothing handles it as one."""


class Interrupt:
    """Listens for signals while it is entered, on the main thread, and finally restores the old handlers.

    Attributes:
        requested: number of the first signal that this process received; 0 if none.
        has_launcher: whether the `deepspeed` command started this process, which kills it half a minute after SIGTERM.
    """

    def __init__(self) -> None:
        self.requested = 0
        self._first_at: dict[int, float] = {}  # signal -> time.monotonic() of its first arrival
        self._previous: dict[signal.Signals, signal._HANDLER] = {}
        self._left = threading.Event()
        self._starting = False  # whether a signal would end the start
        self._leaving = False  # whether a signal is ending the start
        self.has_launcher = False

    def __enter__(self) -> Interrupt:
        self._listener, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._in_main_thread)
        # Asks for a profile of steps, which there are none of before and after the training; by default it would kill.
        self._previous[signal.SIGUSR2] = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        self._left.clear()
        threading.Thread(target=self._listen, args=(self._listener,), name="signals", daemon=True).start()
        threading.Thread(target=self._watch_launcher, name="launcher-watch", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
        signal.set_wakeup_fd(self._previous_fd)
        self._left.set()
        self._waker.close()  # this ends the listening thread

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Let a signal raise Stopped inside the block; if the start does not leave in time, end the process."""
        self._starting = True
        try:
            if self.requested:
                raise Stopped
            yield
        finally:
            self._starting = False

    def _watch_launcher(self) -> None:
        try:
            launcher = psutil.Process().parent()
            if launcher is None or _LAUNCHER not in launcher.cmdline():
                return
            parent = launcher.ppid()
            self.has_launcher = True
        except psutil.Error:
            return
        while not self._left.wait(_WATCH_SECONDS):
            try:
                orphaned = launcher.ppid() != parent
            except psutil.NoSuchProcess:
                orphaned = True
            if orphaned:
                # Not by a signal: on Ctrl-C the launcher has sent one already, and a second would mean impatience.
                self._request(signal.SIGTERM, "the launcher is gone")
                return

    def _in_main_thread(self, number: int, frame: FrameType | None) -> None:
        if self._starting and not self._leaving:
            self._leaving = True
            raise Stopped

    def _listen(self, listener: socket.socket) -> None:
        while arrived := listener.recv(1):
            if arrived[0] in _SIGNALS:
                self._receive(arrived[0])
        listener.close()

    def _receive(self, number: int) -> None:
        now = time.monotonic()
        first_at = self._first_at.setdefault(number, now)
        name = signal.Signals(number).name
        if now - first_at > _REPEAT_SECONDS:
            _say(f"{name} again: exiting at once; the run will resume from its last checkpoint\n")
            os._exit(128 + number if number == signal.SIGINT else STOPPED)
        self._request(number, name)

    def _request(self, number: int, reason: str) -> None:
        if self.requested:
            return
        starting = self._starting or self._leaving
        self.requested = number
        if starting:
            _say(f"{reason}: nothing has been trained yet, exiting\n")
            threading.Thread(target=self._leave, name="leave", daemon=True).start()
        else:
            _say(f"{reason}: saving after this step, then exiting; the same signal again exits at once\n")

    def _leave(self) -> None:
        if not self._left.wait(_LEAVE_SECONDS) and (self._starting or self._leaving):
            os._exit(STOPPED)


def _say(message: str) -> None:
    # Not by logging or print: the signal may have come while one of those holds its lock.
    os.write(2, message.encode())
