"""End a process that hangs: log all its stacks, and exit with the code that asks for a restart. trainer -> watchdog.

A rank that hangs silently holds up all others in their next collective. The first rank to notice may not be the
culprit, so every rank that notices shows where it is.
"""

from __future__ import annotations

import faulthandler
import os
import tempfile
import threading
import time
from types import TracebackType

from pretrain.faults.interrupt import STOPPED
from pretrain.run.events import Event, Tell

_TELLING_SECONDS = 15.0  # before a process that hangs ends without having told of it


class Watchdog:
    """Watches, in a thread, whether the current part of the work takes too long.

    Args:
        timeout: seconds that a part may take; None: no limit.
        rank: rank for the message.
        tell: tells of it, on rank 0.
    """

    def __init__(self, timeout: float | None, rank: int, tell: Tell) -> None:
        self._timeout = timeout
        self._rank = rank
        self._tell = tell
        self._kinds: set[str] = set()  # kinds of parts that have run before
        self._watched: tuple[str, int, float] | None = (
            None  # the current part's name, steps done, time.monotonic() at its start
        )
        self._left = threading.Event()

    def __enter__(self) -> Watchdog:
        if self._timeout is not None:
            threading.Thread(target=self._watch, args=(self._timeout,), name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()

    def begin(self, kind: str, name: str, step: int) -> None:
        """Begin a part of the work, ending the previous one.

        Args:
            kind: the first part of each kind is not watched, since it may compile.
            name: its name in the message.
            step: optimizer steps done.
        """
        self._watched = (name, step, time.monotonic()) if kind in self._kinds else None
        self._kinds.add(kind)

    def renew(self) -> None:
        """Give the current part its time again, since it has got on."""
        if self._watched:
            self._watched = (*self._watched[:2], time.monotonic())

    def end(self) -> None:
        """End the current part."""
        self._watched = None

    def _watch(self, timeout: float) -> None:
        while not self._left.wait(min(timeout / 4, 5.0)):
            watched = self._watched
            if watched and time.monotonic() - watched[2] > timeout:
                self._give_up(*watched[:2], timeout)

    def _give_up(self, name: str, step: int, timeout: float) -> None:
        found = f"{name} has taken more than train.stall_timeout={timeout:g} s"
        message = (
            f"{found}; the stacks of all threads follow."
            " Exiting for a restart, which resumes from the last checkpoint\n"
        )
        with tempfile.TemporaryFile("w+") as stacks:
            faulthandler.dump_traceback(stacks, all_threads=True)
            stacks.seek(0)
            lines = [message, *stacks]
        # In a single write, with the rank on each line, since all ranks may write at once. Not by logging, since the
        # thread that hangs may hold its lock.
        os.write(2, "".join(f"rank {self._rank}: {line}" for line in lines).encode())
        # By a thread that may hang itself, at a lock that the thread that hangs holds.
        event = Event(step, "stall", f"{found}: the process ends, for a restart from the last checkpoint", {})
        telling = threading.Thread(target=self._tell, args=(event,), name="stall", daemon=True)
        telling.start()
        telling.join(_TELLING_SECONDS)
        os._exit(STOPPED)
