"""Decide whether a run ends because it does not learn any more. costs of its evaluations -> patience -> standing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

from pydantic import Field, model_validator

from pretrain.run.eval_figure import EVAL_FIGURE, EvalFigure, best_step
from pretrain.run.events import Event, Kind
from shards import Config


class StopRule(Config):
    """When a run ends before its last step, by its evaluations. It then is finished, and its last step saved."""

    metric: str = Field(pattern=EVAL_FIGURE)  # eval/DOMAIN/FIGURE as in wandb, such as eval/macro/perplexity
    # Evaluations in a row that do not improve on the best by more than min_delta; None: any number
    patience: int | None = Field(None, ge=1)
    min_delta: float = Field(0.0, ge=0)  # in units of the metric
    explode: float | None = Field(None, gt=1)  # the run ends at an evaluation this many times the best; None: never

    @model_validator(mode="after")
    def _stops(self) -> Self:
        if self.patience is None and self.explode is None:
            raise ValueError("stop: needs patience (evaluations), explode (a factor), or both")
        if self.explode is not None and not EvalFigure.parse(self.metric).is_loss:
            raise ValueError(f"stop: explode={self.explode:g} needs a metric that grows, such as perplexity")
        return self


def ending(rule: StopRule, costs: Mapping[int, float]) -> Event | None:
    """Return why a run ends at its last evaluation; None if it goes on.

    Args:
        costs: of the rule's metric at each evaluated step, in the order of the steps.
    """
    if not costs:
        return None
    last = list(costs)[-1]
    before = [step for step in costs if step != last]
    best = best_step(costs, before)
    if best is not None and rule.explode is not None and costs[last] > rule.explode * costs[best]:
        found = f"{rule.metric} is more than {rule.explode:g} times what it was"
        return _event("explosion", "explode", rule, found, costs, best, last)
    waited = _evaluations_without_progress(costs, rule.min_delta)
    if rule.patience is not None and waited >= rule.patience:
        by = f" by more than {rule.min_delta:g}" if rule.min_delta else ""
        found = f"{rule.metric} has not improved{by} in {waited} evaluations"
        return _event("patience", "patience", rule, found, costs, best_step(costs, costs) or 0, last)
    return None


def _evaluations_without_progress(costs: Mapping[int, float], min_delta: float) -> int:
    """Count the evaluations since the one that last improved on the best by more than a difference."""
    best, waited = math.inf, 0
    for cost in costs.values():
        improved = cost < best - min_delta
        best, waited = (cost, 0) if improved else (best, waited + 1)
    return waited


def _event(kind: Kind, key: str, rule: StopRule, found: str, costs: Mapping[int, float], best: int, last: int) -> Event:
    now, then = abs(costs[last]), abs(costs[best])
    text = (
        f"step {last}: {found} ({now:.6g} now, {then:.6g} at step {best}), so the run ends (train.stop). To go on from"
        f" here, start it with another train.stop.{key}, or train.stop=null"
    )
    return Event(last, kind, text, {"metric": rule.metric, "value": now, "best": then, "best_step": best})
