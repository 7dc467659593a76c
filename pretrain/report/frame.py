"""What `headrace watch` shows of a run at one moment. {history, figures, braille} -> frame -> the terminal."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from datetime import timedelta

import numpy as np
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from pretrain.report.braille import plot
from pretrain.report.chart import short
from pretrain.report.curves import marks_of
from pretrain.report.figures import duration, number, seconds_left, state_of
from pretrain.run.eval_figure import AVERAGES, UNIT_OF, loss_key
from pretrain.run.history import History

_EVENTS = 5  # lines of what happened last
_DOMAINS = 12  # rows of the evaluation, and of the tasks
_TALL = 44  # lines of a terminal that has room for larger pictures
_WIDEST = 140  # columns; wider pictures tell no more


def frame(history: History, width: int, height: int, now: float | None = None) -> Group:
    """Show a run as it was read last.

    Args:
        width, height: of the terminal, in characters.
        now: seconds since the epoch.
    """
    width = min(width, _WIDEST)
    parts: list[RenderableType] = [_head(history, time.time() if now is None else now)]
    parts += [Text(f"! {problem}", style="yellow") for problem in history.problems()]
    if len(history.metrics):
        rows = 14 if height >= _TALL else 9
        parts += _picture(history, "loss", "loss", width, rows, "cyan")
        half = (width - 2) // 2
        grid = Table.grid(padding=(0, 2, 0, 0))
        below = (
            Group(*_picture(history, "grad_norm", "gradient norm", half, rows // 2, "magenta")),
            Group(*_picture(history, "tokens_per_second", "tokens/s", half, rows // 2, "green", from_zero=True)),
        )
        grid.add_row(*below)
        parts.append(grid)
    parts += [table for table in (_evaluation(history), _tasks(history)) if table]
    parts += _events(history)
    return Group(*parts)


def _head(history: History, now: float) -> Text:
    text = Text(f"{history.name}: {state_of(history)}", style="bold")
    if not len(history.metrics):
        return text
    last = history.metrics.last
    figures = [
        f"loss {number(last.get('loss')):.4f}",
        f"grad norm {number(last.get('grad_norm')):.3f}",
        f"lr {number(last.get('learning_rate')):.2e}",
        f"{short(number(last.get('tokens')))} tokens",
        f"{short(number(last.get('tokens_per_second')))} tokens/s",
    ]
    if math.isfinite(mfu := number(last.get("mfu"))):
        figures.append(f"MFU {mfu:.1%}")
    wait = number(last.get("data_wait_seconds")) / max(number(last.get("step_seconds")), 1e-9)
    figures.append(f"data wait {wait:.0%}")
    left = seconds_left(history)
    if left:
        figures.append(f"ETA {timedelta(seconds=round(left))} without evaluations")
    with contextlib.suppress(OSError):  # removed at this moment
        figures.append(f"last step {duration(max(0.0, now - history.folder.metrics.path.stat().st_mtime))} ago")
    restarts = sum(int(start["step"]) > 0 for start in history.starts)
    if restarts:
        figures.append(f"{restarts} restart{'s' * (restarts > 1)}, {history.superseded} steps trained again")
    return text.append("\n" + "  ".join(figures), style="not bold")


def _picture(
    history: History, key: str, title: str, width: int, height: int, color: str, from_zero: bool = False
) -> Iterator[RenderableType]:
    values = history.metrics[key]
    if not np.isfinite(values).any():
        yield Text(f"{title}: no finite value", style="yellow")
        return
    lines = plot(history.steps.astype(np.float64), values, width, height, from_zero)
    yield Text(title, style="dim")
    yield Text("\n".join(lines), style=color, no_wrap=True)


def _evaluation(history: History) -> Table | None:
    label = history.suite()
    if label is None:
        return None
    domains = history.evals[label]
    last = max(max(of_steps) for of_steps in domains.values())
    scored = {domain: of_steps for domain, of_steps in domains.items() if last in of_steps}
    table = Table(Column("domain"), title=f"Held-out text, step {last:,} ({label})", title_justify="left", box=None)
    key = loss_key(scored.get("micro", {}).values())
    for head in (UNIT_OF[key], "change", "perplexity"):
        table.add_column(head, justify="right")
    # The averages come last, and are never cut off.
    averages = [domain for domain in scored if domain in AVERAGES]
    plain = [domain for domain in scored if domain not in averages]
    for domain in [*plain[:_DOMAINS], *averages]:
        of_steps = scored[domain]
        before = max((step for step in of_steps if step < last), default=None)
        figure = number(of_steps[last].get(key))
        change = "" if before is None else f"{figure - number(of_steps[before].get(key)):+.4f}"
        perplexity = number(of_steps[last].get("perplexity"))
        table.add_row(
            escape(domain), f"{figure:.4f}", change, short(perplexity), style="bold" if domain in averages else None
        )
    if len(plain) > _DOMAINS:
        table.add_row(f"and {len(plain) - _DOMAINS} more domains", "", "", "", style="dim")
    return table


def _tasks(history: History) -> Table | None:
    tasks = history.tasks()
    if not tasks:
        return None
    last = max(max(of_steps) for of_steps in tasks.values())
    table = Table(Column("task"), title=f"Tasks, step {last:,}", title_justify="left", box=None)
    for head in ("accuracy", "change", "bits per byte"):
        table.add_column(head, justify="right")
    for name, of_steps in list(tasks.items())[:_DOMAINS]:
        *before, newest = sorted(of_steps)
        figure = number(of_steps[newest].get("accuracy"))
        change = f"{figure - number(of_steps[before[-1]].get('accuracy')):+.4f}" if before else ""
        table.add_row(escape(name), f"{figure:.4f}", change, f"{number(of_steps[newest].get('bits_per_byte')):.4f}")
    if len(tasks) > _DOMAINS:
        table.add_row(f"and {len(tasks) - _DOMAINS} more tasks", "", "", "", style="dim")
    return table


def _events(history: History) -> Iterator[RenderableType]:
    marks = sorted(marks_of(history), key=lambda mark: mark.x)
    for mark in marks[-_EVENTS:]:
        yield Text(f"• {mark.text}", style="red" if mark.kind == "spike" else "dim")
    if len(marks) > _EVENTS:
        yield Text(f"  and {len(marks) - _EVENTS} before", style="dim")
