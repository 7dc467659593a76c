"""The charts of one run. history -> curves -> {page, png}."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from pretrain.report.chart import Chart, Floats, HeatMap, Mark, Series, needs_log
from pretrain.report.figures import number
from pretrain.report.lengths import context_charts, needle_maps
from pretrain.report.thinning import thin
from pretrain.run.eval_figure import AVERAGES, loss_key
from pretrain.run.history import History

POINTS = 300  # of a curve; longer ones are thinned
_MARKS = 40  # vertical lines in a chart, beyond which they would be a wall
_SPIKES = ("spike", "explosion", "nonfinite")  # events that are about a loss which stands out
_LINES = 12  # domains or sources in one chart
_AVERAGE = 7  # color of the macro average: grey, the last of the palette
PARTS = (
    ("forward_backward_seconds", "forward and backward"),
    ("optimizer_seconds", "optimizer"),
    ("data_wait_seconds", "waiting for data"),
)
OTHER = "everything else"


def charts_of(history: History) -> dict[str, list[Chart | HeatMap]]:
    """Make all charts of a run, by the section of the page that they belong to."""
    return {
        "training": list(training_charts(history)),
        "evaluation": [
            *evaluation_charts(history),
            *context_charts(history),
            *task_charts(history),
            *needle_maps(history),
        ],
        "speed": list(speed_charts(history)),
        "layers": list(layer_charts(history)),
        "data": list(data_charts(history)),
    }


def marks_of(history: History) -> list[Mark]:
    """List what happened to a run: starts after the first, steps that changed nothing, and its events."""
    found = []
    for start in history.starts:
        if int(start["step"]) > 0:
            text = f"resumed after step {start['step']}, {start.get('time', 'time unknown')}"
            found.append(Mark(float(start["step"]), "restart", text))
    told = {(int(event["step"]), str(event.get("kind"))) for event in history.events}
    steps = history.steps
    for key, kind, what in (
        ("nonfinite", "nonfinite", "loss or gradient not finite: the update was left out"),
        ("passed_over", "", "passed over on purpose (data.skip_steps)"),
        ("without_targets", "no_targets", "nothing to predict in the batch"),
    ):
        for step in steps[history.metrics[key] == 1]:
            if (int(step), kind) not in told:  # or it would be listed twice
                found.append(Mark(float(step), _kind_of(kind), f"step {step}: {what}"))
    for event in history.events:
        kind = str(event.get("kind", "event"))
        found.append(
            Mark(float(event["step"]), _kind_of(kind), f"step {event['step']}, {kind}: {event.get('text', '')}")
        )
    return found


def _kind_of(event: str) -> Literal["spike", "event"]:
    return "spike" if event in _SPIKES else "event"


def _shown(marks: Sequence[Mark]) -> tuple[tuple[Mark, ...], str]:
    """Return the marks to draw, restarts and spikes first, and a sentence about those left out."""
    order = sorted(marks, key=lambda mark: ("restart", "spike", "event").index(mark.kind))
    left_out = len(marks) - _MARKS
    note = (
        f"The last {left_out} of {len(marks)} marks are not drawn; the list below has them all." if left_out > 0 else ""
    )
    return tuple(order[:_MARKS]), note


def thinned(label: str, x: Floats, y: Floats) -> tuple[Series, str]:
    """Make a series of a curve, with a band if it has to be thinned, and the sentence that says so."""
    found = thin(x, y, POINTS)
    if found.each == 1:
        return Series(label, found.x, found.y), ""
    note = f"Each point is the mean of {found.each} steps; the band reaches from the least to the greatest."
    return Series(label, found.x, found.y, found.low, found.high), note


def sentences(notes: Iterable[str]) -> str:
    """Join sentences, each once."""
    return " ".join(dict.fromkeys(note for note in notes if note))


def training_charts(history: History) -> Iterator[Chart]:
    """Draw the loss, the learning rate, the gradient norm and the gradient noise scale."""
    if not len(history.metrics):
        return
    x = history.steps.astype(np.float64)
    marks, cut = _shown(marks_of(history))
    for key, title, label in (
        ("loss", "Training loss", "nats per token"),
        ("learning_rate", "Learning rate", "rate"),
        ("grad_norm", "Gradient norm", "L2 norm before clipping"),
        ("noise_scale", "Gradient noise scale", "targets"),
    ):
        values = history.metrics[key]
        if not np.isfinite(values).any():
            continue
        series, note = thinned(title.lower(), x, values)
        missing = int((~np.isfinite(values)).sum())
        gaps = f"{missing} steps have no finite value." if missing else ""
        is_log = key != "learning_rate" and needs_log(values)
        notes = sentences([note, gaps, cut])
        yield Chart(key, title, "step", label, (series,), marks, notes, log_y=is_log, from_zero=key == "learning_rate")


def evaluation_charts(history: History) -> Iterator[Chart]:
    """Draw the held-out figures over the steps: bits per byte and perplexity of each domain."""
    label = history.suite()
    if label is None:
        return
    domains = history.evals[label]
    shown, note = _chosen(domains)
    for key, title, y_label in (
        ("bits_per_byte", "Held-out text by domain", "bits per byte"),
        ("perplexity", "Perplexity by domain", "perplexity"),
    ):
        series = []
        for place, domain in enumerate(shown):
            color = _AVERAGE if domain in AVERAGES else place + place // _AVERAGE  # passes over that color
            series.append(dots(domain, domains[domain], key, color))
        values = np.concatenate([one.y for one in series])
        if np.isfinite(values).any():
            is_log = key == "perplexity" or needs_log(values)
            yield Chart(key, title, "step", y_label, tuple(series), note=f"{label}. {note}".strip(), log_y=is_log)


def dots(label: str, of_steps: Mapping[int, Mapping[str, Any]], key: str, color: int) -> Series:
    """Make a series of a figure of evaluations, given their lines of evals.jsonl by step."""
    steps = sorted(of_steps)
    values = np.array([number(of_steps[step].get(key)) for step in steps])
    return Series(label, np.array(steps, np.float64), values, color=color, style="dots")


def task_charts(history: History) -> Iterator[Chart]:
    """Draw the accuracy and the bits per byte of each task over the steps."""
    tasks = history.tasks()
    shown = list(tasks)[:_LINES]
    note = f"The first {_LINES} of {len(tasks)} tasks; the table has all." if len(tasks) > _LINES else ""
    for key, title, y_label in (
        ("accuracy", "Tasks: accuracy", "share of the questions"),
        ("bits_per_byte", "Tasks: the right answer", "bits per byte"),
    ):
        series = tuple(dots(name, tasks[name], key, color) for color, name in enumerate(shown))
        if series:
            yield Chart(f"tasks_{key}", title, "step", y_label, series, note=note, from_zero=key == "accuracy")


def _chosen(domains: dict[str, dict[int, dict[str, Any]]]) -> tuple[list[str], str]:
    """Choose the domains to draw, the macro average last, and say which are left out."""
    averages = [name for name in domains if name == "macro"]
    averages += [name for name in domains if name == "ema:macro"]  # of the moving average of the weights
    plain = [name for name in domains if name not in AVERAGES and not name.startswith(("source:", "ema:"))]
    if len(plain) <= _LINES:
        return [*plain, *averages], ""

    key = loss_key(domains.get("micro", {}).values())

    def last(name: str) -> float:
        return number(domains[name][max(domains[name])].get(key))

    ordered = sorted(plain, key=last)
    half = _LINES // 2
    shown = [*ordered[:half], *ordered[-half:]]
    note = f"Of {len(plain)} domains, the {half} that it predicts best and worst; the table has all."
    return [*shown, *averages], note


def speed_charts(history: History) -> Iterator[Chart]:
    """Draw the tokens per second, where each step's seconds went, and the memory."""
    if not len(history.metrics):
        return
    x = history.steps.astype(np.float64)
    metrics = history.metrics
    for key, title, label, scale in (
        ("tokens_per_second", "Throughput", "tokens per second", 1.0),
        ("mfu", "Model FLOP utilization", "% of the devices' peak", 100.0),
        ("peak_memory_bytes", "Peak memory of rank 0", "GB", 1e-9),
    ):
        values = metrics[key] * scale
        if np.isfinite(values).any():
            series, note = thinned(title.lower(), x, values)
            yield Chart(key, title, "step", label, (series,), note=note, from_zero=True)
    if np.isfinite(metrics["step_seconds"]).any():
        yield _step_parts(history, x)


