"""Several runs side by side: what differs, curves over each other, figures by swept key. They go to page and png."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from pretrain.report.chart import Chart, Floats, HeatMap, Series, needs_log
from pretrain.report.curves import sentences
from pretrain.report.facts import Cell, Table
from pretrain.report.figures import Ends, ends_of, final_loss, last_eval, number, state_of, unit_of, usual_speed
from pretrain.report.lengths import context_overlaid, needle_maps_of
from pretrain.report.thinning import thin
from pretrain.run.eval_figure import UNIT_OF, loss_key
from pretrain.run.history import History

SEED = "run.seed"  # runs that differ in nothing else repeat one another
_NOT_SETTINGS = ("run.name", "run.dir", "data.index_dir", "wandb.")
_POINTS = 120  # of a curve among others
_TICKS = 8  # values of a key that an axis has room for
_TASKS = 12  # charts
_CURVES = 16  # lines in a chart; more cannot be told apart
_OVER_SEEDS = (
    "Each line is the mean over seeds, as far as all of them have come; the band reaches from the least to the"
    " greatest."
)
_FIGURES = (
    ("loss", "Training loss", "nats per token"),
    ("grad_norm", "Gradient norm", "L2 norm before clipping"),
    ("learning_rate", "Learning rate", "rate"),
    ("tokens_per_second", "Throughput", "tokens per second"),
)


@dataclass(frozen=True)
class Group:
    """Runs that are one curve: their mean, with a band from the least to the greatest."""

    label: str
    runs: tuple[History, ...]


def names_of(histories: Sequence[History]) -> list[str]:
    """Return a name for each run: that of its config, or its folder where two would have the same."""
    names = [history.name for history in histories]
    return [
        name if names.count(name) == 1 else str(history.folder.root)
        for name, history in zip(names, histories, strict=True)
    ]


class Settings(NamedTuple):
    """The differences of configs.

    Attributes:
        differing: the keys whose values differ, and each run's value; None where a run lacks the key.
        unknown: keys that only some configs have, all with the same value: others were written by a version of this
            program that had no such key.
    """

    differing: dict[str, list[object]]
    unknown: dict[str, object]


def settings_of(histories: Sequence[History]) -> Settings:
    """Compare the configs of runs, leaving out names, folders and what is sent to wandb."""
    flat = [dict(_leaves("", history.config)) for history in histories]
    found = Settings({}, {})
    for key in dict.fromkeys(key for one in flat for key in one if not key.startswith(_NOT_SETTINGS)):
        kinds = {json.dumps(one[key], sort_keys=True): one[key] for one in flat if key in one}
        is_everywhere = all(key in one for one in flat)
        if len(kinds) > 1 or (not is_everywhere and _is_free(key)):
            found.differing[key] = [one.get(key) for one in flat]
        elif not is_everywhere:
            found.unknown[key] = next(iter(kinds.values()))
    return found


def _is_free(key: str) -> bool:
    """Return whether configs of one version may have a key or not: items of lists, and DeepSpeed's keys."""
    return any(part.isdecimal() for part in key.split(".")) or key.startswith("deepspeed")


def _leaves(prefix: str, tree: object) -> Iterator[tuple[str, object]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else str(key), value)
    elif isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        for i, item in enumerate(tree):
            yield from _leaves(f"{prefix}.{i}", item)
    else:
        yield prefix, tree


def groups_of(histories: Sequence[History]) -> list[Group]:
    """Put runs that differ in their seed only together, in the order of the first of each."""
    alike = _alike(_swept(settings_of(histories)), len(histories))
    if all(len(members) == 1 for _, members in alike):
        return [Group(name, (history,)) for name, history in zip(names_of(histories), histories, strict=True)]
    return [Group(label or "all runs", tuple(histories[i] for i in members)) for label, members in alike]


