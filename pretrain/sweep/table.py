"""A sweep as a table that fills itself, and as lines for a log. local -> table -> the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.markup import escape
from rich.table import Table

from pretrain.report.chart import short
from pretrain.report.figures import duration, final_loss, last_eval, seconds_left, unit_of, usual_speed
from pretrain.sweep.local import Point

_STYLES = {"finished": "green", "training": "bold", "failed": "red", "out": "dim", "waiting": "dim"}


def sweep_table(points: Sequence[Point]) -> Table:
    """Show every run: its settings, how far it is, and its figures."""
    counts = ", ".join(
        f"{count} {state}" for state in dict.fromkeys(p.state for p in points)
        if (count := sum(point.state == state for point in points))
    )  # fmt: skip
    keys = list(dict.fromkeys(key for point in points for key in point.plan.settings))
    table = Table(title=counts)
    for key in keys:
        table.add_column(key.rpartition(".")[2], justify="right", overflow="fold")
    table.add_column("state", min_width=8)
    unit = unit_of([point.history for point in points])
    for head in ("step", "loss", unit.replace(" per ", "/"), "at", "tokens/s", "left"):
        table.add_column(head, justify="right", no_wrap=True)
    for point in points:
        values = [escape(_plain(str(point.plan.settings.get(key, "")))) for key in keys]
        note = "" if point.state == "failed" else point.note  # which names a file, for which a table has no room
        table.add_row(
            *values, escape(f"{point.state} {note}".strip()), *_figures(point), style=_STYLES.get(point.state)
        )
    return table


def _plain(value: str) -> str:
    """Return a value without the quotes and braces that JSON has; a table has no room for them."""
    return value.replace('"', "").strip("{}")


def _figures(point: Point) -> Iterator[str]:
    history = point.history
    steps = point.plan.steps or history.foreseen_length
    yield f"{history.last_step:,}/{f'{steps:,}' if steps else '?'}"
    loss = final_loss(history)
    yield f"{loss:.4f}" if math.isfinite(loss) else ""
    scored = last_eval(history)
    yield f"{scored.loss:.4f}" if scored else ""
    yield f"{scored.step:,}" if scored else ""
    speed = usual_speed(history)
    yield short(speed) if math.isfinite(speed) else ""
    left = seconds_left(history) if point.state == "training" else None
    yield duration(left) if left else ""


def line_of(point: Point) -> str:
    """Describe a run in one line of a log."""
    step, loss, scored, at, *_ = _figures(point)
    last = last_eval(point.history)
    figures = [f"step {step}", f"loss {loss}" if loss else "", f"{last.unit} {scored} at {at}" if last else ""]
    state = f"{point.state}: {point.note}" if point.note else point.state
    return f"{point.plan.name}: {state}, {', '.join(filter(None, figures))}"
