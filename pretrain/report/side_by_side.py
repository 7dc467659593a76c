"""Several runs side by side: what differs, curves over each other, figures by swept key, intervals of differences.

histories -> side_by_side -> {page, png}. The statistics are those of `headrace evaluate --compare`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pretrain.evaluation import compare
from pretrain.evaluation.compare import Difference
from pretrain.evaluation.scores import DocumentScores
from pretrain.report.chart import Chart, Floats, HeatMap, Series, needs_log
from pretrain.report.curves import sentences
from pretrain.report.facts import Cell, Table
from pretrain.report.figures import Ends, ends_of, final_loss, last_eval, number, state_of, unit_of, usual_speed
from pretrain.report.lengths import context_overlaid, needle_maps_of
from pretrain.report.thinning import thin
from pretrain.run.eval_figure import UNIT_OF, loss_key
from pretrain.run.history import History
from shards import ConfigError, HeadraceError

SEED = "run.seed"  # runs that differ in nothing else repeat one another
_NOT_SETTINGS = ("run.name", "run.dir", "data.index_dir", "wandb.")
_POINTS = 120  # of a curve among others
_TICKS = 8  # values of a key that an axis has room for
_TASKS = 12  # charts
_CURVES = 16  # lines in a chart; more cannot be told apart
_FIGURES = (
    ("loss", "Training loss", "nats per token"),
    ("grad_norm", "Gradient norm", "L2 norm before clipping"),
    ("learning_rate", "Learning rate", "rate"),
    ("tokens_per_second", "Throughput", "tokens per second"),
)


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only."""

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
    """How configs differ.

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
    settings = {key: values for key, values in settings_of(histories).differing.items() if key != SEED}
    names = names_of(histories)
    found: dict[str, list[int]] = {}
    for i in range(len(histories)):
        found.setdefault(json.dumps([values[i] for values in settings.values()], sort_keys=True), []).append(i)
    if all(len(members) == 1 for members in found.values()):
        return [Group(name, (history,)) for name, history in zip(names, histories, strict=True)]
    return [
        Group(
            ", ".join(f"{_short_key(key)} {value_text(values[members[0]])}" for key, values in settings.items())
            or "all runs",
            tuple(histories[i] for i in members),
        )
        for members in found.values()
    ]


def _short_key(key: str) -> str:
    return key.rpartition(".")[2]


def value_text(value: object) -> str:
    """Write a value of a config as in YAML."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


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
    """Draw the curves of all runs over each other; runs that differ in their seed only as one, with a band."""
    groups = groups_of(histories)
    shown = groups[:_CURVES]
    cut = f"Only the first {len(shown)} of {len(groups)} are drawn." if len(shown) < len(groups) else ""
    bands = (
        "Each line is the mean over seeds; the band reaches from the least to the greatest." if _repeats(groups) else ""
    )
    for key, title, label in _FIGURES:
        series, each = [], 1
        for color, group in enumerate(shown):
            found = _mean_curve(group, key)
            if found is not None:
                one, points = found
                series.append(Series(group.label, one.x, one.y, one.low, one.high, color))
                each = max(each, points)
        if series:
            note = sentences([bands, f"Each point is the mean of up to {each} steps." if each > 1 else "", cut])
            values = np.concatenate([one.y for one in series])
            is_log = key in ("loss", "grad_norm") and needs_log(values)
            yield Chart(
                f"runs_{key}", title, "step", label, tuple(series), note=note, log_y=is_log,
                from_zero=key in ("learning_rate", "tokens_per_second"),
            )  # fmt: skip
    yield from _overlaid_evals(shown, sentences([bands, cut]))
    drawn = names_of(histories)[:_CURVES], histories[:_CURVES]
    yield from context_overlaid(*drawn)
    yield from needle_maps_of(*drawn)


def _repeats(groups: Sequence[Group]) -> bool:
    return any(len(group.runs) > 1 for group in groups)


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
    """Return the mean of the runs of a table [runs, points], with a band from the least to the greatest if several."""
    there = np.isfinite(table)
    some = there.any(axis=0)
    mean = np.where(some, np.where(there, table, 0).sum(axis=0) / np.maximum(there.sum(axis=0), 1), np.nan)
    if len(table) == 1:
        return Series(label, x, mean)
    low = np.where(some, np.where(there, table, np.inf).min(axis=0), np.nan)
    high = np.where(some, np.where(there, table, -np.inf).max(axis=0), np.nan)
    return Series(label, x, mean, low, high)


