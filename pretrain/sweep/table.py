"""A sweep as a table that fills itself, and as lines for a log. local -> table -> the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.table import Column, Table

from pretrain.report.chart import short
from pretrain.report.figures import duration, final_loss, last_eval, seconds_left, usual_speed
from pretrain.sweep.local import Point

_STYLES = {"finished": "green", "training": "bold", "failed": "red", "out": "dim", "waiting": "dim"}


def sweep_table(points: Sequence[Point]) -> Table:
    """Show every run: its settings, how far it is, and its figures."""
    counts = ", ".join(
        f"{count} {state}" for state in dict.fromkeys(p.state for p in points)
        if (count := sum(point.state == state for point in points))
    )  # fmt: skip
    keys = list(dict.fromkeys(key for point in points for key in point.plan.settings))
    table = Table(*(Column(key.rpartition(".")[2], justify="right") for key in keys), title=counts)
    for head, justify in (
        ("state", "left"), ("step", "right"), ("loss", "right"), ("bits per byte", "right"), ("tokens/s", "right"),
        ("left", "right"),
    ):  # fmt: skip
        table.add_column(head, justify="right" if justify == "right" else "left")
    for point in points:
        values = [point.plan.settings.get(key, "") for key in keys]
        table.add_row(*values, _state(point), *_figures(point), style=_STYLES.get(point.state))
    return table


def _state(point: Point) -> str:
    return f"{point.state}: {point.note}" if point.note else point.state


def _figures(point: Point) -> Iterator[str]:
    history = point.history
    steps = "?" if point.plan.steps is None else f"{point.plan.steps:,}"
    yield f"{history.last_step:,}/{steps}"
    loss = final_loss(history)
    yield f"{loss:.4f}" if math.isfinite(loss) else ""
    scored = last_eval(history)
    yield f"{scored[1]:.4f} at {scored[0]:,}" if scored else ""
    speed = usual_speed(history)
    yield short(speed) if math.isfinite(speed) else ""
    left = seconds_left(history) if point.state == "training" else None
    yield duration(left) if left else ""


def line_of(point: Point) -> str:
    """Describe a run in one line of a log."""
    step, loss, scored, *_ = _figures(point)
    figures = [f"step {step}", f"loss {loss}" if loss else "", f"bits per byte {scored}" if scored else ""]
    return f"{point.plan.name}: {_state(point)}, {', '.join(filter(None, figures))}"
