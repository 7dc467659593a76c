"""One page about one run or several, in a single file. {curves, facts, side_by_side, svg} -> page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from html import escape
from pathlib import Path

from pretrain.config_file import dump
from pretrain.evaluation.compare import Difference
from pretrain.report import facts, side_by_side
from pretrain.report.chart import Chart, HeatMap, short
from pretrain.report.curves import charts_of, marks_of
from pretrain.report.differences import difference_tables
from pretrain.report.facts import Cell, Table
from pretrain.report.figures import state_of
from pretrain.report.look import SCRIPT, STYLE
from pretrain.report.svg import figure, heat_figure
from pretrain.run.history import History
from shards import installation
from shards.storage.atomic import write_atomically

_SPAN = 110  # width of an interval in a table, in pixels
_EVENTS = 500  # lines of a list of events


def write_page(histories: Sequence[History], path: Path) -> None:
    """Write the page about runs that have been read. Raises OSError if that fails."""
    write_atomically(path, page(histories))


def page(histories: Sequence[History]) -> str:
    """Return the page about runs, at least one."""
    if len(histories) == 1:
        title, body = histories[0].name, _one_run(histories[0])
    else:
        title, body = f"{len(histories)} runs", _several_runs(histories)
    made = datetime.now().astimezone().isoformat(timespec="minutes")
    words = installation.typed("report", *(str(history.folder.root) for history in histories))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        '<link rel="icon" href="data:,"/>'  # or a browser asks the server of the page for one
        f"<title>{escape(title)} · Headrace</title><style>{STYLE}</style></head>\n<body><main>\n"
        f"{''.join(body)}<footer>Made by <code>{escape(words)}</code>, {made}.</footer>\n"
        f"</main><script>//<![CDATA[\n{SCRIPT}//]]></script></body></html>\n"
    )


def _one_run(history: History) -> Iterator[str]:
    yield f"<h1>{escape(history.name)}</h1>"
    yield f'<p class="sub">{escape(state_of(history))} · {escape(str(history.folder.root))}</p>'
    heads = [
        f"<div><b>{escape(value)}</b><span>{escape(what)}</span></div>" for what, value in facts.headlines(history)
    ]
    yield f'<div class="heads">{"".join(heads)}</div>'
    yield _problems([(history.name, problem) for problem in history.problems()], named=False)
    yield _section("What was trained on what", [_pairs(facts.facts_of(history))])
    charts = charts_of(history)
    yield _section("Training", [_charts(charts["training"]), _events(history)])
    tables = [_table(facts.evaluation_table(history)), _table(facts.task_table(history))]
    yield _section("Evaluation", [_charts(charts["evaluation"]), *tables])
    yield _section("Speed", [_charts(charts["speed"]), _table(facts.time_table(history))])
    yield _section("Layers", [_charts(charts["layers"])])
    yield _section("Data", [_table(facts.source_table(history)), _charts(charts["data"])])
    yield _section("Samples", [_samples(history)])
    yield _section("Provenance", _provenance(history))


def _several_runs(histories: Sequence[History]) -> Iterator[str]:
    names = side_by_side.names_of(histories)
    yield f"<h1>{len(histories)} runs</h1>"
    yield f'<p class="sub">{escape(", ".join(names))}</p>'
    yield _problems([(name, text) for name, one in zip(names, histories, strict=True) for text in one.problems()])
    yield _section("Runs", [_table(side_by_side.run_table(histories), is_sortable=True)])
    yield _section("By setting", [_charts(list(side_by_side.by_key(histories)))])
    yield _section("Curves", [_charts(list(side_by_side.overlaid(histories)))])
    tables = [_table(table, is_sortable=True) for table in difference_tables(histories)]
    yield _section("Differences on held-out text", tables)
    details = [
        f"<details><summary>{escape(name)}</summary>{_pairs(facts.facts_of(one))}{''.join(_provenance(one))}</details>"
        for name, one in zip(names, histories, strict=True)
    ]
    note = f'<p class="note">{escape(installation.typed("report", "RUN"))} makes the page of a single run.</p>'
    yield _section("Each run", [*details, note])


def all_charts(histories: Sequence[History]) -> list[Chart | HeatMap]:
    """Return the charts of the page about runs."""
    if len(histories) == 1:
        return [chart for charts in charts_of(histories[0]).values() for chart in charts]
    return [*side_by_side.by_key(histories), *side_by_side.overlaid(histories)]


def _section(title: str, parts: Iterable[str]) -> str:
    content = "".join(parts)
    return f"<section><h2>{escape(title)}</h2>{content}</section>\n" if content else ""


def _charts(charts: Sequence[Chart | HeatMap]) -> str:
    drawn = [heat_figure(chart) if isinstance(chart, HeatMap) else figure(chart) for chart in charts]
    return f'<div class="charts">{"".join(drawn)}</div>' if drawn else ""


def _pairs(pairs: Sequence[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in pairs) + "</dl>"


def _problems(problems: Sequence[tuple[str, str]], named: bool = True) -> str:
    if not problems:
        return ""
    items = "".join(f"<li>{escape(f'{name}: {text}' if named else text)}</li>" for name, text in problems)
    return f'<div class="problems"><b>Missing or damaged</b><ul>{items}</ul></div>'


def _events(history: History) -> str:
    marks = sorted(marks_of(history), key=lambda mark: mark.x)
    if not marks:
        return ""
    items = "".join(f"<li>{escape(mark.text)}</li>" for mark in marks[-_EVENTS:])
    first = f" (the last {_EVENTS})" if len(marks) > _EVENTS else ""
    return f"<details><summary>{len(marks)} events{first}</summary><ul>{items}</ul></details>"


def _samples(history: History) -> str:
    newest = {int(sample["step"]): sample for sample in history.samples}
    return "".join(
        f'<h3>Step {step:,}</h3><pre class="sample"><b>{escape(str(sample.get("prompt", "")))}</b>'
        f"{escape(str(sample.get('text', '')))}</pre>"
        for step, sample in sorted(newest.items(), reverse=True)
    )


def _provenance(history: History) -> list[str]:
    pairs, tables = facts.provenance_of(history)
    config = f"<details><summary>Config</summary><pre>{escape(dump(history.config))}</pre></details>"
    return [_pairs(pairs), *map(_table, tables), config if history.config else ""]


def _table(table: Table | None, is_sortable: bool = False) -> str:
    if table is None:
        return ""
    numeric = [
        all(isinstance(row[i], float | int | Difference | None) for row in table.rows) and bool(table.rows)
        for i in range(len(table.head))
    ]
    heads = "".join(
        f"<th{_class('num' if number else '')}>{escape(head)}</th>"
        for head, number in zip(table.head, numeric, strict=True)
    )
    span = max((_reach(cell) for row in table.rows for cell in row), default=0.0)
    rows = "".join(
        f"<tr{_class('strong' if i in table.strong else '')}>"
        + "".join(_cell(cell, j in table.bars, span) for j, cell in enumerate(row))
        + "</tr>"
        for i, row in enumerate(table.rows)
    )
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    kind = _class("sortable" if is_sortable else "")
    whole = f'<div class="scroll"><table{kind}><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    title = f"<h3>{escape(table.title)}</h3>" if table.title else ""
    return f"{title}{whole if rows else ''}{note}"


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _cell(cell: Cell, is_bar: bool, span: float) -> str:
    if isinstance(cell, Difference):
        return f'<td data-value="{cell.difference!r}" class="num">{_interval(cell, span)}</td>'
    if isinstance(cell, str):
        return f'<td class="text" data-value="{escape(cell)}">{escape(cell)}</td>'
    if cell is None or not math.isfinite(cell):
        value = "" if cell is None or math.isnan(cell) else repr(cell)
        return f'<td class="num" data-value="{value}">{"-" if value == "" else short(float(value))}</td>'
    if is_bar:
        bar = f'<span class="bar"><i style="width:{min(max(cell, 0), 1):.1%}"></i></span>'
        return f'<td class="num" data-value="{cell!r}">{bar}{cell:.1%}</td>'
    return f'<td class="num" data-value="{cell!r}">{_figure(cell)}</td>'


def _figure(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e7):
        return f"{value:.3g}"
    return f"{value:,.4f}" if size < 100 else f"{value:,.1f}"


def _reach(cell: Cell) -> float:
    if not isinstance(cell, Difference):
        return 0.0
    return max(abs(end) for end in (cell.difference, cell.low, cell.high) if end is not None)


def _interval(item: Difference, span: float) -> str:
    """Draw a difference with its interval around zero, and write both."""
    scale = _SPAN / 2.2 / (span or 1.0)
    middle = _SPAN / 2
    kind = "unclear" if not item.is_clear else "good" if item.difference < 0 else "bad"
    reach, text = "", "no interval"
    if item.low is not None and item.high is not None:
        ends = middle + item.low * scale, middle + item.high * scale
        reach = f'<line class="reach" x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="7" y2="7"/>'
        text = f"{item.low:+.4f} to {item.high:+.4f}"
    picture = (
        f'<svg class="span" viewBox="0 0 {_SPAN} 14" aria-hidden="true"><line class="zero" x1="{middle}" x2="{middle}"'
        f' y1="0" y2="14"/>{reach}<circle cx="{middle + item.difference * scale:.1f}" cy="7" r="4"/></svg>'
    )
    return f'<span class="{kind}">{picture}{item.difference:+.4f}</span> ({text})'