Lines = Mapping[int, Mapping[str, object]]  # of evals.jsonl, by step


def _overlaid_evals(groups: Sequence[Group], note: str) -> Iterator[Chart]:
    """Draw the macro average of held-out text, and the accuracy of each task."""
    suites = [[history.suite() or "" for history in group.runs] for group in groups]
    macro = [
        [history.evals.get(history.suite() or "", {}).get("macro", {}) for history in group.runs] for group in groups
    ]
    for key, unit in UNIT_OF.items():
        scored = [[lines if loss_key(lines.values()) == key else {} for lines in of_group] for of_group in macro]
        if series := _of_groups(groups, scored, key):
            labels = sorted({label for of_group in suites for label in of_group if label})
            about = sentences([f"Macro average of {', '.join(labels)}.", note])
            yield Chart(f"runs_{key}", "Held-out text", "step", unit, series, note=about)
    tasks = [[history.tasks() for history in group.runs] for group in groups]
    names = list(dict.fromkeys(name for of_group in tasks for of_run in of_group for name in of_run))
    more = f"The first {_TASKS} of {len(names)} tasks have a chart." if len(names) > _TASKS else ""
    for name in names[:_TASKS]:
        lines = [[of_run.get(name, {}) for of_run in of_group] for of_group in tasks]
        labels = sorted({str(line["suite"]) for of_group in lines for run in of_group for line in run.values()})
        where = "".join(letter if letter.isalnum() else "_" for letter in name)
        yield Chart(
            f"runs_task_{where}", f"Task {name}", "step", "accuracy", _of_groups(groups, lines, "accuracy"),
            note=sentences([f"{', '.join(labels)}.", note, more]), from_zero=True,
        )  # fmt: skip


def _of_groups(groups: Sequence[Group], lines: Sequence[Sequence[Lines]], key: str) -> tuple[Series, ...]:
    """Make a series for each group of runs, of a figure of their evaluations; those without any have none.

    Args:
        lines: of each run of each group.
    """
    series = []
    for color, (group, of_group) in enumerate(zip(groups, lines, strict=True)):
        of_runs = [{step: number(record.get(key)) for step, record in of_run.items()} for of_run in of_group]
        steps = sorted({step for of_run in of_runs for step in of_run})
        if steps:
            table = np.array([[of_run.get(step, math.nan) for step in steps] for of_run in of_runs])
            one = _spread(group.label, np.array(steps, np.float64), table)
            series.append(Series(group.label, one.x, one.y, one.low, one.high, color, "dots"))
    return tuple(series)


def by_key(histories: Sequence[History]) -> Iterator[Chart]:
    """Draw, for each swept key, where the runs ended over its values; a line for each choice of the other keys."""
    settings = settings_of(histories).differing
    swept = [key for key in settings if key != SEED]
    ends = ends_of(histories)
    for key in swept:
        yield _panel(key, settings, swept, ends)


def _panel(key: str, settings: dict[str, list[object]], swept: Sequence[str], ends: Ends) -> Chart:
    values = settings[key]
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    is_number = len(numbers) == len(values)
    kinds = sorted(set(numbers)) if is_number else sorted({value_text(value) for value in values})
    place = [float(value) if is_number else float(kinds.index(value_text(value))) for value in values]  # type: ignore[arg-type]
    others = [other for other in swept if other != key]
    lines: dict[str, list[int]] = {}
    for i in range(len(values)):
        label = ", ".join(f"{_short_key(other)} {value_text(settings[other][i])}" for other in others)
        lines.setdefault(label, []).append(i)
    series = []
    for color, (label, members) in enumerate(list(lines.items())[:_CURVES]):
        x = sorted({place[i] for i in members})
        runs = [[ends.values[i] for i in members if place[i] == at] for at in x]
        width = max(map(len, runs))
        table = np.array([run + [math.nan] * (width - len(run)) for run in runs]).T
        one = _spread(label, np.array(x), table)
        series.append(Series(label or ends.figure, one.x, one.y, one.low, one.high, color, "dots"))
    notes = [
        ends.note,
        "The band reaches from the least to the greatest seed." if SEED in settings else "",
        f"Only the first {_CURVES} of {len(lines)} choices of the other keys are drawn."
        if len(lines) > _CURVES
        else "",
    ]
    is_log = is_number and min(place) > 0 and max(place) / min(place) >= 8
    return Chart(
        f"by_{key.replace('.', '_')}", f"By {key}", key, ends.figure, tuple(series), note=sentences(notes),
        log_x=is_log, log_y=needs_log(ends.values), x_names=() if is_number else tuple(map(str, kinds)),
        x_ticks=tuple(map(float, kinds)) if is_number and len(kinds) <= _TICKS else (),
    )  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """A run compared with the reference, or why it cannot be."""

    name: str
    step: int
    differences: tuple[Difference, ...]
    problem: str = ""