def _alike(settings: Mapping[str, Sequence[object]], runs: int) -> list[tuple[str, list[int]]]:
    """Put runs with the same values of some keys together, in the order of the first of each.

    Args:
        settings: each run's value of each key.
        runs: how many there are.
    Returns: the values, and the places of the runs that have them.
    """
    found: dict[str, tuple[str, list[int]]] = {}
    for i in range(runs):
        label = ", ".join(f"{_short_key(key)} {value_text(values[i])}" for key, values in settings.items())
        exact = json.dumps([values[i] for values in settings.values()], sort_keys=True)
        found.setdefault(exact, (label, []))[1].append(i)
    return list(found.values())


def _swept(settings: Settings) -> dict[str, list[object]]:
    """Return the keys in which runs differ, but for their seed, with each run's value."""
    return {key: values for key, values in settings.differing.items() if key != SEED}


def _short_key(key: str) -> str:
    return key.rpartition(".")[2]


def value_text(value: object) -> str:
    """Write a value of a config as in YAML."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def _order(value: object) -> tuple[bool, float, str]:
    """Return by what values of a key are put in order: numbers by size, and behind them all others by their text."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return not is_number, float(value) if is_number else 0.0, value_text(value)  # type: ignore[arg-type]


def run_table(histories: Sequence[History]) -> Table:
    """Show each run with what differs in its config, and its figures."""
    settings, unknown = settings_of(histories)
    rows: list[tuple[Cell, ...]] = []
    for i, (name, history) in enumerate(zip(names_of(histories), histories, strict=True)):
        values = [value_text(of_runs[i]) for of_runs in settings.values()]
        scored = last_eval(history)
        figures = (final_loss(history), scored.loss if scored else None, scored.step if scored else None)
        rows.append((name, *values, state_of(history), *figures, usual_speed(history)))
    head = (
        "run", *settings, "state", "training loss, last 5 %", f"{unit_of(histories)}, macro", "at step",
        "tokens/s, median",
    )  # fmt: skip
    note = "" if settings else "The configs do not differ, but for names and folders."
    if unknown:
        listed = ", ".join(f"{key} ({value_text(value)})" for key, value in unknown.items())
        note += f" Other versions of the program wrote some of the configs, without a value for {listed}."
    return Table("", head, tuple(rows), note=note.strip())


def overlaid(histories: Sequence[History]) -> Iterator[Chart | HeatMap]:
    """Draw the curves of all runs over each other; runs that differ in their seed only as one, with a band.

    Of more runs than can be told apart, loss and held-out text by each swept key: a curve for each of its values, the
    mean over all runs that have it.
    """
    groups, swept = groups_of(histories), _swept(settings_of(histories))
    if len(groups) > _CURVES and len(swept) > 1:
        for key, values in swept.items():
            alike = sorted(_alike({key: values}, len(histories)), key=lambda one: _order(values[one[1][0]]))
            of_values = [Group(label, tuple(histories[i] for i in members)) for label, members in alike]
            note = (
                f"Each line is the mean of the runs with this {key}, whatever their other settings, as far as all of"
                " them have come; the band reaches from the least to the greatest. Other figures are on the pages of"
                " single runs."
            )
            yield from _curves(of_values, _FIGURES[:1], note, key)
    else:
        repeats = any(len(group.runs) > 1 for group in groups)
        bands = _OVER_SEEDS if repeats else ""
        yield from _curves(groups, _FIGURES, bands)
    drawn = names_of(histories)[:_CURVES], histories[:_CURVES]
    cut = f"Only the first {_CURVES} of {len(histories)} runs are drawn." if len(histories) > _CURVES else ""
    charts: list[Chart | HeatMap] = [*context_overlaid(*drawn), *needle_maps_of(*drawn)]
    for chart in charts:
        yield replace(chart, note=sentences([chart.note, cut]))


