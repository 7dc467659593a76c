"""A slot of a sweep, in which one run after another is trained. forked -> slot -> local."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_SERVE = "import sys; sys.path[0] = {root!r}; from pretrain.sweep.forked import serve; serve({parent}, {is_warm})"


class Slot:
    """Where one run at a time is trained.

    Args:
        environment: of its runs.
        is_warm: fork runs from a process that has imported what they need. Not for runs on GPUs: what importing does
            with a device does not survive a fork.
    """

    def __init__(self, environment: Mapping[str, str], is_warm: bool) -> None:
        self.environment, self.is_warm = dict(environment), is_warm
        self._server: subprocess.Popen[bytes] | None = None
        self._unread = b""  # of what the server has written
        self._process = 0  # the run's, once the server has said it
        self.is_free = True

    def start(self, words: Sequence[str], log: Path) -> None:
        """Start a run, with its output appended to a log.

        Args:
            words: what comes after `python`: a script, or -m and a module, and arguments.
        """
        if self._server is not None and self._server.poll() is not None:
            self.close()  # it was killed after the last run
        if self._server is None:
            serve = _SERVE.format(root=str(_ROOT), parent=os.getpid(), is_warm=self.is_warm)
            with log.open("ab") as errors:  # of what it imports
                self._server = subprocess.Popen(
                    [sys.executable, "-c", serve],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=self.environment,
                    start_new_session=True,  # or Ctrl-C would reach the run beside the sweep's own request to stop
                )
        assert self._server.stdin is not None
        self._process, self.is_free = 0, False
        with contextlib.suppress(BrokenPipeError):  # it has ended already, which `poll` notices
            self._server.stdin.write(json.dumps([str(log), *words]).encode() + b"\n")
            self._server.stdin.flush()

    def poll(self) -> int | None:
        """Return the exit code of the run if it has ended, negative for a signal."""
        return self._code(wait=False)

    def wait(self) -> int:
        """Return the exit code of the run once it has ended, negative for a signal."""
        code = self._code(wait=True)
        assert code is not None
        return code

    def ask_to_stop(self) -> None:
        """Ask the run to save and end."""
        if not self._process:
            self._process = int(self._line(wait=True) or 0)
        if self._process:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.kill(self._process, signal.SIGTERM)

    def close(self) -> None:
        """End the server, which trains no run."""
        if self._server is not None:
            assert self._server.stdin is not None
            assert self._server.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                self._server.stdin.close()
            self._server.wait()
            self._server.stdout.close()
            self._server, self._unread = None, b""

    def _code(self, wait: bool) -> int | None:
        if not self._process:
            line = self._line(wait)
            if line is None:
                return None
            self._process = int(line or 0)
        line = self._line(wait)
        if line is None:
            return None
        self.is_free = True
        if not line:  # the server is gone, and its run was asked to stop; without a run it could not start
            assert self._server is not None
            code = -signal.SIGTERM if self._process else self._server.wait() or 1
            self.close()
            return code
        return int(line)

    def _line(self, wait: bool) -> str | None:
        """Return the server's next line: empty if it has ended, None if there is none yet."""
        assert self._server is not None
        assert self._server.stdout is not None
        answers = self._server.stdout.fileno()
        while b"\n" not in self._unread:
            if not wait and not select.select([answers], [], [], 0)[0]:
                return None
            data = os.read(answers, 1 << 12)
            if not data:
                return ""
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()
