"""Make long curves short enough to draw, without hiding what lies between. history -> thinning -> {curves, frame}."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Thinned:
    """A curve of which each point stands for a stretch of consecutive points.

    Attributes:
        x, y: [points], the stretch's last x and the mean of its finite values; NaN where it has none.
        low, high: [points], the least and greatest finite value of the stretch.
        each: number of points in a stretch; 1 if every point is there.
    """

    x: Floats
    y: Floats
    low: Floats
    high: Floats
    each: int


def thin(x: Floats, y: Floats, most: int) -> Thinned:
    """Thin a curve to at most `most` points, all of which stand for equally many but the last.

    Args:
        x, y: [values]; NaN and infinity in y are gaps.
    """
    each = max(1, -(-len(x) // most))
    if each == 1:
        gaps = np.where(np.isfinite(y), y, np.nan)
        return Thinned(x, gaps, gaps, gaps, 1)
    count = -(-len(x) // each)
    padded = np.full(count * each, np.nan)
    padded[: len(y)] = np.where(np.isfinite(y), y, np.nan)
    rows = padded.reshape(count, each)
    there = np.isfinite(rows)
    some = there.any(axis=1)
    low = np.where(some, np.where(there, rows, np.inf).min(axis=1), np.nan)
    high = np.where(some, np.where(there, rows, -np.inf).max(axis=1), np.nan)
    # Scaled first, since the sum of a run that explodes may pass the range of floats.
    mean = np.where(there, rows / np.maximum(there.sum(axis=1), 1)[:, None], 0).sum(axis=1)
    return Thinned(
        x[np.minimum(np.arange(1, count + 1) * each, len(x)) - 1], np.where(some, mean, np.nan), low, high, each
    )
