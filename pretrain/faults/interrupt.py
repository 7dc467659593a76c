"""Signals that ask a run to stop, turned into one decision that all ranks share. signals -> interrupt -> loop.

What arrived is noted by a thread, since Python calls a handler only where the main thread comes back from what it
waits for. Between two steps, or two batches of an evaluation, the loop asks all ranks with a collective, and tells this
module the answer, so that every rank stops at the same place. Before there are process groups there is nobody to ask
and nothing to save: there a signal ends the start. What may arrive meanwhile:
- Ctrl-C reaches every process of the terminal; DeepSpeed's launcher sends SIGTERM on top, up to half a minute later;
- Slurm may send SIGUSR1 ahead of the time limit and SIGTERM at it.
So another kind of signal is no impatience. The same one again, after a second, is.

The `deepspeed` command itself dies of a SIGTERM without a word to those it started, which would train on unattended. So
a process whose launcher has lost its parent takes that for the request.
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

STOPPED = 75  # EX_TEMPFAIL: stopped early and wants to go on; Slurm can requeue on it

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_LAUNCHER = "deepspeed.launcher.launch"  # the module between the `deepspeed` command and its ranks
_WATCH_SECONDS = 0.5
_REPEAT_SECONDS = 1.0  # the same signal within this time came by several ways, not twice
_LEAVE_SECONDS = 10.0  # that a start has to leave in order; it may hang at the rendezvous
LAUNCHER_GRACE_SECONDS = 30.0  # between the launcher's SIGTERM and its SIGKILL


class Stopped(BaseException):
    """A signal ended a start, before there was anything to save; no error, so that nothing takes it for one."""


class Interrupt:
    """Listens for signals while it is entered (on the main thread); puts the old handlers back at the end.

    Attributes:
        requested: the number of the signal that this process received first; 0 if none.
        has_launcher: whether the `deepspeed` command started this process, which kills it half a minute after SIGTERM.
    """

    def __init__(self) -> None:
        self.requested = 0
        self._first_at: dict[int, float] = {}  # signal -> time.monotonic() of its first arrival
        self._previous: dict[signal.Signals, signal._HANDLER] = {}
        self._left = threading.Event()
        self._starting = False  # whether a signal ends the start
        self._leaving = False  # whether one does
        self.has_launcher = False

    def __enter__(self) -> Interrupt:
        self._ears, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._in_main_thread)
        self._left.clear()
        threading.Thread(target=self._listen, args=(self._ears,), name="signals", daemon=True).start()
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
        self._mouth.close()  # which ends the thread that listens

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Inside, a signal raises Stopped; if that gets nowhere, the process ends."""
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
                # No signal: on Ctrl-C the launcher has sent one already, and a second would mean impatience
                self._request(signal.SIGTERM, "the launcher is gone")
                return

    def _in_main_thread(self, number: int, frame: FrameType | None) -> None:
        if self._starting and not self._leaving:
            self._leaving = True
            raise Stopped

    def _listen(self, ears: socket.socket) -> None:
        while arrived := ears.recv(1):
            if arrived[0] in _SIGNALS:
                self._receive(arrived[0])
        ears.close()

    def _receive(self, number: int) -> None:
        now = time.monotonic()
        first_at = self._first_at.setdefault(number, now)
        name = signal.Signals(number).name
        if now - first_at > _REPEAT_SECONDS:
            _say(f"{name} again: exiting at once; the run goes on from its last checkpoint\n")
            os._exit(128 + number if number == signal.SIGINT else STOPPED)
        self._request(number, name)

    def _request(self, number: int, reason: str) -> None:
        if self.requested:
            return
        starting = self._starting or self._leaving
        self.requested = number
        if starting:
            _say(f"{reason}: nothing is trained yet, leaving\n")
            threading.Thread(target=self._leave, name="leave", daemon=True).start()
        else:
            _say(f"{reason}: saving after this step, then exiting; the same signal again exits at once\n")

    def _leave(self) -> None:
        if not self._left.wait(_LEAVE_SECONDS) and (self._starting or self._leaving):
            os._exit(STOPPED)


def _say(message: str) -> None:
    # Not by logging or print: the signal may have come in the middle of one of those, while it holds its lock
    os.write(2, message.encode())
