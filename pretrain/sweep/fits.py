"""Fit curves to a handful of points, and say how far a prediction may be off. points -> fits -> scaling.

Few points leave few degrees of freedom, so intervals are those of Student's t: with three points and a line, 12.7
deviations to each side where many points would have 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

COVERAGE = 0.95  # of all intervals
_EXPONENTS = np.geomspace(0.01, 2.0, 800)  # tried for a power law with an offset
_BISECTIONS = 50


class Prediction(NamedTuple):
    """What a new measurement is expected to be, and the bounds between which it lies in 95 of 100 cases."""

    value: float
    low: float
    high: float

    def exponential(self) -> Prediction:
        """Return the prediction of the quantity whose logarithm this one is of."""
        return Prediction(*map(_exp, self))


class PowerLaw(NamedTuple):
    """loss = offset + (scale / compute) ^ exponent.

    Attributes:
        exponent: not above 0 if the loss does not fall with the compute.
        expected: the loss that it predicts.
        deviation: of the points from the curve, as one expects it of new ones.
    """

    offset: float
    exponent: float
    expected: Prediction
    deviation: float


def student_quantile(degrees: int) -> float:
    """Return how many estimated deviations hold `COVERAGE` of Student's t on both sides of zero.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """

    def covered(angle: float) -> float:
        cosine, term, total = math.cos(angle), 1.0, 0.0
        if degrees % 2:
            for i in range(1, (degrees - 1) // 2 + 1):
                term = math.cos(angle) if i == 1 else term * cosine**2 * (2 * i - 2) / (2 * i - 1)
                total += term
            return 2 / math.pi * (angle + math.sin(angle) * total)
        for i in range(degrees // 2):
            term *= 1.0 if i == 0 else cosine**2 * (2 * i - 1) / (2 * i)
            total += term
        return math.sin(angle) * total

    return math.sqrt(degrees) * math.tan(_bisect(lambda angle: covered(angle) > COVERAGE, 0.0, math.pi / 2))


def line(x: Sequence[float], y: Sequence[float], at: float) -> tuple[float, Prediction, float]:
    """Fit a straight line to at least three points by least squares.

    Returns:
        Its slope, the prediction at one place, and the points' deviation.
    """
    xs, ys = np.array(x), np.array(y)
    assert len(xs) > 2
    ahead, spread = xs - xs.mean(), float(((xs - xs.mean()) ** 2).sum())
    slope = float((ahead * ys).sum()) / spread
    rest = ys - ys.mean() - slope * ahead
    deviation = math.sqrt(float((rest**2).sum()) / (len(xs) - 2))
    value = float(ys.mean()) + slope * (at - float(xs.mean()))
    reach = student_quantile(len(xs) - 2) * deviation
    reach *= math.sqrt(1 + 1 / len(xs) + (at - float(xs.mean())) ** 2 / spread)
    return slope, Prediction(value, value - reach, value + reach), deviation


def power_law(compute: Sequence[float], loss: Sequence[float], at: float) -> PowerLaw:
    """Fit a power law of the loss over compute, with an offset if there are more than three points.

    The interval of a new measurement is that of the profile likelihood: those values that, as one more point, would
    raise the least sum of squares by no more than Student's t allows. For a straight line it is the usual interval.

    Args:
        compute, loss: of at least three points, all positive.
        at: the compute at which to predict.
    """
    if len(compute) == 3:
        slope, expected, deviation = line([*map(math.log, compute)], [*map(math.log, loss)], math.log(at))
        return PowerLaw(0.0, -slope, expected.exponential(), deviation * float(np.mean(loss)))
    scale = math.exp(float(np.mean(np.log(compute))))
    xs, new = np.array(compute) / scale, at / scale
    ys = np.array(loss)
    offset, factor, exponent, squares = _least_squares(xs, ys)
    value, degrees = offset + factor * new**-exponent, len(xs) - 3
    allowed = squares * (1 + student_quantile(degrees) ** 2 / degrees)

    def fits(candidate: float) -> bool:
        return _least_squares(np.append(xs, new), np.append(ys, candidate))[3] <= allowed

    low = 0.0 if fits(0.0) else _bisect(fits, 0.0, value)
    high = _bisect(lambda candidate: not fits(candidate), value, 10 * float(ys.max()))
    return PowerLaw(offset, exponent if factor else 0.0, Prediction(value, low, high), math.sqrt(squares / degrees))


def _least_squares(xs: Floats, ys: Floats) -> tuple[float, float, float, float]:
    """Return offset, factor and exponent of the curve with the least sum of squares, neither negative, and that sum."""
    powers = xs[None, :] ** -_EXPONENTS[:, None]
    ahead = powers - powers.mean(1, keepdims=True)
    factors = np.maximum((ahead * ys).sum(1) / (ahead**2).sum(1), 0)
    offsets = ys.mean() - factors * powers.mean(1)
    through_zero = offsets < 0
    factors = np.where(through_zero, (powers * ys).sum(1) / (powers**2).sum(1), factors)
    offsets = np.where(through_zero, 0.0, offsets)
    squares = ((ys - offsets[:, None] - factors[:, None] * powers) ** 2).sum(1)
    best = int(squares.argmin())
    return float(offsets[best]), float(factors[best]), float(_EXPONENTS[best]), float(squares[best])


def lowest_of_parabola(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return where the parabola through the lowest point and its two neighbours is lowest; None if it has only one."""
    if len(y) < 3:
        return None
    lowest = min(range(len(y)), key=lambda i: y[i])
    if not 0 < lowest < len(y) - 1:
        return None
    (x0, x1, x2), (y0, y1, y2) = x[lowest - 1 : lowest + 2], y[lowest - 1 : lowest + 2]
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    bend = (right - left) / (x2 - x0)
    return x1 if bend <= 0 else (x0 + x1) / 2 - left / (2 * bend)


def _bisect(is_past: Callable[[float], bool], low: float, high: float) -> float:
    """Return from where on something holds that does not at `low` and does at `high`."""
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if is_past(middle) else (middle, high)
    return (low + high) / 2


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