def _curves(
    groups: Sequence[Group], figures: Sequence[tuple[str, str, str]], bands: str, key: str = ""
) -> Iterator[Chart]:
    """Draw figures of training, and of evaluations, over the steps, a curve for each group.

    Args:
        bands: what a curve and its band are.
        key: that whose values tell the groups apart, if it is one.
    """
    shown = groups[:_CURVES]
    cut = f"Only the first {len(shown)} of {len(groups)} are drawn." if len(shown) < len(groups) else ""
    for figure, title, label in figures:
        series, each = [], 1
        for color, group in enumerate(shown):
            found = _mean_curve(group, figure)
            if found is not None:
                one, points = found
                series.append(Series(group.label, one.x, one.y, one.low, one.high, color))
                each = max(each, points)
        if series:
            note = sentences([bands, f"Each point is the mean of up to {each} steps." if each > 1 else "", cut])
            values = np.concatenate([one.y for one in series])
            is_log = figure in ("loss", "grad_norm") and needs_log(values)
            yield Chart(
                f"runs_{figure}{_suffix(key)}", _titled(title, key), "step", label, tuple(series), note=note,
                log_y=is_log, from_zero=figure in ("learning_rate", "tokens_per_second"),
            )  # fmt: skip
    yield from _overlaid_evals(shown, sentences([bands, cut]), key)


def _suffix(key: str) -> str:
    return f"_by_{key.replace('.', '_')}" if key else ""


def _titled(title: str, key: str) -> str:
    return f"{title} by {key}" if key else title


def _mean_curve(group: Group, key: str) -> tuple[Series, int] | None:
    """Return a figure of a group's runs over the steps that any of them has, and the steps of a point."""
    curves = [
        (history.steps, history.metrics[key]) for history in group.runs if np.isfinite(history.metrics[key]).any()
    ]
    if not curves:
        return None
    steps = np.unique(np.concatenate([of_run for of_run, _ in curves]))
    found = []
    for of_run, values in curves:
        column = np.full(len(steps), np.nan)
        column[np.searchsorted(steps, of_run)] = values
        found.append(thin(steps.astype(np.float64), column, _POINTS))
    table = np.stack([one.y for one in found])
    return _spread("", found[0].x, table), found[0].each


def _spread(label: str, x: Floats, table: Floats) -> Series:
    """Return the mean of the runs of a table [runs, points], with a band from the least to the greatest if several.

    Where a run has no value, as after its end, or none that is finite, there is no mean either: that of the others
    would be that of other runs.
    """
    table = np.where(np.isfinite(table), table, np.nan)
    mean = table.mean(axis=0)
    return Series(label, x, mean) if len(table) == 1 else Series(label, x, mean, table.min(axis=0), table.max(axis=0))


Lines = Mapping[int, Mapping[str, object]]  # of evals.jsonl, by step


def _overlaid_evals(groups: Sequence[Group], note: str, key: str) -> Iterator[Chart]:
    """Draw the macro average of held-out text, and the accuracy of each task."""
    suites = [[history.suite() or "" for history in group.runs] for group in groups]
    macro = [[history.scored("macro") for history in group.runs] for group in groups]
    for figure, unit in UNIT_OF.items():
        scored = [[lines if loss_key(lines.values()) == figure else {} for lines in of_group] for of_group in macro]
        if series := _of_groups(groups, scored, figure):
            labels = sorted({label for of_group in suites for label in of_group if label})
            about = sentences([f"Macro average of {', '.join(labels)}.", note])
            title = _titled("Held-out text", key)
            yield Chart(f"runs_{figure}{_suffix(key)}", title, "step", unit, series, note=about)
    tasks = [[history.tasks() for history in group.runs] for group in groups]
    names = list(dict.fromkeys(name for of_group in tasks for of_run in of_group for name in of_run))
    more = f"The first {_TASKS} of {len(names)} tasks have a chart." if len(names) > _TASKS else ""
    for name in names[:_TASKS]:
        lines = [[of_run.get(name, {}) for of_run in of_group] for of_group in tasks]
        labels = sorted({str(line["suite"]) for of_group in lines for run in of_group for line in run.values()})
        where = "".join(letter if letter.isalnum() else "_" for letter in name)
        yield Chart(
            f"runs_task_{where}{_suffix(key)}", _titled(f"Task {name}", key), "step", "accuracy",
            _of_groups(groups, lines, "accuracy"),
            note=sentences([f"{', '.join(labels)}.", note, more]), from_zero=True,
        )  # fmt: skip


