"""Find steps whose loss or gradient norm stands out against those before. metrics.jsonl -> spikes -> stepper.

What is decided follows from the figures of the last N steps alone, which metrics.jsonl holds unrounded. A start reads
them back, so that a run that was killed decides as it would have.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pretrain.run.events import Event
from pretrain.run.run_folder import RunFolder
from pretrain.step_stats import Limits, StepStats
from shards import installation

_MAD_TO_DEVIATION = 1.4826  # of a normal distribution
_LEAST_LOSS_SPREAD = 2e-3  # of the median: the loss of a model that has learned its data by heart hardly varies
_LEAST_NORM_SPREAD = 2e-2  # of the logarithm


@dataclass(frozen=True)
class StepFigures:
    """The figures of a step that later ones are judged by.

    Attributes:
        stage: number of the run's stage.
        loss, grad_norm: NaN or infinite where the record has null.
        spike: whether it stood out.
        applied: False if it changed nothing; None if it was passed over, which is no fault.
    """

    stage: int
    loss: float
    grad_norm: float
    spike: bool
    applied: bool | None


def figures_of(records: Iterable[Mapping[str, object]]) -> list[StepFigures]:
    """Return the figures in lines of metrics.jsonl."""
    found = []
    for record in records:
        loss, norm = (math.nan if record[key] is None else float(str(record[key])) for key in ("loss", "grad_norm"))
        unapplied = any(record.get(key) for key in ("nonfinite", "without_targets", "skipped_update"))
        applied = None if record.get("passed_over") else not unapplied
        found.append(StepFigures(int(str(record.get("stage") or 0)), loss, norm, bool(record.get("spike")), applied))
    return found


def last_figures(folder: RunFolder, step: int, count: int) -> list[StepFigures]:
    """Read the figures of the last `count` steps up to one."""
    return figures_of(folder.metrics.read(step - count, step))


def unapplied_in_a_row(figures: Sequence[StepFigures]) -> int:
    """Count the steps at the end that changed nothing, apart from those passed over."""
    count = 0
    for step in reversed(figures):
        if step.applied:
            break
        count += step.applied is not None
    return count


class SpikeWatch:
    """Compares a step with the last ones of its stage.

    Args:
        window: number of steps to compare with; with fewer than half of them there is no limit yet.
        score: a step stands out that is so many deviations above the median.
        figures: of the steps before.
    """

    def __init__(self, window: int, score: float, figures: Sequence[StepFigures]) -> None:
        self._window, self._score = window, score
        self._recent = deque(figures, maxlen=window)

    def limits(self, stage: int) -> Limits:
        """Return the loss and the gradient norm above which the next step stands out.

        Both are median + score * deviation, the deviation estimated by the median of absolute deviations (MAD), which
        a few spikes among the steps do not move. Gradient norms are compared by their logarithms.
        """
        steps = [step for step in self._recent if step.stage == stage]
        losses = [step.loss for step in steps if math.isfinite(step.loss)]
        norms = [math.log(step.grad_norm) for step in steps if math.isfinite(step.grad_norm) and step.grad_norm > 0]
        return Limits(
            loss=self._limit(losses, _LEAST_LOSS_SPREAD * abs(statistics.median(losses or [0.0]))),
            grad_norm=_exp(self._limit(norms, _LEAST_NORM_SPREAD)),
        )

    def median_loss(self) -> float:
        """Return the median of the last steps' losses; NaN if there is none."""
        losses = [step.loss for step in self._recent if math.isfinite(step.loss)]
        return statistics.median(losses) if losses else math.nan

    def note(self, stage: int, stats: StepStats, limits: Limits, passed_over: bool) -> bool:
        """Record a step; return whether it stands out and the step before did not, so that it is worth telling.

        Args:
            limits: as `limits` returned them for it.
        """
        spike = stats.exceeds(limits)
        begins = spike and not (self._recent and self._recent[-1].spike)
        applied = None if passed_over else stats.applied
        self._recent.append(StepFigures(stage, stats.loss, stats.grad_norm, spike, applied))
        return begins

    def _limit(self, values: Sequence[float], least_spread: float) -> float:
        if len(values) < self._window / 2:
            return math.inf
        median = statistics.median(values)
        deviation = _MAD_TO_DEVIATION * statistics.median(abs(value - median) for value in values)
        return median + self._score * max(deviation, least_spread)


def spike_event(step: int, stats: StepStats, limits: Limits, run: RunFolder, action: str) -> Event:
    """Describe a step that stands out.

    Args:
        limits: those that it exceeds.
        action: what is done about it.
    """
    found = [
        f"{name} {value:.4g}, above {limit:.4g}"
        for name, value, limit in (
            ("loss", stats.loss, limits.loss), ("gradient norm", stats.grad_norm, limits.grad_norm),
        )
        if value > limit
    ]  # fmt: skip
    command = installation.typed("provenance", "--run", str(run.root), "--step", str(step), "--by-loss")
    figures = {
        "loss": stats.loss, "loss_limit": limits.loss,
        "grad_norm": stats.grad_norm, "grad_norm_limit": limits.grad_norm,
    }  # fmt: skip
    text = f"step {step} stands out against those before: {' and '.join(found)}; {action}. Its documents, worst first:"
    return Event(step, "spike", f"{text} {command}", figures)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