def compared_with_first(histories: Sequence[History]) -> list[Compared]:
    """Compare the last evaluation of every run with that of the first, document by document."""
    names, found = names_of(histories), []
    for name, history in zip(names[1:], histories[1:], strict=True):
        try:
            pair = [_last_scores(histories[0]), _last_scores(history)]
            differences = compare.compare(pair[0].scores, pair[1].scores)
        except HeadraceError as error:
            found.append(Compared(name, 0, (), str(error)))
            continue
        doubts = []
        if pair[0].step != pair[1].step:
            doubts.append(f"{names[0]} is of step {pair[0].step}, {name} of step {pair[1].step}")
        labels = [one.scores.suite for one in pair]
        if labels[0] != labels[1]:
            doubts.append(
                f"{names[0]} was scored as {labels[0]}, {name} as {labels[1]}: differences in seq_len, precision or"
                " text affect the comparison"
            )
        common = differences[-1].documents
        doubts += [
            f"{len(one.scores.key) - common} documents of {which} are not in both and are not counted"
            for which, one in zip((names[0], name), pair, strict=True)
            if len(one.scores.key) > common
        ]
        found.append(Compared(name, pair[1].step, tuple(differences), "; ".join(doubts)))
    return found


class _Scored(NamedTuple):
    step: int
    scores: DocumentScores


def _last_scores(history: History) -> _Scored:
    """Read the sums of each document of the evaluation that the page shows. Raises HeadraceError if there are none."""
    suite = history.suite()
    if suite is None:
        raise ConfigError("it has no evaluation")
    step = max(max(of_steps) for of_steps in history.evals[suite].values())
    return _Scored(step, DocumentScores.load(history.folder.document_scores(step, suite)))


def difference_tables(histories: Sequence[History]) -> list[Table]:
    """Show how the runs differ from the first on held-out text, with intervals: averages, then domain by domain."""
    first, found = names_of(histories)[0], compared_with_first(histories)
    rows: list[tuple[Cell, ...]] = []
    for one in found:
        if one.differences:
            macro, micro = one.differences[-2:]
            better = sum(item.is_clear and item.difference < 0 for item in one.differences[:-2])
            worse = sum(item.is_clear and item.difference > 0 for item in one.differences[:-2])
            verdict = f"{better} better, {worse} worse, {len(one.differences) - 2 - better - worse} unclear"
            rows.append((one.name, one.step, macro.b, macro, micro, verdict, macro.documents))
    problems = [f"{one.name}: {one.problem}" for one in found if one.problem]
    units = dict.fromkeys(one.differences[0].unit for one in found if one.differences)
    unit = " or ".join(units) or UNIT_OF["bits_per_byte"]
    note = (
        f"{unit.capitalize()} of each run minus those of {first}; below zero is better. An interval holds 95 % of the"
        " differences when documents are drawn again, so it tells what is chance of the documents, not of the seed;"
        " where many runs were tried, the best of them looks better than it is. "
    )
    head = ("run", "step", f"{unit}, macro", "macro", "micro", "domains", "documents")
    tables = [Table(f"Differences from {first}", head, tuple(rows), note=note + ". ".join(problems))] if found else []
    for one in found if len(found) == 1 else ():
        of_domains = tuple((item.name, item.a, item.b, item, item.documents) for item in one.differences)
        last = len(of_domains)
        heads = ("domain", first, one.name, "difference", "documents")
        tables.append(Table("Domain by domain", heads, of_domains, strong=frozenset({last - 2, last - 1})))
    return tables