def parts_of(history: History) -> dict[str, Floats]:
    """Return the seconds of each part of each step, [records]; together they are the step's."""
    parts = {name: np.nan_to_num(history.metrics[key]) for key, name in PARTS}
    rest = np.nan_to_num(history.metrics["step_seconds"]) - sum(parts.values())
    return parts | {OTHER: np.maximum(rest, 0)}


def _step_parts(history: History, x: Floats) -> Chart:
    series, below, each = [], None, 1
    for color, (name, seconds) in enumerate(parts_of(history).items()):
        found = thin(x, seconds, POINTS // 2)
        below = np.zeros_like(found.y) if below is None else below
        series.append(Series(name, found.x, found.y, below, below + found.y, color, "area"))
        below, each = below + found.y, found.each
    note = f"Each point is the mean of {each} steps." if each > 1 else ""
    # A first step that compiles or reads takes many times as long, and would flatten all others.
    total = history.metrics["step_seconds"]
    log_note = ""
    if needs_log(total):
        log_note = "Steps that took far longer than most stand out; the table has the sums."
    return Chart(
        "step_parts", "Where a step's time goes", "step", "seconds per step", tuple(series),
        note=sentences([note, log_note]), from_zero=True,
    )  # fmt: skip


def layer_charts(history: History) -> Iterator[Chart]:
    """Draw each figure of layers.jsonl: one curve a layer, colored from the first to the last."""
    for figure, of_steps in sorted(history.layers.items()):
        steps = sorted(of_steps)
        depth = max((len(of_steps[step]) for step in steps), default=0)
        if not depth:
            continue
        table = np.full((len(steps), depth), np.nan)
        for row, step in enumerate(steps):
            table[row, : len(of_steps[step])] = of_steps[step]
        x = np.array(steps, np.float64)
        series, note = [], ""
        for layer in range(depth):
            found = thin(x, table[:, layer], POINTS // 2)
            series.append(Series(f"layer {layer}", found.x, found.y, color=layer / max(depth - 1, 1), style="line"))
            note = f"Each point is the mean of {found.each} measured steps." if found.each > 1 else ""
        title = figure.replace("_", " ")
        name = "layers_" + "".join(letter if letter.isalnum() else "_" for letter in figure)
        log_y = needs_log(table.ravel())
        yield Chart(name, title, "step", title, tuple(series), note=note, log_y=log_y, ramp=depth > 1)


def data_charts(history: History) -> Iterator[Chart]:
    """Draw each source's share of the tokens over the steps."""
    names = history.metrics.names_of("tokens_per_source")
    if len(names) < 2:
        return
    x = history.steps.astype(np.float64)
    columns = {name: np.nan_to_num(history.metrics[f"tokens_per_source/{name}"]) for name in names}
    total = sum(columns.values())
    largest = sorted(names, key=lambda name: -columns[name].sum())[:_LINES]
    series, each = [], 1
    for color, name in enumerate(largest):
        some, all_of_it = thin(x, columns[name], POINTS // 3), thin(x, np.asarray(total, np.float64), POINTS // 3)
        with np.errstate(invalid="ignore", divide="ignore"):
            series.append(Series(name, some.x, 100 * some.y / all_of_it.y, color=color))
        each = some.each
    notes = [
        f"Each point is the share in {each} steps." if each > 1 else "",
        f"The {_LINES} largest of {len(names)} sources." if len(names) > _LINES else "",
    ]
    yield Chart(
        "sources", "Sources of the tokens", "step", "% of the tokens", tuple(series),
        note=sentences(notes), from_zero=True,
    )  # fmt: skip
