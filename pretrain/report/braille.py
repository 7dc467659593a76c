"""Draw a curve with braille characters, each of which has two columns of four dots. thinning -> braille -> frame."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from pretrain.report.chart import Axis, Floats, axis_of, needs_log, short
from pretrain.report.thinning import thin

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a character, by row and column
_BLANK = 0x2800
_LABEL = 10  # letters of a label of the y axis


def plot(x: Floats, y: Floats, width: int, height: int, from_zero: bool = False) -> list[str]:
    """Draw a curve with its axes; it reaches from the least to the greatest value that a column of dots stands for.

    Args:
        x, y: [points], at least one of which is finite in y.
        width, height: of the picture in characters, labels included.
    Returns:
        Lines of equal width, the last of which labels the x axis.
    """
    columns, rows = 2 * (width - _LABEL - 1), 4 * (height - 1)
    found = thin(x, y, columns)
    is_log = not from_zero and needs_log(y)
    axis = axis_of(np.concatenate([found.low, found.high]), log=is_log, from_zero=from_zero, tight=True)
    dots = np.zeros((rows, columns), bool)
    for column, low, high in _spans(found.x, found.low, found.high, columns):
        dots[_row(high, axis, rows) : _row(low, axis, rows) + 1, column] = True
    lines = _characters(dots)
    labels = {0: _label(axis.high), len(lines) - 1: _label(axis.low)}
    drawn = [f"{labels.get(i, ''):>{_LABEL}} {line}" for i, line in enumerate(lines)]
    ends = f"{x[0]:,.0f}", f"step {x[-1]:,.0f}"
    return [*drawn, " " * (_LABEL + 1) + ends[0] + ends[1].rjust(width - _LABEL - 1 - len(ends[0]))]


def _label(value: float) -> str:
    """Write a number in four digits, or three where the label would be too long."""
    text = short(float(f"{value:.4g}"))
    return text if len(text) <= _LABEL else short(float(f"{value:.3g}"))


def _spans(x: Floats, low: Floats, high: Floats, columns: int) -> Iterator[tuple[int, float, float]]:
    """Yield columns with their least and greatest value: of the points in it, and of the line that joins points."""
    there = np.isfinite(low)
    at = np.linspace(x[0], x[-1], columns)
    # The nearest column of each point, since the line may pass a point between two columns and cut off its peak.
    nearest = np.round((x - x[0]) / max(x[-1] - x[0], 1e-9) * (columns - 1)).astype(np.int64)[there]
    x, low, high = x[there], low[there], high[there]
    lows, highs = np.interp(at, x, low), np.interp(at, x, high)
    # Reach halfway to the column before, so that steep parts have no holes.
    before = np.maximum(np.arange(columns) - 1, 0)
    least = np.minimum(lows, (lows[before] + lows) / 2)
    greatest = np.maximum(highs, (highs[before] + highs) / 2)
    np.minimum.at(least, nearest, low)
    np.maximum.at(greatest, nearest, high)
    for column in range(nearest[0], nearest[-1] + 1):  # before and after them there is no value
        yield column, float(least[column]), float(greatest[column])


def _row(value: float, axis: Axis, rows: int) -> int:
    place = float(axis.place(np.array([value]))[0])
    return int(np.clip(round((1 - place) * (rows - 1)), 0, rows - 1))


def _characters(dots: npt.NDArray[np.bool_]) -> list[str]:
    rows, columns = dots.shape
    codes = np.full((rows // 4, columns // 2), _BLANK)
    for row, of_row in enumerate(_DOTS):
        for column, bit in enumerate(of_row):
            codes |= np.where(dots[row::4, column::2], bit, 0)
    return ["".join(map(chr, line)) for line in codes]
