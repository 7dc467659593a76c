"""What a chart shows, and where its axes begin, end and have ticks. {curves, side_by_side} -> chart -> {svg, png}."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# On light and on dark ground: Okabe and Ito's colors, which color-blind readers tell apart, with enough contrast on
# each. A series beyond them has the color of an earlier one, and dashes.
PALETTE = (
    ("#0072b2", "#56a8e0"),
    ("#d55e00", "#f08a48"),
    ("#00805e", "#2fbf96"),
    ("#b35a8e", "#e39ac6"),
    ("#9a6a00", "#e6b030"),
    ("#5b4bb5", "#a79bf0"),
    ("#4a8fb8", "#9ad4f5"),
    ("#555555", "#bbbbbb"),
)
RAMP = (("#c2a5d8", "#6b4a86"), ("#3b0f6f", "#e8d4ff"))  # from the first layer to the last, light and dark each
_TICKS = 6  # of an axis, about
_LOG_SPAN = 30.0  # a ratio of greatest to median value beyond which a linear axis would show a flat line


@dataclass(frozen=True)
class Series:
    """One curve, area or set of points.

    Attributes:
        label: in the legend; empty for none.
        x, y: [points]; NaN in y is a gap.
        low, high: [points], bounds of a band around y, or of an area.
        color: its number; of a shaded series the place in a ramp, from 0 to 1.
        style: `area` fills from low to high and draws no line; `dots` marks each point, `points` draws no line between.
    """

    label: str
    x: Floats
    y: Floats
    low: Floats | None = None
    high: Floats | None = None
    color: int | float = 0
    style: Literal["line", "area", "dots", "points"] = "line"


@dataclass(frozen=True)
class Mark:
    """A step that something happened at, drawn as a vertical line."""

    x: float
    kind: Literal["restart", "spike", "event"]
    text: str


@dataclass(frozen=True)
class Chart:
    """A chart: series over one axis.

    Attributes:
        name: file name of its picture, without suffix.
        note: a sentence below, such as how the curve was thinned.
        log_x, log_y: whether an axis is logarithmic.
        x_names: names of the places 0, 1, ... on the x axis, in place of numbers.
        x_ticks: values of the ticks on the x axis; none to choose them.
        from_zero: whether the y axis has to show 0.
        ramp: series are colored by a ramp from the first to the last, such as layers, and have no legend of their own.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    marks: tuple[Mark, ...] = ()
    note: str = ""
    log_x: bool = False
    log_y: bool = False
    x_names: tuple[str, ...] = ()
    x_ticks: tuple[float, ...] = ()
    from_zero: bool = False
    ramp: bool = False


@dataclass(frozen=True)
class HeatMap:
    """A table of shares as a picture, each darker the nearer it is to 1.

    Attributes:
        name, title, note: as in Chart.
        x_names, y_names: names of the columns and of the rows, the first row at the bottom.
        values: [rows, columns], from 0 to 1; NaN where there is none.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    x_names: tuple[str, ...]
    y_names: tuple[str, ...]
    values: Floats
    note: str = ""


@dataclass(frozen=True)
class Axis:
    """A range of values and the ticks within.

    Attributes:
        low, high: the ends; on a logarithmic axis above zero.
        ticks: value and text of each.
    """

    low: float
    high: float
    log: bool
    ticks: tuple[tuple[float, str], ...]

    def place(self, value: Floats) -> Floats:
        """Return where values lie on the axis: 0 at its beginning, 1 at its end. Values that have no place are NaN."""
        if self.log:
            logs = np.log10(np.where(value > 0, value, np.nan))
            return (logs - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (value - self.low) / (self.high - self.low)


def needs_log(values: Floats) -> bool:
    """Return whether values are positive and too far apart for a linear axis."""
    finite = values[np.isfinite(values)]
    return bool(len(finite)) and finite.min() > 0 and finite.max() / np.median(finite) > _LOG_SPAN


def axis_of(values: Floats, log: bool = False, from_zero: bool = False, tight: bool = False) -> Axis:
    """Find an axis for values.

    Args:
        tight: the axis ends with the values, not with a tick.
    """
    finite = values[np.isfinite(values) & ((values > 0) | (not log))]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0) if not log else (1.0, 10.0)
    if log:
        return _log_axis(low, high, tight)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high <= low:
        pad = abs(low) * 0.05 or 1.0
        low, high = low - pad, high + pad
    step = _nice_step((high - low) / (_TICKS - 1))
    if not tight:
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Axis(low, high, False, tuple((i * step, tick_text(i * step, step)) for i in range(first, last + 1)))


def _log_axis(low: float, high: float, tight: bool) -> Axis:
    if high <= low * 1.0001:
        low, high = low / 1.5, high * 1.5
    elif not tight:
        pad = (high / low) ** 0.03
        low, high = low / pad, high * pad
    decades = math.log10(high) - math.log10(low)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if decades > _TICKS:
        every = math.ceil(decades / _TICKS)
        powers = [power for power in range(first, last + 1) if power % every == 0]
        values = [10.0**power for power in powers if abs(power) < 300]
    else:
        digits = (1,) if decades > 3 else (1, 3) if decades > 1.6 else (1, 2, 5) if decades > 0.7 else range(1, 10)
        values = [digit * 10.0**power for power in range(first, last + 1) for digit in digits]
    inside = [value for value in values if low * 0.999 <= value <= high * 1.001]
    if len(inside) < 2:  # a narrow range: ticks of a linear axis
        step = _nice_step((high - low) / (_TICKS - 1))
        inside = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
        return Axis(low, high, True, tuple((value, tick_text(value, step)) for value in inside))
    return Axis(low, high, True, tuple((value, short(value)) for value in inside))


def _nice_step(raw: float) -> float:
    """Return 1, 2 or 5 times a power of ten, at least `raw`."""
    power = 10.0 ** math.floor(math.log10(raw))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= raw * (1 - 1e-9))


def tick_text(value: float, step: float) -> str:
    """Write a tick with as many decimals as its step needs."""
    if value == 0:
        return "0"
    if max(abs(value), step) >= 1e4 or step < 1e-4:
        return short(value)
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def short(value: float) -> str:
    """Write a number in few letters: 1.5M, 0.002, 3e-05."""
    if not math.isfinite(value):
        return "-" if math.isnan(value) else "∞" if value > 0 else "-∞"
    size = abs(value)
    for least, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if least <= size < 1e15:
            scale = 1e3 if unit == "k" else least
            return f"{value / scale:.4g}{unit}"
    return f"{value:.4g}"


def finite_of(series: Sequence[Series]) -> Floats:
    """Return all finite values on the y axis, of curves and bands."""
    parts = [part for one in series for part in (one.y, one.low, one.high) if part is not None]
    values = np.concatenate(parts) if parts else np.array([])
    return values[np.isfinite(values)]
