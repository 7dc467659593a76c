"""Saves a run's checkpoints, on all ranks together, while training goes on. trainer -> save -> {staging, write, store}.

    training   ... step 100 | copy | step 101  step 102  step 103 ...
    background                      write, fsync, hash | COMPLETE, older ones go

Training waits for the copy alone (and for the save before, if that is still under way). Each rank writes its own files.
Whether all have done so is told by the collective that every step makes anyway; then they tell each other the hashes,
and rank 0 writes COMPLETE. What happens in which order decides whether a kill can hurt: the files, then their fsync,
the journals' fsync, COMPLETE, and the removal of older checkpoints. Nothing is changed in place.

A save that fails is logged as an error and leaves nothing behind; training goes on, and the next save tries again. Too
many in a row end the run: what it would go on to train could not be kept.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import msgspec

from pretrain.checkpoint.staging import Staging
from pretrain.checkpoint.state import DataState, RunState
from pretrain.checkpoint.store import CheckpointStore, FileEntry
from pretrain.checkpoint.write import Writer
from pretrain.topology import Topology
from shards import CheckpointError, ConfigError, HeadraceError

_logger = logging.getLogger(__name__)

_NOTEWORTHY_SECONDS = 1.0  # of waiting for the save before
_FAILURES_SHOWN = 4  # of the files of all ranks; a full disk fails thousands


@dataclass
class _Pending:
    """A save whose files are being written."""

    step: int
    begun: float  # time.monotonic()
    files: list[Future[FileEntry]] = field(default_factory=list)  # this rank's


class Saver:
    """Saves one checkpoint at a time. Every rank has one, and calls the same methods in the same order.

    Args:
        store: where the checkpoints lie.
        write_state: hands over what each file of this rank is to hold, as `Engine.save` does.
        estimate: bytes of a checkpoint, for as long as there is none to go by.
        sync_journals: makes durable what the run has written down so far; called on rank 0, in the background.
        check_lease: raises HeadraceError if another process has taken the run over; likewise.
    Attributes:
        seconds: that the newest save took from its beginning to COMPLETE; rank 0 knows it. None before the first.
        failed: saves in a row that have failed, or were refused, up to now.
    """

    def __init__(
        self,
        store: CheckpointStore,
        write_state: Callable[[Path, Callable[[Path, object], None]], None],
        topology: Topology,
        estimate: int,
        sync_journals: Callable[[], None],
        check_lease: Callable[[], None],
    ) -> None:
        self.seconds: float | None = None
        self.failed = 0
        self._store = store
        self._write_state = write_state
        self._topology = topology
        self._estimate = estimate
        self._sync_journals = sync_journals
        self._check_lease = check_lease
        self._writer = Writer()
        self._staging = Staging(topology.device.type == "cuda") if store.config.asynchronous else None
        self._pending: _Pending | None = None
        self._settled: Future[None] | None = None  # what rank 0 does once all files are written; None on other ranks
        self._failure: str | None = None  # of the newest save; on all ranks

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leaves behind a save that is under way: the other ranks may be gone."""
        self._writer.__exit__(kind, error, trace)

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._pending is not None and not all(file.done() for file in self._pending.files)

    def save(self, state: RunState, data: DataState | None) -> float:
        """Begins to save the checkpoint of `state.step`; what training does next does not change it.

        Args:
            data: rank 0 alone needs it.
        Returns:
            Seconds that training stood still.
        Raises:
            CheckpointError: on all ranks, if `checkpoint.max_failed_saves` in a row have failed. So do the other
                methods in which a save comes to its end.
        """
        begun = time.monotonic()
        self._wait(state.step)
        verdict = self._prepare(state.step) if self._topology.is_main else (False, None)
        prepared, self._failure = self._topology.broadcast_object(verdict)
        if prepared:
            self._write(state, data, begun)
        elif self._failure:
            self._count_failure()
        return time.monotonic() - begun

    def settle(self, busy: bool) -> None:
        """Completes the save under way once no rank is busy with it; every rank calls it with the same answer.

        Args:
            busy: whether any rank is, as found by the step's collective.
        """
        if self._pending and not busy:
            self._conclude(self._pending)

    def pulse(self) -> None:
        """As `settle`, with a collective of its own: for all ranks together, where training makes none for long."""
        if self._pending:
            self.settle(self._topology.sum_int64([int(self.busy)])[0] > 0)

    def finish(self) -> None:
        """Waits until the newest save is complete.

        Raises:
            CheckpointError: on all ranks, if it failed or was refused.
        """
        self._wait()
        if self._failure:
            raise CheckpointError(f"the newest state of the run is not saved: {self._failure}")

    def _wait(self, next_step: int | None = None) -> None:
        """Until nothing is under way: a save never overtakes the one before it."""
        begun = time.monotonic()
        if self._pending:
            self._conclude(self._pending)  # whose first look at the files waits for them
        settled, self._settled = self._settled, None
        if self._topology.broadcast_object(settled is not None):
            error = settled.exception() if settled else None
            incomplete = self._topology.broadcast_object(str(error) if error else None)
            if incomplete:  # all files were written, but COMPLETE was not
                self._failure = incomplete
                self._count_failure()
            elif not self._failure:
                self.failed = 0
        waited = time.monotonic() - begun
        if next_step is not None and waited > _NOTEWORTHY_SECONDS and self._topology.is_main:
            _logger.warning(
                "the save of step %d waited %.1f s for the one before it; set checkpoint.every higher",
                next_step, waited,
            )  # fmt: skip

    def _prepare(self, step: int) -> tuple[bool, str | None]:
        """Makes room and a folder: whether there is anything to be written now, and what went wrong, if anything."""
        try:
            if self._store.is_complete(step):  # a run that stopped right after it was resumed has this one already
                return False, None
            self._store.make_room(self._estimate)
            self._store.prepare(step)
        except (ConfigError, OSError) as error:
            _report(step, str(error))
            return False, str(error)
        return True, None

    def _write(self, state: RunState, data: DataState | None, begun: float) -> None:
        folder = self._store.folder_of(state.step)
        self._pending = pending = _Pending(state.step, begun)
        if self._topology.is_main:
            assert data is not None
            for name, content in (("state.json", state), ("data.json", data)):
                pending.files.append(self._writer.write(folder, name, msgspec.json.encode(content) + b"\n"))

        def take(path: Path, content: object) -> None:
            name = path.relative_to(folder).as_posix()
            try:
                copied = self._staging.copy(path.name, content) if self._staging else content
            except (MemoryError, RuntimeError) as error:
                failed: Future[FileEntry] = Future()
                failed.set_exception(CheckpointError(f"no host memory for the copy of {name}: {error}"))
                pending.files.append(failed)
                return
            pending.files.append(self._writer.write(folder, name, copied))
            if not self._staging:
                wait(pending.files)  # the content is the model's own

        self._write_state(folder, take)
        if not self._staging:
            self._wait()

    def _conclude(self, pending: _Pending) -> None:
        """All ranks are done with their files: rank 0 completes the checkpoint, or removes what there is of it."""
        self._pending = None
        outcomes = self._topology.gather_objects([_outcome(file) for file in pending.files])
        entries = [found for part in outcomes for found in part if isinstance(found, FileEntry)]
        failures = [
            f"rank {rank}: {found}" for rank, part in enumerate(outcomes) for found in part if isinstance(found, str)
        ]
        more = f"; and {len(failures) - _FAILURES_SHOWN} more" if len(failures) > _FAILURES_SHOWN else ""
        self._failure = "; ".join(failures[:_FAILURES_SHOWN]) + more if failures else None
        if self._topology.is_main and self._failure:
            _report(pending.step, self._failure)
            self._settled = self._writer.submit(self._store.try_to_discard, pending.step)
        elif self._topology.is_main:
            self._settled = self._writer.submit(self._complete, pending, entries)
        if self._failure:
            self._count_failure()

    def _count_failure(self) -> None:
        """Take note that another save failed; every rank does."""
        self.failed += 1
        if self.failed >= self._store.config.max_failed_saves:
            raise CheckpointError(
                f"{self.failed} saves in a row have failed (checkpoint.max_failed_saves), the last one with:"
                f" {self._failure}. The run ends, since it could not keep what it trains from here on; make room or"
                " repair the disk, then start it again: it goes on from its last checkpoint"
            )

    def _complete(self, pending: _Pending, entries: list[FileEntry]) -> None:
        try:
            self._sync_journals()
            self._check_lease()
            seconds = time.monotonic() - pending.begun
            self._store.complete(pending.step, entries, seconds)
        except (OSError, HeadraceError) as error:
            _report(pending.step, str(error))
            if isinstance(error, OSError):  # else the folder may be another process's by now
                self._store.try_to_discard(pending.step)
            raise
        self.seconds, self.failed = seconds, 0  # the other ranks hear of it when the next save begins
        size = sum(entry.size for entry in entries)
        _logger.info(
            "the checkpoint of step %d is complete: %.3g GB in %.2f s, %.3g GB/s",
            pending.step, size / 1e9, seconds, size / 1e9 / seconds,
        )  # fmt: skip
        self._store.prune()


def _report(step: int, failure: str) -> None:
    _logger.error("step %d is not saved: %s", step, failure)


def _outcome(file: Future[FileEntry]) -> FileEntry | str:
    error = file.exception()
    if error is None:
        return file.result()
    if not isinstance(error, CheckpointError):
        _logger.error("a checkpoint's file could not be written", exc_info=error)
    return str(error) or repr(error)
