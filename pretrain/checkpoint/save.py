"""Save a run's checkpoints, on all ranks together, during training. trainer -> save -> {staging, write, store}.

    training   ... step 100 | copy | step 101  step 102  step 103 ...
    background                      write, fsync, hash | COMPLETE, old ones removed

Training waits only for the copy, and for the previous save if it is still running. Each rank writes its own files.
The collective that every step makes anyway tells whether all ranks are done; then the ranks exchange the hashes, and
rank 0 writes COMPLETE. The order of operations makes a kill harmless at any point: the files, their fsync, the records'
fsync, COMPLETE, and only then the removal of older checkpoints. Nothing is changed in place.

A failed save is logged as an error and leaves nothing behind; training continues, and the next save tries again. Too
many failures in a row end the run, since its progress could no longer be kept.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol

import msgspec

from pretrain.checkpoint.staging import Staging
from pretrain.checkpoint.state import DataState, RunState
from pretrain.checkpoint.store import CheckpointFile, CheckpointStore
from pretrain.checkpoint.write import Writer
from pretrain.run.events import Event, Tell, log_event
from pretrain.run.lease import Lease
from pretrain.run.run_folder import RunFolder
from pretrain.topology import Topology
from shards import CheckpointError, ConfigError, HeadraceError

_logger = logging.getLogger(__name__)

_NOTEWORTHY_SECONDS = 1.0  # a longer wait for the previous save is logged
_FAILURES_SHOWN = 4  # over all ranks; a full disk can fail thousands of files


class SavableEngine(Protocol):
    """An engine that can be saved."""

    def save(self, folder: Path, take: Callable[[Path, object], None]) -> None:
        """Pass the path and content of each file that this rank saves to `take`."""


@dataclass(frozen=True)
class _Writing:
    """A save whose files are being written."""

    step: int
    begun: float  # time.monotonic()
    files: list[Future[CheckpointFile]] = field(default_factory=list)  # those of this rank

    @property
    def is_busy(self) -> bool:
        return not all(file.done() for file in self.files)


@dataclass(frozen=True)
class _Closing:
    """A save whose files have all been written or have failed; rank 0 completes it or removes its remains.

    Attributes:
        seconds: rank 0's background task, whose result is the duration of the whole save, or None if it failed.
            None on other ranks.
    """

    step: int
    seconds: Future[float | None] | None

    def completed_in(self) -> float | None:
        """Return how many seconds the save took if this rank knows that it is complete, else None."""
        if self.seconds is None or not self.seconds.done() or self.seconds.exception() is not None:
            return None
        return self.seconds.result()


class Saver:
    """Saves one checkpoint at a time. Every rank has one and calls the same methods in the same order.

    A save is first `_Writing`, then `_Closing`, then over; a failure at any point is counted and made known to all
    ranks. Only the training thread changes these states. Background tasks return their results in futures.

    Args:
        store: the run's checkpoints.
        engine: the engine to save.
        folder: the run's folder; its records are made durable before a checkpoint is complete.
        lease: rank 0's lease on that folder, checked before every change. None on other ranks.
        tell: tells of saves that fail and of a disk that fills up, on rank 0.
    """

    def __init__(
        self,
        store: CheckpointStore,
        engine: SavableEngine,
        topology: Topology,
        folder: RunFolder,
        lease: Lease | None,
        tell: Tell,
    ) -> None:
        self._store = store
        self._engine = engine
        self._topology = topology
        self._folder = folder
        self._lease = lease
        self._tell = tell
        self._writer = Writer()
        self._staging = Staging(topology.device.type == "cuda") if store.config.asynchronous else None
        self._under_way: _Writing | _Closing | None = None
        self._failure: str | None = None  # reason why the newest save failed; the same on all ranks
        self._failed = 0  # failed saves in a row; the same on all ranks
        self._failed_step: int | None = None  # step of the newest failed save
        self._seconds: float | None = None  # set on rank 0 only

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Abandon a save in progress: the other ranks may be gone."""
        self._writer.__exit__(kind, error, trace)

    @property
    def busy(self) -> bool:
        """Return whether this rank is still writing."""
        return isinstance(self._under_way, _Writing) and self._under_way.is_busy

    @property
    def seconds(self) -> float | None:
        """Return how many seconds the newest complete save took; None before the first, and on ranks > 0."""
        completed_in = self._under_way.completed_in() if isinstance(self._under_way, _Closing) else None
        return self._seconds if completed_in is None else completed_in

    @property
    def failed(self) -> int:
        """Return how many saves in a row failed or were refused.

        Rank 0 learns of a success first; the other ranks learn of it when the next save begins.
        """
        if isinstance(self._under_way, _Closing) and self._under_way.completed_in() is not None:
            return 0
        return self._failed

    def save(self, state: RunState, data: DataState | None) -> float:
        """Start saving the checkpoint of `state.step`; later training does not change what is saved.

        A step that is saved already is skipped; one whose save failed is tried again.

        Args:
            data: only rank 0 needs it.
        Returns:
            Seconds for which training was paused.
        Raises:
            CheckpointError: on all ranks, if `checkpoint.max_failed_saves` saves in a row have failed; every method
                that may end a save raises it too.
            HeadraceError: on rank 0, if another process has taken over the run.
        """
        begun = time.monotonic()
        self.check_lease()
        is_previous = self._under_way is not None and self._under_way.step < state.step
        self.end_current()  # saves must not overlap
        waited = time.monotonic() - begun
        if is_previous and waited > _NOTEWORTHY_SECONDS and self._topology.is_main:
            _logger.warning(
                "the save of step %d waited %.1f s for the previous one; set checkpoint.every higher",
                state.step, waited,
            )  # fmt: skip
        prepared, self._failure = self._topology.broadcast_object(self._prepare(state.step))
        if prepared:
            self._write(state, data, begun)
        elif self._failure:
            self._count_failure(state.step)
        return time.monotonic() - begun

    def settle(self, busy: bool) -> None:
        """Close the save in progress once no rank is writing; every rank calls it with the same answer.

        Args:
            busy: whether any rank is still writing, as found by the step's collective.
        """
        if isinstance(self._under_way, _Writing) and not busy:
            self._close(self._under_way)

    def pulse(self) -> None:
        """Do what `settle` does, with its own collective; for long phases in which training makes none."""
        if isinstance(self._under_way, _Writing):
            self.settle(self._topology.any(self.busy))

    def end_current(self) -> None:
        """Wait until no save is in progress; it may have failed."""
        if isinstance(self._under_way, _Writing):
            self._close(self._under_way)  # this waits for the files
        if isinstance(self._under_way, _Closing):
            self._end(self._under_way)

    def finish(self) -> None:
        """Wait until the newest save is complete.

        Raises:
            CheckpointError: on all ranks, if the save failed or was refused.
        """
        self.end_current()
        if self._failure:
            raise CheckpointError(f"the run's latest state is not saved: {self._failure}")

    def check_lease(self) -> None:
        """Raise HeadraceError, on rank 0, if another process has taken over the run."""
        if self._lease:
            self._lease.check()

    def _prepare(self, step: int) -> tuple[bool, str | None]:
        """Make room and create the folder, on rank 0.

        Returns:
            Whether there is anything to write, and an error message or None.
        """
        if not self._topology.is_main:
            return False, None
        try:
            if self._store.is_complete(step):  # true if a run stops right after resuming
                return False, None
            for removed in self._store.make_room():
                text = f"the disk has too little room for the next checkpoint: that of step {removed} was removed"
                self._tell(Event(step, "disk", text, {"removed": removed}))
            self._store.prepare(step)
        except ConfigError as error:
            self._tell(Event(step, "disk", f"step {step} is not saved: {error}", {}))
            return False, str(error)
        except OSError as error:
            self._report(step, str(error))
            return False, str(error)
        return True, None

    def _write(self, state: RunState, data: DataState | None, begun: float) -> None:
        """Copy this rank's state and queue it for writing."""
        folder = self._store.folder_of(state.step)
        self._under_way = writing = _Writing(state.step, begun)
        if self._topology.is_main:
            assert data is not None
            for name, content in (("state.json", state), ("data.json", data)):
                writing.files.append(self._writer.write(folder, name, msgspec.json.encode(content) + b"\n"))

        def take(path: Path, content: object) -> None:
            name = path.relative_to(folder).as_posix()
            try:
                copied = self._staging.copy(path.name, content) if self._staging else content
            except (MemoryError, RuntimeError) as error:
                failed: Future[CheckpointFile] = Future()
                failed.set_exception(CheckpointError(f"no host memory for the copy of {name}: {error}"))
                writing.files.append(failed)
                return
            writing.files.append(self._writer.write(folder, name, copied))
            if not self._staging:
                wait(writing.files)  # the content is the live model's

        self._engine.save(folder, take)
        if not self._staging:
            self.end_current()

    def _close(self, writing: _Writing) -> None:
        """Exchange the outcomes of all files; rank 0 then completes the checkpoint or removes its remains."""
        outcomes = self._topology.gather_objects([_outcome(file) for file in writing.files])
        files = [found for part in outcomes for found in part if isinstance(found, CheckpointFile)]
        failures = [
            f"rank {rank}: {found}" for rank, part in enumerate(outcomes) for found in part if isinstance(found, str)
        ]
        more = f"; and {len(failures) - _FAILURES_SHOWN} more" if len(failures) > _FAILURES_SHOWN else ""
        self._failure = "; ".join(failures[:_FAILURES_SHOWN]) + more if failures else None
        seconds: Future[float | None] | None = None
        if self._topology.is_main and self._failure:
            self._report(writing.step, self._failure)
            seconds = self._writer.submit(self._store.try_to_discard, writing.step)
        elif self._topology.is_main:
            seconds = self._writer.submit(self._complete, writing, files)
        self._under_way = _Closing(writing.step, seconds)
        if self._failure:
            self._count_failure(writing.step)

    def _end(self, closing: _Closing) -> None:
        """Wait for rank 0, then tell all ranks how the save ended."""
        self._under_way = None
        error = closing.seconds.exception() if closing.seconds else None
        incomplete = self._topology.broadcast_object(str(error) if error else None)
        if incomplete:  # all files were written, but not COMPLETE
            self._failure = incomplete
            self._count_failure(closing.step)
        elif not self._failure:
            self._failed = 0
            self._seconds = closing.completed_in()

    def _count_failure(self, step: int) -> None:
        """Record, on all ranks, that the save of a step has failed; a retried one counts once."""
        if step == self._failed_step:
            return
        self._failed_step = step
        self._failed += 1
        if self._failed >= self._store.config.max_failed_saves:
            raise CheckpointError(
                f"{self._failed} saves in a row have failed (checkpoint.max_failed_saves); the last error was:"
                f" {self._failure}. The run ends, since further progress could not be kept; make room on the disk or"
                " repair it, then start the run again: it continues from its last checkpoint"
            )

    def _complete(self, writing: _Writing, files: list[CheckpointFile]) -> float:
        """Complete a checkpoint and remove older ones, in the background; return how many seconds the save took."""
        try:
            self._folder.sync()
            self.check_lease()
            seconds = time.monotonic() - writing.begun
            self._store.complete(writing.step, files, seconds)
        except (OSError, HeadraceError) as error:
            if isinstance(error, OSError):
                self._report(writing.step, str(error))
                self._store.try_to_discard(writing.step)
            else:  # the folder may belong to another process by now
                log_event(_failed(writing.step, str(error)))
            raise
        size = sum(file.size for file in files)
        _logger.info(
            "the checkpoint of step %d is complete: %.3g GB in %.2f s, %.3g GB/s",
            writing.step, size / 1e9, seconds, size / 1e9 / seconds,
        )  # fmt: skip
        self._store.prune()
        return seconds

    def _report(self, step: int, failure: str) -> None:
        self._tell(_failed(step, failure))


def _failed(step: int, failure: str) -> Event:
    return Event(step, "save_failed", f"step {step} is not saved: {failure}", {})


def _outcome(file: Future[CheckpointFile]) -> CheckpointFile | str:
    """Wait for a file; return what is to be listed of it, or the reason why it could not be written."""
    error = file.exception()
    if error is None:
        return file.result()
    if not isinstance(error, CheckpointError):
        _logger.error("a checkpoint file could not be written", exc_info=error)
    return str(error) or repr(error)
