"""Figures that sum up a run. history -> figures -> {facts, side_by_side, frame}. None of this needs torch."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pretrain.run.eval_figure import UNIT_OF, loss_key
from pretrain.run.history import Floats, History

_FRESH_SECONDS = 120.0  # a lease without a heartbeat for so long is not held any more
_LAST = 20  # the last 1/20 of a run's steps, over which its final loss is averaged
_RECENT = 200  # steps from which the rest of the run is estimated


def number(value: object) -> float:
    """Return a number of a record; NaN for null or what is none."""
    return float(value) if isinstance(value, int | float) else math.nan


def state_of(history: History) -> str:
    """Say how far a run is: finished, training, or stopped."""
    step = history.last_step
    if history.is_finished:
        return f"finished after {step:,} steps"
    foreseen = history.foreseen_length
    of = f" of {foreseen:,}" if foreseen is not None else ""
    try:
        is_held = time.time() - history.folder.lease.stat().st_mtime < _FRESH_SECONDS
    except OSError:
        is_held = False
    return f"training, step {step:,}{of}" if is_held else f"stopped at step {step:,}{of}"


def final_loss(history: History) -> float:
    """Return the mean training loss of the last 5 % of the steps; NaN if there is none."""
    losses = history.metrics["loss"]
    last = losses[len(losses) - max(1, len(losses) // _LAST) :]
    finite = last[np.isfinite(last)]
    return float(finite.mean()) if len(finite) else math.nan


def usual_speed(history: History) -> float:
    """Return the median of the steps' tokens per second; NaN without a step."""
    speeds = history.metrics["tokens_per_second"]
    finite = speeds[np.isfinite(speeds)]
    return float(np.median(finite)) if len(finite) else math.nan


class LastEval(NamedTuple):
    """The last macro average over the domains of held-out text."""

    step: int
    loss: float
    unit: str  # of the loss


def last_eval(history: History, up_to: int | None = None) -> LastEval | None:
    """Return the last evaluation, up to a step; None without one."""
    of_steps = history.scored("macro")
    steps = [step for step in of_steps if up_to is None or step <= up_to]
    if not steps:
        return None
    last, key = max(steps), loss_key(of_steps.values())
    return LastEval(last, number(of_steps[last].get(key)), UNIT_OF[key])


class Ends(NamedTuple):
    """The ends of runs, by one figure.

    Attributes:
        values: the figure of each run.
        figure: what it is.
        note: of which steps it is, where that does not go without saying.
    """

    values: Floats
    figure: str
    note: str = ""


def ends_of(histories: Sequence[History]) -> Ends:
    """Return the last evaluation of each run or, where some have none in the same unit, the training loss.

    Where some runs have not come to their end, as after halving, all are judged at the last step at which all of them
    were scored: the loss of a short training says little beside that of a long one. If there is none, those have NaN.
    """
    unit, last = unit_of(histories), [history.last_step for history in histories]
    is_unfinished = [not history.is_finished for history in histories]
    span = f"{sum(is_unfinished)} of the {len(last)} runs did not finish" if any(is_unfinished) else ""
    found = [last_eval(history) for history in histories]
    if any(one is None or one.unit != unit for one in found):
        between = f"{span}: they ended at steps {min(last):,} to {max(last):,}." if min(last) < max(last) else ""
        return Ends(np.array([final_loss(history) for history in histories]), "training loss, last 5 %", between)
    values = np.array([one.loss for one in found if one])
    labels = sorted({history.suite() or "" for history in histories})
    others = f"Scored under different labels: {', '.join(labels)}." if len(labels) > 1 else ""
    if any(is_unfinished):
        scored = (set(history.scored("macro")) for history in histories)
        if common := set.intersection(*scored) - {0}:  # what was not trained says nothing of a setting
            values = np.array([one.loss for h in histories if (one := last_eval(h, up_to=max(common)))])
            span += f", so all are shown at step {max(common):,}, the last at which each was scored."
        else:
            values[is_unfinished] = math.nan
            span += " and are not shown, since there is no step at which all were scored."
    return Ends(values, f"{unit}, macro", " ".join(filter(None, (span, others))))


def unit_of(histories: Sequence[History]) -> str:
    """Return the unit of the last evaluations' losses, or the several that there are."""
    units = dict.fromkeys(scored.unit for history in histories if (scored := last_eval(history)))
    return " or ".join(units) or UNIT_OF["bits_per_byte"]


def duration(seconds: float) -> str:
    """Write seconds as people say them."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 60:
        return f"{minutes:.1f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def seconds_left(history: History) -> float | None:
    """Estimate the seconds that the remaining steps take, at the pace of the last ones and with their saves."""
    length = history.foreseen_length
    seconds = history.metrics["step_seconds"][-_RECENT:]
    if length is None or not np.isfinite(seconds).any():
        return None
    saves = np.nan_to_num(history.metrics["checkpoint_seconds"][-_RECENT:])
    return float(np.nanmean(seconds + saves)) * max(0, length - history.last_step)
