"""Tell what is worth telling of a run, in one place: log, events.jsonl, wandb, a command of the user's.

{unapplied_steps, watchdog, save, trainer, ...} -> events -> {log, run folder, wandb_tracker, hook}.

Only rank 0 tells. Nothing here stops or delays a training: a command runs beside it, and what fails is logged.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import queue
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, get_args

import msgspec

from pretrain.run.step_log import StepLog
from shards import ConfigError

_logger = logging.getLogger(__name__)

_HOOK_SECONDS = 60.0  # that a command may take
_LAST_HOOKS_SECONDS = 10.0  # that the end of a process waits for commands that have not ended
_WAITING_HOOKS = 100  # events that wait for the command; further ones are dropped, which is logged

Kind = Literal[
    "spike", "rewind", "patience", "explosion", "nonfinite", "no_targets", "stall", "disk",
    "save_failed", "straggler", "slowdown", "no_gradient", "doubt", "stopped", "finished",
]  # fmt: skip
KINDS: tuple[str, ...] = get_args(Kind)

# How loudly each kind is told; all others are warnings.
_LEVELS = {"stall": logging.ERROR, "save_failed": logging.ERROR, "stopped": logging.INFO, "finished": logging.INFO}


@dataclass(frozen=True)
class Event:
    """Something that happened to a run.

    Attributes:
        step: optimizer steps done, including the one that it is about.
        kind: what happened.
        text: whole sentences for a reader who sees nothing else.
        figures: what the text says, for programs; JSON-able values.
    """

    step: int
    kind: Kind
    text: str
    figures: Mapping[str, object]

    @property
    def level(self) -> int:
        """Return how loudly it is told, as a level of `logging`."""
        return _LEVELS.get(self.kind, logging.WARNING)


Tell = Callable[[Event], None]


def now() -> str:
    """Return the time in UTC, to the second, in ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def check_command(command: str | None) -> None:
    """Raise ConfigError if `metrics.on_event` names a program that cannot be run here, where the run starts."""
    if command is not None and shutil.which(program := shlex.split(command)[0]) is None:
        raise ConfigError(f"metrics.on_event={command!r}: there is no program {program!r} that can be run")


class Hook:
    """Runs a command for each event, one after the other, beside the training: `with Hook(command, run) as hook`.

    The command is split into words as a shell would, but no shell runs it: no variables, pipes or quotes of an event's
    text are interpreted. It gets the event as one line of JSON on its standard input. Its output goes to the log if it
    fails, and nowhere otherwise.

    Args:
        command: program and arguments; None: nothing is run.
        run: the run's name, which the JSON has beside the event.
    """

    def __init__(self, command: str | None, run: str) -> None:
        self._words = shlex.split(command) if command else []
        self._run = run
        self._waiting: queue.Queue[bytes | None] = queue.Queue(_WAITING_HOOKS)
        self._thread = threading.Thread(target=self._work, name="on-event", daemon=True)

    def __enter__(self) -> Hook:
        if self._words:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()

    def __call__(self, record: Mapping[str, object]) -> None:
        """Run the command for an event's record, soon."""
        if not self._words:
            return
        try:
            self._waiting.put_nowait(msgspec.json.encode({"run": self._run, **record}) + b"\n")
        except queue.Full:
            _logger.warning("metrics.on_event: an event is not told, since %d others wait", _WAITING_HOOKS)

    def finish(self) -> None:
        """Wait a little for the commands that are due, and end; what still runs then goes on by itself."""
        if not self._thread.is_alive():
            return
        deadline = time.monotonic() + _LAST_HOOKS_SECONDS
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=_LAST_HOOKS_SECONDS)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            _logger.warning("metrics.on_event: %s has not ended; the run does not wait for it", shlex.join(self._words))

    def _work(self) -> None:
        while (line := self._waiting.get()) is not None:
            try:
                code, said = _run(self._words, line)
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                _logger.warning("metrics.on_event: %s failed: %s", shlex.join(self._words), error)
                continue
            if code:
                _logger.warning(
                    "metrics.on_event: %s exited with %d: %s", shlex.join(self._words), code, said.strip()[-500:]
                )


def _run(words: Sequence[str], line: bytes) -> tuple[int, str]:
    """Run a command with a line as its input; return its exit code and output.

    Raises:
        subprocess.TimeoutExpired: if it took too long, and was ended with all that it had started.
    """
    pipe = subprocess.PIPE
    # A session of its own, so that Ctrl-C, which is told too, does not end it.
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, start_new_session=True) as process:
        try:
            said, _ = process.communicate(line, timeout=_HOOK_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, said.decode(errors="replace")


def log_event(event: Event) -> None:
    """Tell an event in the log only."""
    _logger.log(event.level, "%s", event.text)


class Events:
    """Tells events everywhere; on rank 0 only.

    Args:
        log: the run's events.jsonl.
        alert: sends an event to wandb.
        hook: runs the user's command; entered.
    """

    def __init__(self, log: StepLog, alert: Tell, hook: Hook) -> None:
        self._log, self._alert, self._hook = log, alert, hook

    def tell(self, event: Event) -> None:
        """Tell an event, in the order of what must not be lost: a caller may be about to end the process."""
        record = {
            "step": event.step, "time": now(), "kind": event.kind, "text": event.text, "figures": event.figures,
        }  # fmt: skip
        try:
            self._log.append(record)
        except Exception as error:  # a full disk, for example, is what an event is about
            _logger.warning("%s lacks an event: %s", self._log.path, error)
        self._hook(record)
        log_event(event)
        self._alert(event)
