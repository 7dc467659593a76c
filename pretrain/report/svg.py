"""Draw a chart as a figure of HTML and inline SVG. chart -> svg -> page.

Its colors follow the reader's light or dark theme. The values are in the figure a second time, as JSON, from which the
page's script shows those under the pointer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from html import escape

import numpy as np

from pretrain.report.chart import PALETTE, Axis, Chart, Floats, HeatMap, Mark, Series, axis_of, finite_of, short

WIDTH, HEIGHT = 480, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 24, 44
_PLOT_WIDTH, _PLOT_HEIGHT = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
_MARK_NAMES = {"restart": "restart", "spike": "spike", "event": "event"}


def figure(chart: Chart) -> str:
    """Draw a chart: title, picture, legend and note."""
    x_axis, y_axis = axes_of(chart)
    note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ""
    return (
        f'<figure><figcaption>{escape(chart.title)}</figcaption><div class="plot">'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(_spoken(chart))}">'
        f"{''.join(_frame(chart, x_axis, y_axis))}{''.join(_content(chart, x_axis, y_axis))}"
        f'<line class="cross" y1="{_TOP}" y2="{_TOP + _PLOT_HEIGHT}" visibility="hidden"/></svg>'
        f'<div class="tip" hidden=""></div></div>{_legend(chart)}{note}'
        f'<script type="application/json">{_values(chart, x_axis)}</script></figure>'
    )


def heat_figure(heat: HeatMap) -> str:
    """Draw a heat map: title, picture and note."""
    note = f'<p class="note">{escape(heat.note)}</p>' if heat.note else ""
    spoken = f"{heat.title}, {heat.y_label} against {heat.x_label}"
    return (
        f'<figure class="heat"><figcaption>{escape(heat.title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(spoken)}">{"".join(_cells(heat))}</svg>'
        f"{note}</figure>"
    )


def _cells(heat: HeatMap) -> Iterator[str]:
    """Draw the cells of a heat map, each with its value, and the names beside them."""
    width, height = _PLOT_WIDTH / len(heat.x_names), _PLOT_HEIGHT / len(heat.y_names)
    yield f'<text class="label" x="4" y="13">{escape(heat.y_label)}</text>'
    yield (f'<text class="label" x="{WIDTH - _RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{escape(heat.x_label)}</text>')
    for column, name in enumerate(heat.x_names):
        x = _LEFT + (column + 0.5) * width
        yield f'<text class="tick" x="{x:.1f}" y="{HEIGHT - _BOTTOM + 18}" text-anchor="middle">{escape(name)}</text>'
    for row, name in enumerate(heat.y_names):
        y = _TOP + _PLOT_HEIGHT - (row + 1) * height
        middle = y + height / 2 + 4.5
        yield f'<text class="tick" x="{_LEFT - 7}" y="{middle:.1f}" text-anchor="end">{escape(name)}</text>'
        for column, value in enumerate(heat.values[row].tolist()):
            x, share = _LEFT + column * width, 0.0 if math.isnan(value) else min(max(value, 0.0), 1.0)
            yield (
                f'<rect x="{x + 1:.1f}" y="{y + 1:.1f}" width="{width - 2:.1f}" height="{height - 2:.1f}"'
                f' fill="color-mix(in oklab,var(--c0) {0.6 * share:.0%},var(--panel))"/>'
                f'<text class="tick" x="{x + width / 2:.1f}" y="{middle:.1f}" text-anchor="middle">'
                f"{'-' if math.isnan(value) else f'{value:.2f}'}</text>"
            )


def axes_of(chart: Chart) -> tuple[Axis, Axis]:
    """Find a chart's axes."""
    if chart.x_names:
        count = len(chart.x_names)
        x_axis = Axis(-0.5, count - 0.5, False, tuple((float(i), name) for i, name in enumerate(chart.x_names)))
    else:
        xs = [one.x for one in chart.series] + [np.array([mark.x for mark in chart.marks], np.float64)]
        is_spread = any(one.style in ("dots", "points") for one in chart.series)
        x_axis = axis_of(np.concatenate(xs), log=chart.log_x, tight=not is_spread or chart.log_x)
        if chart.x_ticks:
            x_axis = replace(x_axis, ticks=tuple((value, f"{value:g}") for value in chart.x_ticks))
    return x_axis, axis_of(finite_of(chart.series), log=chart.log_y, from_zero=chart.from_zero)


def _spoken(chart: Chart) -> str:
    """Describe a chart for a reader who does not see it: its title, and where each series ends."""
    ends = []
    for one in chart.series[:12]:
        values = one.y[np.isfinite(one.y)]
        if one.label and len(values):
            ends.append(f"{one.label} ends at {short(float(values[-1]))}")
    return f"{chart.title}, {chart.y_label} over {chart.x_label}" + (f": {'; '.join(ends)}" if ends else "")


def _frame(chart: Chart, x_axis: Axis, y_axis: Axis) -> Iterator[str]:
    """Draw the grid, the ticks' texts and the axes' labels."""
    bottom = _TOP + _PLOT_HEIGHT
    for value, text in y_axis.ticks:
        y = float(_y(np.array([value]), y_axis)[0])
        yield f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="tick" x="{_LEFT - 7}" y="{y + 4.5:.1f}" text-anchor="end">{escape(text)}</text>'
    for value, text in _spaced(x_axis):
        x = float(_x(np.array([value]), x_axis)[0])
        yield f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
        yield f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{escape(text)}</text>'
    yield f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>'
    scale = ", log scale" if chart.log_y else ""
    yield f'<text class="label" x="4" y="13">{escape(chart.y_label)}{scale}</text>'
    x_label = escape(chart.x_label) + (", log scale" if chart.log_x else "")
    yield f'<text class="label" x="{WIDTH - _RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{x_label}</text>'


