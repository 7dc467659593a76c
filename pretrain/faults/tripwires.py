"""Say at once what no training should do: gradients of nothing, a first loss that cannot be, a speed that falls.

recorder -> tripwires -> trainer. Doubts about an evaluation are in `pretrain.evaluation.plausibility`.
"""

from __future__ import annotations

import statistics
from collections import deque

from pretrain.evaluation.plausibility import doubt_of_first_loss
from pretrain.model.architecture import ModelConfig
from pretrain.run.events import Event
from pretrain.run.metrics import StepRecord

_STEPS = 20  # whose median speed is compared
_SLOWER = 2 / 3  # of the best speed so far, below which it has fallen
_RECOVERED = 0.8  # of the same, above which it has not


class Tripwires:
    """Looks at each step's record, on rank 0.

    Args:
        drawn: whether the weights are drawn at the first step, not taken from another model.
    """

    def __init__(self, model: ModelConfig, drawn: bool) -> None:
        self._model, self._drawn = model, drawn
        self._without_gradient = False
        self._speeds: deque[float] = deque(maxlen=_STEPS)
        self._stage: int | None = None
        self._best = 0.0  # median speed of _STEPS steps of this stage, since this start
        self._slow = False

    def note(self, record: StepRecord) -> list[Event]:
        """Return what is worth telling of a step."""
        found = [self._first_loss(record), self._gradient(record), self._speed(record)]
        return [event for event in found if event]

    def _first_loss(self, record: StepRecord) -> Event | None:
        if record.step > 1 or not self._drawn or record.passed_over or record.without_targets:
            return None
        doubt = doubt_of_first_loss(record.loss, self._model, "step 1, training")
        return Event(1, "doubt", doubt, {"loss": record.loss}) if doubt else None

    def _gradient(self, record: StepRecord) -> Event | None:
        before, self._without_gradient = self._without_gradient, record.grad_norm == 0.0
        if not self._without_gradient or before:
            return None
        text = (
            f"step {record.step}: the gradient is exactly 0, so nothing is learned: the loss does not depend on the"
            " weights, or all activations are dead"
        )
        return Event(record.step, "no_gradient", text, {"loss": record.loss})

    def _speed(self, record: StepRecord) -> Event | None:
        if record.stage != self._stage:
            self._stage, self._best, self._slow = record.stage, 0.0, False
            self._speeds.clear()
        if record.passed_over:
            return None  # nothing was computed
        self._speeds.append(record.tokens_per_second)
        if len(self._speeds) < _STEPS:
            return None
        speed = statistics.median(self._speeds)
        self._best = max(self._best, speed)
        before, self._slow = self._slow, speed < (_RECOVERED if self._slow else _SLOWER) * self._best
        if not self._slow or before:
            return None
        text = (
            f"step {record.step}: the speed has fallen by {1 - speed / self._best:.0%}, from {self._best:,.0f} to"
            f" {speed:,.0f} tokens/s (medians of {_STEPS} steps); metrics.jsonl says which part of a step takes longer"
        )
        return Event(record.step, "slowdown", text, {"tokens_per_second": speed, "best": self._best})
