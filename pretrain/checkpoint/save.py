"""Saves a run's checkpoints, on all ranks together, while training goes on. trainer -> save -> {staging, write, store}.

    training   ... step 100 | copy | step 101  step 102  step 103 ...
    background                      write, fsync, hash | COMPLETE, older ones go

Training waits only for the copy, and for the previous save if that is still under way. Each rank writes its own files.
Whether all have done so is carried by the collective that every step makes anyway; then the ranks exchange the hashes,
and rank 0 writes COMPLETE. The order of the operations decides whether a kill can do harm: the files, their fsync, the
records' fsync, COMPLETE, and only then the removal of older checkpoints. Nothing is changed in place.

A save that fails is logged as an error and leaves nothing behind; training goes on, and the next save tries again. Too
many failures in a row end the run, since it could not keep what it trains from there on.
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
from pretrain.checkpoint.store import CheckpointStore, FileEntry
from pretrain.checkpoint.write import Writer
from pretrain.run.lease import Lease
from pretrain.run.run_folder import RunFolder
from pretrain.topology import Topology
from shards import CheckpointError, ConfigError, HeadraceError

_logger = logging.getLogger(__name__)

_NOTEWORTHY_SECONDS = 1.0  # of waiting for the previous save
_FAILURES_SHOWN = 4  # of the files of all ranks; a full disk fails thousands


class SavableEngine(Protocol):
    """An engine that can be saved."""

    def save(self, folder: Path, take: Callable[[Path, object], None]) -> None:
        """Hand over the path and the content of each file that this rank saves."""


@dataclass(frozen=True)
class _Writing:
    """A save whose files are being written."""

    step: int
    begun: float  # time.monotonic()
    files: list[Future[FileEntry]] = field(default_factory=list)  # this rank's

    @property
    def is_busy(self) -> bool:
        return not all(file.done() for file in self.files)


@dataclass(frozen=True)
class _Closing:
    """A save whose files all ranks have written, or failed to: rank 0 completes it, or removes what there is of it.

    Attributes:
        seconds: what rank 0 does in the background, which gives how long the whole save took, or None if it failed.
            None on the other ranks.
    """

    step: int
    seconds: Future[float | None] | None

    def completed_in(self) -> float | None:
        """Return the seconds that the save took if this rank knows that it is complete, else None."""
        if self.seconds is None or not self.seconds.done() or self.seconds.exception() is not None:
            return None
        return self.seconds.result()


class Saver:
    """Saves one checkpoint at a time. Every rank has one, and calls the same methods in the same order.

    A save is first `_Writing`, then `_Closing`, then over; where it fails is noted, counted, and known to all ranks.
    Only the training's thread changes these states. What runs in the background hands its result over in a future.

    Args:
        store: where the checkpoints lie.
        engine: what is saved.
        folder: the run's; its records are made durable before a checkpoint is complete.
        lease: on that folder; rank 0 checks that it still holds it before it changes anything. None on other ranks.
    """

    def __init__(
        self, store: CheckpointStore, engine: SavableEngine, topology: Topology, folder: RunFolder, lease: Lease | None
    ) -> None:
        self._store = store
        self._engine = engine
        self._topology = topology
        self._folder = folder
        self._lease = lease
        self._writer = Writer()
        self._staging = Staging(topology.device.type == "cuda") if store.config.asynchronous else None
        self._under_way: _Writing | _Closing | None = None
        self._failure: str | None = None  # why the newest save failed; the same on all ranks
        self._failed = 0  # saves in a row; the same on all ranks
        self._failed_step: int | None = None  # of the newest save that failed
        self._seconds: float | None = None  # on rank 0

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Abandon a save that is under way: the other ranks may be gone."""
        self._writer.__exit__(kind, error, trace)

    @property
    def busy(self) -> bool:
        """Return whether this rank is still writing."""
        return isinstance(self._under_way, _Writing) and self._under_way.is_busy

    @property
    def seconds(self) -> float | None:
        """Return the seconds that the newest complete save took; None before the first one, and on ranks > 0."""
        completed_in = self._under_way.completed_in() if isinstance(self._under_way, _Closing) else None
        return self._seconds if completed_in is None else completed_in

    @property
    def failed(self) -> int:
        """Return how many saves in a row have failed or were refused.

        Rank 0 hears of a success first; the other ranks hear of it when the next save begins.
        """
        if isinstance(self._under_way, _Closing) and self._under_way.completed_in() is not None:
            return 0
        return self._failed

    def save(self, state: RunState, data: DataState | None) -> float:
        """Begin to save the checkpoint of `state.step`; what training does next does not change it.

        Where that step is saved already nothing happens, and where its save has failed it is tried again.

        Args:
            data: only rank 0 needs it.
        Returns:
            Seconds for which training stood still.
        Raises:
            CheckpointError: on all ranks, if `checkpoint.max_failed_saves` in a row have failed; the other methods in
                which a save may end raise it too.
            HeadraceError: on rank 0, if another process has taken the run over.
        """
        begun = time.monotonic()
        self.check_lease()
        is_previous = self._under_way is not None and self._under_way.step < state.step
        self._end_current()
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
        """Close the save under way once no rank is writing; every rank calls it with the same answer.

        Args:
            busy: whether any rank is still writing, as found by the step's collective.
        """
        if isinstance(self._under_way, _Writing) and not busy:
            self._close(self._under_way)

    def pulse(self) -> None:
        """Do as `settle` does, with a collective of its own; all ranks call it where training makes none for long."""
        if isinstance(self._under_way, _Writing):
            self.settle(self._topology.any(self.busy))

    def finish(self) -> None:
        """Wait until the newest save is complete.

        Raises:
            CheckpointError: on all ranks, if it failed or was refused.
        """
        self._end_current()
        if self._failure:
            raise CheckpointError(f"the newest state of the run is not saved: {self._failure}")

    def check_lease(self) -> None:
        """Raise HeadraceError, on rank 0, if another process has taken the run over."""
        if self._lease:
            self._lease.check()

    def _end_current(self) -> None:
        """Wait until nothing is under way: a save never overtakes the previous one."""
        if isinstance(self._under_way, _Writing):
            self._close(self._under_way)  # looking at the files' outcomes waits for them
        if isinstance(self._under_way, _Closing):
            self._end(self._under_way)

    def _prepare(self, step: int) -> tuple[bool, str | None]:
        """Make room and a folder, on rank 0.

        Returns:
            Whether there is anything to be written, and what went wrong, if anything.
        """
        if not self._topology.is_main:
            return False, None
        try:
            if self._store.is_complete(step):  # a run that stops right after it was resumed has this one already
                return False, None
            self._store.make_room()
            self._store.prepare(step)
        except (ConfigError, OSError) as error:
            _report(step, str(error))
            return False, str(error)
        return True, None

    def _write(self, state: RunState, data: DataState | None, begun: float) -> None:
        """Copy what this rank saves and have it written."""
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
                failed: Future[FileEntry] = Future()
                failed.set_exception(CheckpointError(f"no host memory for the copy of {name}: {error}"))
                writing.files.append(failed)
                return
            writing.files.append(self._writer.write(folder, name, copied))
            if not self._staging:
                wait(writing.files)  # the content is the model's own

        self._engine.save(folder, take)
        if not self._staging:
            self._end_current()

    def _close(self, writing: _Writing) -> None:
        """Exchange what became of all files; then rank 0 completes the checkpoint, or removes what there is of it."""
        outcomes = self._topology.gather_objects([_outcome(file) for file in writing.files])
        entries = [found for part in outcomes for found in part if isinstance(found, FileEntry)]
        failures = [
            f"rank {rank}: {found}" for rank, part in enumerate(outcomes) for found in part if isinstance(found, str)
        ]
        more = f"; and {len(failures) - _FAILURES_SHOWN} more" if len(failures) > _FAILURES_SHOWN else ""
        self._failure = "; ".join(failures[:_FAILURES_SHOWN]) + more if failures else None
        seconds: Future[float | None] | None = None
        if self._topology.is_main and self._failure:
            _report(writing.step, self._failure)
            seconds = self._writer.submit(self._store.try_to_discard, writing.step)
        elif self._topology.is_main:
            seconds = self._writer.submit(self._complete, writing, entries)
        self._under_way = _Closing(writing.step, seconds)
        if self._failure:
            self._count_failure(writing.step)

    def _end(self, closing: _Closing) -> None:
        """Wait for rank 0, and tell all ranks what became of the save."""
        self._under_way = None
        error = closing.seconds.exception() if closing.seconds else None
        incomplete = self._topology.broadcast_object(str(error) if error else None)
        if incomplete:  # all files were written, but COMPLETE was not
            self._failure = incomplete
            self._count_failure(closing.step)
        elif not self._failure:
            self._failed = 0
            self._seconds = closing.completed_in()

    def _count_failure(self, step: int) -> None:
        """Take note, on all ranks, that the save of a step has failed; one that is tried again counts once."""
        if step == self._failed_step:
            return
        self._failed_step = step
        self._failed += 1
        if self._failed >= self._store.config.max_failed_saves:
            raise CheckpointError(
                f"{self._failed} saves in a row have failed (checkpoint.max_failed_saves), the last one with:"
                f" {self._failure}. The run ends, since it could not keep what it trains from here on; make room or"
                " repair the disk, then start it again: it goes on from its last checkpoint"
            )

    def _complete(self, writing: _Writing, entries: list[FileEntry]) -> float:
        """Complete a checkpoint and remove older ones, in the background; return the seconds that the save took."""
        try:
            self._folder.sync()
            self.check_lease()
            seconds = time.monotonic() - writing.begun
            self._store.complete(writing.step, entries, seconds)
        except (OSError, HeadraceError) as error:
            _report(writing.step, str(error))
            if isinstance(error, OSError):  # otherwise the folder may be another process's by now
                self._store.try_to_discard(writing.step)
            raise
        size = sum(entry.size for entry in entries)
        _logger.info(
            "the checkpoint of step %d is complete: %.3g GB in %.2f s, %.3g GB/s",
            writing.step, size / 1e9, seconds, size / 1e9 / seconds,
        )  # fmt: skip
        self._store.prune()
        return seconds


def _report(step: int, failure: str) -> None:
    _logger.error("step %d is not saved: %s", step, failure)


def _outcome(file: Future[FileEntry]) -> FileEntry | str:
    """Wait for a file; return its entry, or why it could not be written."""
    error = file.exception()
    if error is None:
        return file.result()
    if not isinstance(error, CheckpointError):
        _logger.error("a checkpoint's file could not be written", exc_info=error)
    return str(error) or repr(error)
