"""Draw charts as PNG files, with matplotlib, for slides and papers. chart -> png -> files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pretrain.report.chart import PALETTE, RAMP, Chart, HeatMap, Series

_MARK_COLORS = {"restart": "#777777", "spike": PALETTE[1][0], "event": PALETTE[4][0]}


def draw_all(charts: Sequence[Chart | HeatMap], folder: Path) -> list[Path]:
    """Write each chart to a file of its name; return the files.

    It needs matplotlib; see `pretrain.evaluation.compare.check_can_draw`. Raises OSError if a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for chart in charts:
        paths.append(folder / f"{chart.name}.png")
        if isinstance(chart, HeatMap):
            draw_heat_maps([chart], paths[-1])
        else:
            draw(chart, paths[-1])
    return paths


def draw(chart: Chart, path: Path) -> None:
    """Write one chart."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for mark in chart.marks:
        axes.axvline(mark.x, color=_MARK_COLORS[mark.kind], linewidth=0.9, linestyle="--")
    for one in chart.series:
        color = _color(chart, one)
        if one.low is not None and one.high is not None:
            alpha = 0.85 if one.style == "area" else 0.2
            axes.fill_between(
                one.x, one.low, one.high, color=color, alpha=alpha, linewidth=0, label=_label(one, "area")
            )
        if one.style != "area":
            dashes = "--" if not chart.ramp and one.color >= len(PALETTE) else "-"
            line = "" if one.style == "points" else dashes
            marker = "" if one.style == "line" else "o"
            axes.plot(
                one.x, one.y, color=color, linewidth=1.4, linestyle=line, marker=marker, markersize=4, label=_label(one)
            )
    axes.set_xscale("log" if chart.log_x else "linear")
    axes.set_yscale("log" if chart.log_y else "linear")
    if chart.x_names:
        axes.set_xticks(range(len(chart.x_names)), chart.x_names)
    if chart.x_ticks:
        axes.set_xticks(chart.x_ticks, [f"{value:g}" for value in chart.x_ticks])
        axes.minorticks_off()
    if chart.from_zero:
        axes.set_ylim(bottom=0)
    axes.set(xlabel=chart.x_label, ylabel=chart.y_label, title=chart.title)
    axes.grid(color="#e4e8ec")
    axes.set_axisbelow(True)
    if len(chart.series) > 1:
        shown = {0, len(chart.series) - 1} if chart.ramp else range(len(chart.series))
        handles, labels = axes.get_legend_handles_labels()
        chosen = [i for i in shown if i < len(handles)]
        axes.legend([handles[i] for i in chosen], [labels[i] for i in chosen], fontsize=8)
    if chart.note:
        figure.supxlabel(chart.note, fontsize=7, color="#59636e", wrap=True)
    figure.savefig(path, dpi=150)


def draw_heat_maps(maps: Sequence[HeatMap], path: Path) -> None:
    """Write heat maps side by side, in one picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(5.0, 4.4 * len(maps)), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    shades = LinearSegmentedColormap.from_list("share", ["#f6f8fa", PALETTE[0][0]])
    for axes, heat in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps, strict=True):
        axes.imshow(heat.values, cmap=shades, vmin=0, vmax=1, aspect="auto", origin="lower")
        axes.set_xticks(range(len(heat.x_names)), heat.x_names)
        axes.set_yticks(range(len(heat.y_names)), heat.y_names)
        axes.set(xlabel=heat.x_label, ylabel=heat.y_label, title=heat.title)
        for (row, column), value in np.ndenumerate(heat.values):
            if np.isfinite(value):
                axes.text(
                    column, row, f"{value:.2f}", ha="center", va="center", fontsize=9,
                    color="white" if value > 0.6 else "#1f2328",
                )  # fmt: skip
    if notes := " ".join(dict.fromkeys(heat.note for heat in maps if heat.note)):
        figure.supxlabel(notes, fontsize=7, color="#59636e", wrap=True)
    figure.savefig(path, dpi=150)


def _label(one: Series, style: str = "") -> str | None:
    return one.label if not style or one.style == style else None


def _color(chart: Chart, one: Series) -> str | tuple[float, float, float]:
    if not chart.ramp:
        return PALETTE[int(one.color) % len(PALETTE)][0]
    ends = [np.array([int(pair[0][i : i + 2], 16) / 255 for i in (1, 3, 5)]) for pair in RAMP]
    red, green, blue = (ends[0] + float(one.color) * (ends[1] - ends[0])).tolist()
    return red, green, blue
