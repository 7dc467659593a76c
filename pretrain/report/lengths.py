"""Charts of what becomes of long texts: losses by context, needles by length and depth. history -> lengths -> page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from pretrain.report.chart import Chart, HeatMap, Series
from pretrain.report.figures import number
from pretrain.run.eval_figure import contexts_of, depths_of
from pretrain.run.history import History

_EVALUATIONS = 6  # lines in the chart of losses by context


def context_charts(history: History) -> Iterator[Chart]:
    """Draw the loss over the tokens of context: a line for each of a few evaluations, from the first to the last."""
    of_steps = _by_step(history)
    steps = list(of_steps)
    chosen = sorted({steps[i] for i in np.linspace(0, len(steps) - 1, _EVALUATIONS).astype(int)}) if steps else []
    series = tuple(
        _line(f"step {step:,}", of_steps[step], place / max(1, len(chosen) - 1)) for place, step in enumerate(chosen)
    )
    if series:
        note = f"{history.suite()}, over all tokens. A point is at the most context of its bucket."
        yield Chart(
            "by_context", "Held-out loss by context", "tokens of context, at most", "nats per token", series,
            note=note, log_x=True, x_ticks=tuple(series[-1].x.tolist()), ramp=len(series) > 1,
        )  # fmt: skip


def context_overlaid(names: Sequence[str], histories: Sequence[History]) -> Iterator[Chart]:
    """Draw the loss over the tokens of context at the last evaluation of each run, if two or more have it."""
    all_steps = zip(names, map(_by_step, histories), strict=True)
    found = [(name, of_steps[max(of_steps)]) for name, of_steps in all_steps if of_steps]
    series = tuple(_line(name, contexts, color) for color, (name, contexts) in enumerate(found))
    if len(series) > 1:
        labels = ", ".join(dict.fromkeys(str(history.suite()) for history in histories if _by_step(history)))
        most = max(series, key=lambda one: len(one.x))
        yield Chart(
            "runs_by_context", "Held-out loss by context", "tokens of context, at most", "nats per token", series,
            note=f"{labels}, over all tokens, at the last evaluation.", log_x=True, x_ticks=tuple(most.x.tolist()),
        )  # fmt: skip


def _by_step(history: History) -> dict[int, dict[str, dict[str, float]]]:
    """Return the figures by context of the suite's average over tokens, by step; where there are several buckets."""
    found = {step: contexts_of(record) for step, record in sorted(history.scored("micro").items())}
    return {step: contexts for step, contexts in found.items() if len(contexts) > 1}


def _line(label: str, contexts: Mapping[str, Mapping[str, float]], color: int | float) -> Series:
    """Make a series of a line's losses by context."""
    most = np.array([float(name.partition("-")[2]) for name in contexts])
    losses = np.array([number(figures.get("nll_per_token")) for figures in contexts.values()])
    return Series(label, most, losses, color=color, style="dots")


def needle_maps(history: History) -> Iterator[HeatMap]:
    """Draw how often needles were found in the last evaluation, by length and depth, and how probable answers were.

    The second tells models apart that find few yet: the probability of a token of the answer, as a geometric mean.
    """
    found: dict[int, dict[str, dict[str, float]]] = {}
    steps = set()
    for of_steps in history.tasks().values():
        record = of_steps[max(of_steps)]
        if by_depth := depths_of(record):
            steps.add(max(of_steps))
            found[int(record["length"])] = by_depth
    lengths = sorted(found)
    depths = sorted({depth for of_length in found.values() for depth in of_length}, key=float, reverse=True)
    where = f"at step {', '.join(f'{n:,}' for n in sorted(steps))}; depth 0 is the beginning of a text."
    for name, title, key, what in (
        ("needles", "Needles found", "accuracy", "Share of the numbers that greedy decoding gives"),
        ("needles_probability", "Probability of the needle", "nll_per_token", "Geometric mean over answers' tokens"),
    ):
        table = np.array([[number(found[n].get(depth, {}).get(key)) for n in lengths] for depth in depths])
        values = table if key == "accuracy" else np.exp(-table)
        columns, note = tuple(f"{n:,}" for n in lengths), f"{what}, {where}"
        if lengths:
            yield HeatMap(name, title, "tokens of a text", "depth of the needle", columns, tuple(depths), values, note)


def needle_maps_of(names: Sequence[str], histories: Sequence[History]) -> Iterator[HeatMap]:
    """Draw the needles that each run found, and how probable they were, two pictures each."""
    for i, (name, history) in enumerate(zip(names, histories, strict=True)):
        for heat in needle_maps(history):
            yield replace(heat, name=f"{heat.name}_{i}", title=f"{heat.title}, {name}")