def _of_groups(groups: Sequence[Group], lines: Sequence[Sequence[Lines]], key: str) -> tuple[Series, ...]:
    """Make a series for each group of runs, of a figure of their evaluations; those without any have none.

    Args:
        lines: of each run of each group.
    """
    series = []
    for color, (group, of_group) in enumerate(zip(groups, lines, strict=True)):
        scored = filter(None, of_group)
        of_runs = [{step: number(record.get(key)) for step, record in of_run.items()} for of_run in scored]
        steps = sorted({step for of_run in of_runs for step in of_run})
        if steps:
            table = np.array([[of_run.get(step, math.nan) for step in steps] for of_run in of_runs])
            one = _spread(group.label, np.array(steps, np.float64), table)
            series.append(Series(group.label, one.x, one.y, one.low, one.high, color, "dots"))
    return tuple(series)


def by_key(histories: Sequence[History]) -> Iterator[Chart]:
    """Draw, for each swept key, where the runs ended over its values; a line for each choice of the other keys.

    Where there are too many choices to tell apart, their mean.
    """
    settings = settings_of(histories)
    ends = ends_of(histories)
    for key in _swept(settings):
        yield _panel(key, settings.differing, ends)


def _panel(key: str, settings: Mapping[str, Sequence[object]], ends: Ends) -> Chart:
    values = settings[key]
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    is_number = len(numbers) == len(values)
    kinds = sorted(set(numbers)) if is_number else sorted({value_text(value) for value in values})
    place = [float(value) if is_number else float(kinds.index(value_text(value))) for value in values]  # type: ignore[arg-type]
    others = {other: of_runs for other, of_runs in settings.items() if other not in (key, SEED)}
    choices, band, cut = _alike(others, len(values)), "seed" if SEED in settings else "", ""
    if len(choices) > _CURVES:
        # Other choices at one value than at another would tell of themselves, not of the value
        everywhere = [members for _, members in choices if {place[i] for i in members} == set(place)]
        if everywhere:
            band = f"of the {len(everywhere)} choices of the other keys that each value was tried with"
            choices = [("mean", list(itertools.chain.from_iterable(everywhere)))]
        else:
            cut = f"Only the first {_CURVES} of {len(choices)} choices of the other keys are drawn."
    ended = np.where(np.isfinite(ends.values), ends.values, np.nan)
    series = []
    for color, (label, members) in enumerate(choices[:_CURVES]):
        x = sorted({place[i] for i in members})
        runs = [[ended[i] for i in members if place[i] == at] for at in x]
        y, low, high = (np.array([measure(run) for run in runs]) for measure in (np.mean, np.min, np.max))
        of_band = {"low": low, "high": high} if max(map(len, runs)) > 1 else {}
        series.append(Series(label or ends.figure, np.array(x), y, **of_band, color=color, style="dots"))
    notes = [ends.note, f"The band reaches from the least to the greatest {band}." if band else "", cut]
    is_log = is_number and min(place) > 0 and max(place) / min(place) >= 8
    return Chart(
        f"by_{key.replace('.', '_')}", f"By {key}", key, ends.figure, tuple(series), note=sentences(notes),
        log_x=is_log, log_y=needs_log(ends.values), x_names=() if is_number else tuple(map(str, kinds)),
        x_ticks=tuple(map(float, kinds)) if is_number and len(kinds) <= _TICKS else (),
    )  # fmt: skip
