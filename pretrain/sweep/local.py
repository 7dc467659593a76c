"""Train the runs of a sweep in processes on this machine, and go on where a killed sweep was. slot -> local.

A run's folder holds all that it is; of the sweep itself only the names of those that have finished are kept. A killed
sweep takes its processes along: each is asked to save and stop when its parent is gone.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from pretrain.faults.interrupt import STOPPED
from pretrain.run.eval_figure import EvalFigure
from pretrain.run.history import History
from pretrain.run.lease import Lease
from pretrain.sweep.halving import rungs_of, standings
from pretrain.sweep.slot import Slot
from shards import ConfigError
from shards.storage.atomic import is_there, write_atomically

_FRUITLESS = 3  # stops in a row without a new step, after which a run has failed

State = Literal["waiting", "training", "stopping", "held", "resting", "finished", "out", "failed"]


@dataclass(frozen=True)
class Plan:
    """The work to be done for one run.

    Attributes:
        name: of the run.
        settings: the values that the sweep gives it, by key.
        folder: the run's.
        identity: differs whenever the run's config does.
        steps: its length; None if its data decides.
        words: what comes after `python` to train it, or go on with it.
    """

    name: str
    settings: dict[str, str]
    folder: Path
    identity: str
    steps: int | None
    words: tuple[str, ...]


@dataclass
class Point:
    """A run of the sweep as it stands.

    It may be held by another process, rest at a rung of the halving until others are there, or be out of it.
    """

    plan: Plan
    history: History
    state: State = "waiting"
    note: str = ""  # why it failed or waits
    slot: Slot | None = None  # where it is trained
    step_at_start: int = 0
    fruitless: int = 0


@dataclass(frozen=True)
class Halving:
    """A rule by which runs are stopped early: by which figure, at which steps, out of how many."""

    figure: EvalFigure
    rungs: list[int]
    steps: int

    @staticmethod
    def of(figure: EvalFigure, n_runs: int, steps: int, every: int) -> Halving:
        """Return the halving of runs of the same length, evaluated at the same steps."""
        return Halving(figure, rungs_of(n_runs, steps, every), steps)


class LocalSweep:
    """The sweep's processes.

    Args:
        root: the sweep's own folder, for logs and the list of finished runs.
        plans: of the runs, in order.
        slots: where runs are trained, one in each at a time.
        halving: None to train every run to its end.
    """

    def __init__(
        self,
        root: Path,
        plans: Sequence[Plan],
        slots: Sequence[Slot],
        halving: Halving | None = None,
    ) -> None:
        self._root, self._slots, self._halving = root, slots, halving
        self.points = [Point(plan, History(plan.folder)) for plan in plans]
        self._finished: dict[str, str] = {}
        self._logs.mkdir(parents=True, exist_ok=True)
        if is_there(self._list):
            self._finished = msgspec.json.decode(self._list.read_bytes(), type=dict[str, str])
        for point in self.points:
            point.history.refresh()
            if self._finished.get(point.plan.name) == point.plan.identity:
                point.state = "finished"

    @property
    def _logs(self) -> Path:
        return self._root / "logs"

    @property
    def _list(self) -> Path:
        return self._root / "finished.json"

    def log_of(self, point: Point) -> Path:
        """Return the file with what a run's processes have printed."""
        return self._logs / f"{point.plan.name}.log"

    @property
    def is_done(self) -> bool:
        """Return whether nothing is left to do."""
        return all(point.state in ("finished", "out", "failed") for point in self.points)

    def advance(self) -> list[Point]:
        """Take note of what has ended, stop what is to rest, start what can go on; return the runs that changed.

        Raises: ConfigError if runs are compared by a domain on which they are not evaluated.
        """
        before = [(point.state, point.note) for point in self.points]
        for point in self.points:
            if point.slot is not None or point.state == "held":  # the others' files are as they were
                point.history.refresh()
            if point.slot is not None and (code := point.slot.poll()) is not None:
                self._note_end(point, code)
        self._apply_limits()
        for point in self._startable():
            self._start(point)
        if self.is_done:
            self._close()
        return [point for point, was in zip(self.points, before, strict=True) if (point.state, point.note) != was]

    def stop(self) -> None:
        """Ask all runs to save and stop, and wait for them."""
        running = [(point, point.slot) for point in self.points if point.slot is not None]
        for _, slot in running:
            slot.ask_to_stop()
        for point, slot in running:
            self._note_end(point, slot.wait())
        self._close()

    def _close(self) -> None:
        for slot in self._slots:
            slot.close()

    def _note_end(self, point: Point, code: int) -> None:
        point.slot = None
        point.history.refresh()
        if code == 0:
            point.state, point.note = "finished", ""
            self._finished[point.plan.name] = point.plan.identity
            write_atomically(self._list, msgspec.json.format(msgspec.json.encode(self._finished)))
            return
        point.fruitless = 0 if point.history.last_step > point.step_at_start else point.fruitless + 1
        if code in (STOPPED, -signal.SIGTERM) and point.fruitless < _FRUITLESS:
            point.state = "waiting"
            return
        point.state = "failed"
        point.note = f"exit code {code}, see {self.log_of(point)}"

    def _apply_limits(self) -> None:
        """Let runs rest that have come to a rung, and those go on that have passed it."""
        if self._halving is None:
            return
        costs = [self._costs(point) for point in self.points]
        failed = [i for i, point in enumerate(self.points) if point.state == "failed"]
        found = standings(costs, self._halving.rungs, self._halving.steps, failed)
        for point, cost, (limit, is_out) in zip(self.points, costs, found, strict=True):
            is_there_yet = limit < self._halving.steps and limit in cost
            if point.state == "training" and is_there_yet and point.slot is not None:
                point.slot.ask_to_stop()
                point.state, point.note = "stopping", f"at step {limit}"
            elif point.state in ("waiting", "held", "resting", "out") and is_there_yet:
                point.state = "out" if is_out else "resting"
                point.note = f"stopped at step {limit}" if is_out else f"waits at step {limit} for others"
            elif point.state in ("resting", "out"):
                point.state, point.note = "waiting", ""

    def _costs(self, point: Point) -> dict[int, float]:
        assert self._halving is not None
        figure = self._halving.figure
        domains = point.history.evals.get(point.history.suite() or "", {})
        of_steps = domains.get(figure.domain, {})
        complete = domains.get("micro", {})  # the last line of an evaluation
        if any(rung in complete and rung not in of_steps for rung in self._halving.rungs):
            raise ConfigError(
                f"--halve {figure.domain}/{figure.name}: {point.plan.name} was evaluated on no such domain, but on"
                f" {', '.join(domains)}"
            )
        costs = {step: figure.cost(record) for step, record in of_steps.items()}
        if point.state == "finished":  # perhaps before a rung, by train.stop or the data's end
            last = costs[max(costs)] if costs else math.inf
            return dict.fromkeys(self._halving.rungs, last) | costs
        return costs

    def _startable(self) -> Iterator[Point]:
        """Yield runs to start, as long as there is a free slot."""
        for point in self.points:
            if not any(slot.is_free for slot in self._slots):
                return
            if point.state in ("waiting", "held"):
                if not Lease(point.history.folder.lease, os.environ.get("SLURM_JOB_ID")).is_free():
                    point.state, point.note = "held", "another process is training it"
                    continue
                yield point

    def _start(self, point: Point) -> None:
        point.slot = next(slot for slot in self._slots if slot.is_free)
        point.state, point.note = "training", ""
        point.history.refresh()
        point.step_at_start = point.history.last_step
        point.slot.start(point.plan.words, self.log_of(point))
