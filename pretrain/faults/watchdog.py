"""Ends a process that hangs: all its stacks go to the log, and it asks to be started again. trainer -> watchdog.

A rank that hangs silently holds up all others in their next collective. So the first one to notice need not be the one
to blame, and every rank that notices shows where it is.
"""

from __future__ import annotations

import faulthandler
import os
import tempfile
import threading
import time
from types import TracebackType

from pretrain.faults.interrupt import STOPPED


class Watchdog:
    """Watches, in a thread, whether the part of the work that is under way takes too long.

    Args:
        timeout: seconds that one part may take; None: watch nothing.
        rank: named in the message.
    """

    def __init__(self, timeout: float | None, rank: int) -> None:
        self._timeout = timeout
        self._rank = rank
        self._kinds: set[str] = set()  # kinds of parts that have begun before
        self._watched: tuple[str, float] | None = (
            None  # name of the part under way, and the time.monotonic() of its start
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

    def begin(self, kind: str, name: str) -> None:
        """Begin a part of the work, and end the previous one.

        Args:
            kind: the first part of each kind is not watched, since it may compile.
            name: what the message calls it.
        """
        self._watched = (name, time.monotonic()) if kind in self._kinds else None
        self._kinds.add(kind)

    def end(self) -> None:
        """End the part that is under way."""
        self._watched = None

    def _watch(self, timeout: float) -> None:
        while not self._left.wait(min(timeout / 4, 5.0)):
            watched = self._watched
            if watched and time.monotonic() - watched[1] > timeout:
                self._give_up(watched[0], timeout)

    def _give_up(self, name: str, timeout: float) -> None:
        message = (
            f"{name} has taken more than train.stall_timeout={timeout:g} s; here is where every thread stands."
            " Exiting for another start, which goes on from the last checkpoint\n"
        )
        with tempfile.TemporaryFile("w+") as stacks:
            faulthandler.dump_traceback(stacks, all_threads=True)
            stacks.seek(0)
            lines = [message, *stacks]
        # In a single write, with the rank on each line, since all ranks may write at once. Not by logging: the thread
        # that hangs may hold its lock
        os.write(2, "".join(f"rank {self._rank}: {line}" for line in lines).encode())
        os._exit(STOPPED)