def _spaced(axis: Axis) -> Iterator[tuple[float, str]]:
    """Yield the ticks of the x axis whose texts do not run into each other."""
    end = -math.inf
    for value, text in axis.ticks:
        x, width = float(_x(np.array([value]), axis)[0]), 7.5 * len(text) + 8
        if x - width / 2 >= end:
            end = x + width / 2
            yield value, text


def _content(chart: Chart, x_axis: Axis, y_axis: Axis) -> Iterator[str]:
    for mark in chart.marks:
        yield _mark(mark, x_axis)
    for one in chart.series:
        if one.low is not None and one.high is not None:
            yield from _band(chart, one, x_axis, y_axis)
    for one in chart.series:
        if one.style != "area":
            yield from _curve(chart, one, x_axis, y_axis)


def _mark(mark: Mark, x_axis: Axis) -> str:
    x = float(_x(np.array([mark.x]), x_axis)[0])
    head = (
        f'<path d="M{x - 4.5:.1f} {_TOP - 8}h9l-4.5 7.5z"/>'
        if mark.kind != "restart"
        else f'<circle cx="{x:.1f}" cy="{_TOP - 4}" r="3.5"/>'
    )
    return (
        f'<g class="mark {mark.kind}"><title>{escape(mark.text)}</title>{head}'
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_TOP + _PLOT_HEIGHT}"/></g>'
    )


def _band(chart: Chart, one: Series, x_axis: Axis, y_axis: Axis) -> Iterator[str]:
    assert one.low is not None
    assert one.high is not None
    x = _x(one.x, x_axis)
    low, high = _y(one.low, y_axis), _y(one.high, y_axis)
    shape = "area" if one.style == "area" else "band"
    for part in _stretches(x, low, high):
        points = [*zip(x[part], high[part], strict=True), *zip(x[part][::-1], low[part][::-1], strict=True)]
        yield f'<path class="{shape}{_color(chart, one)} d="{_path(points)}z"><title>{escape(one.label)}</title></path>'


def _curve(chart: Chart, one: Series, x_axis: Axis, y_axis: Axis) -> Iterator[str]:
    x, y = _x(one.x, x_axis), _y(one.y, y_axis)
    title = f"<title>{escape(one.label)}</title>" if one.label else ""
    pieces = [list(zip(x[part], y[part], strict=True)) for part in _stretches(x, y)]
    if one.style != "points":
        lines = "".join(_path(points) for points in pieces if len(points) > 1)
        if lines:
            yield f'<path class="line{_color(chart, one)} d="{lines}">{title}</path>'
    for points in pieces:
        if one.style in ("dots", "points") or len(points) == 1:
            for px, py in points:
                yield f'<circle class="dot{_color(chart, one)} cx="{px:.1f}" cy="{py:.1f}" r="3.6">{title}</circle>'


def _color(chart: Chart, one: Series) -> str:
    """Return the rest of a class attribute, and what else gives a shape its color."""
    if chart.ramp:
        return f'" style="--c:{_ramp(float(one.color))}"'
    number = int(one.color)
    return f' c{number % len(PALETTE)}{" dashed" if number >= len(PALETTE) else ""}"'


def _ramp(place: float) -> str:
    return f"color-mix(in oklab,var(--r1) {place:.0%},var(--r0))"


def _stretches(*columns: Floats) -> Iterator[slice]:
    """Yield the stretches of points without a gap."""
    there = np.isfinite(np.stack(columns)).all(axis=0)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], there, [False]]).astype(np.int8)))
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        yield slice(int(start), int(end))


def _path(points: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _x(values: Floats, axis: Axis) -> Floats:
    return _LEFT + axis.place(values) * _PLOT_WIDTH


def _y(values: Floats, axis: Axis) -> Floats:
    return _TOP + (1 - axis.place(values)) * _PLOT_HEIGHT


def _legend(chart: Chart) -> str:
    items = []
    if chart.ramp:
        named = [one for one in chart.series if one.label]
        ends = f"{escape(named[0].label)}&#8194;" if named else "", escape(named[-1].label) if named else ""
        items.append(f'{ends[0]}<span class="ramp"></span>&#8194;{ends[1]}')
    elif len(chart.series) > 1:
        for one in chart.series:
            if one.label:
                items.append(f'<span class="key{_color(chart, one)}></span>{escape(one.label)}')
    for kind, name in _MARK_NAMES.items():
        if count := sum(mark.kind == kind for mark in chart.marks):
            plural = "s" if count > 1 else ""
            items.append(f'<span class="flag {kind}"></span>{count} {name}{plural}')
    return f'<ul class="legend">{"".join(f"<li>{item}</li>" for item in items)}</ul>' if items else ""


def _values(chart: Chart, x_axis: Axis) -> str:
    """Return what the page's script needs to show the values under the pointer."""
    ends = (math.log10(x_axis.low), math.log10(x_axis.high)) if x_axis.log else (x_axis.low, x_axis.high)
    series = []
    for one in chart.series:
        if not one.label:
            continue
        content: dict[str, object] = {"name": one.label, "x": _numbers(one.x, 15), "y": _numbers(one.y)}
        if one.low is not None and one.high is not None and one.style != "area":
            content |= {"low": _numbers(one.low), "high": _numbers(one.high)}
        series.append(content)
    left, right = _LEFT / WIDTH, 1 - _RIGHT / WIDTH
    content = {"ends": ends, "log": x_axis.log, "span": [left, right], "x": chart.x_label, "names": chart.x_names}
    # A run's or domain's name may hold what would end the script element.
    return (
        json.dumps({**content, "series": series}, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")
    )


def _numbers(values: Floats, digits: int = 6) -> list[float | None]:
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values.tolist()]
