"""The source of each row of a lane: weights -> an endless sequence of sources. segments, mixing -> lane.

Weights are shares of rows, met exactly and soon, with integers alone. A *level* is a sequence of P slots of which each
source has a whole number, floor(weight * P). The remaining slots defer to the next level, whose weights are the
fractions that rounding down has cut off, and so on; the last level rounds to whole numbers. A lane repeats each level
from a phase of its own, so that a batch is mixed across its lanes.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Slots = npt.NDArray[np.int16]

# By plan version: (P, levels). A share is exact to 1 in 16,384 under version 1, and to (S / 1,024)^3 / 1,024 for S
# sources under version 2: each level but the last leaves fewer than S of its slots to the next. A period of 1,000 would
# fit decimal weights on one level, but their sequence would repeat every few slots, in step with the lanes' phases.
RULES = {1: (1 << 14, 1), 2: (1 << 10, 4)}
# Each level has its own multiplier: 2^64 times the fractional parts of the golden ratio and of the roots of 2, 3 and 5,
# no integer combination of which vanishes. So the lanes' phases cover the levels' periods jointly and evenly.
_PHASES = (0x9E3779B97F4A7C15, 0x6A09E667F3BCC908, 0xBB67AE8584CAA73B, 0x3C6EF372FE94F82B)
_MIXES_KEPT = 2048  # lanes run out of sources one by one, and each may need its own mix for a while


def integer_weights(weights: Sequence[Fraction], period: int) -> tuple[int, ...]:
    """Divide `period` by largest remainder, ties to the earlier; a weight above 0 gets at least 1."""
    quotas = _quotas(weights, period)
    shares = [max(int(quota), int(quota > 0)) for quota in quotas]
    by_remainder = sorted(range(len(shares)), key=lambda i: (int(quotas[i]) - quotas[i], i))
    for i in by_remainder[: max(0, period - sum(shares))]:
        shares[i] += 1
    while sum(shares) > period:  # many weights were raised to 1
        shares[shares.index(max(shares))] -= 1
    return tuple(shares)


def _quotas(weights: Sequence[Fraction], period: int) -> list[Fraction]:
    each = period / sum(weights, Fraction())  # computed once: with many sources a sum of fractions is slow
    return [weight * each for weight in weights]


def level_shares(weights: Sequence[Fraction], period: int, levels: int) -> list[tuple[int, ...]]:
    """Return the slots of each source on each level; a level that another follows ends with the latter's slots."""
    found: list[tuple[int, ...]] = []
    while len(found) < levels - 1:
        quotas = _quotas(weights, period)
        whole = [int(quota) for quota in quotas]
        left = period - sum(whole)
        if left == 0:
            return [*found, tuple(whole)]
        found.append((*whole, left))
        weights = [quota - slots for quota, slots in zip(quotas, whole, strict=True)]
    return [*found, integer_weights(weights, max(period, len(weights)))]  # at least one slot for each


def mixing_sequence(shares: tuple[int, ...]) -> Slots:
    """Order one level by earliest deadline.

    The k-th slot of number i may come no earlier than floor(k * P / share) and must come before
    ceil((k + 1) * P / share), where P is the period, sum(shares). Every prefix then meets each number's share of it to
    within one slot, and every stretch to within two.

    Returns: int16 [P], positions in `shares`.
    Source: Liu, Layland 1973 (EDF); Tijdeman 1980, "The chairman assignment problem".
    """
    period = sum(shares)
    waiting = [(0, i, 0) for i, share in enumerate(shares) if share]  # (first slot, number, its slot k)
    ready: list[tuple[int, int, int]] = []  # (deadline, number, k)
    sequence = np.empty(period, np.int16)
    heapq.heapify(waiting)
    for slot in range(period):
        while waiting and waiting[0][0] <= slot:
            _, i, k = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(k + 1) * period // shares[i]), i, k))
        _, i, k = heapq.heappop(ready)
        sequence[slot] = i
        heapq.heappush(waiting, ((k + 1) * period // shares[i], i, k + 1))
    return sequence


def lane_phase(lane: int, period: int, level: int = 0) -> int:
    """Return where a lane starts in a level's sequence: floor(frac(lane * multiplier) * period), in integers."""
    return ((lane * _PHASES[level]) % (1 << 64) * period) >> 64


class _Level:
    """One level's sequence, and the count of each number in any stretch of its endless repetition."""

    def __init__(self, shares: tuple[int, ...]) -> None:
        self.shares, self.period = shares, sum(shares)
        self.sequence = mixing_sequence(shares)
        self._ends = np.cumsum(shares)
        self._slots = np.argsort(self.sequence, kind="stable").astype(np.int16)  # slots of number 0, of number 1, ...

    def count(self, number: int, start: int, slots: int) -> int:
        """Count how often a number occurs in `slots` slots from `start`, which is below the period."""
        slots_of_number = self._slots[self._ends[number] - self.shares[number] : self._ends[number]]
        turns, place = divmod(start + slots, self.period)
        before, until = np.searchsorted(slots_of_number, (start, place)).tolist()
        return turns * self.shares[number] + until - before


class Mix:
    """The sequence of sources for one set of weights, which every lane reads from a phase of its own."""

    def __init__(self, weights: tuple[float, ...], version: int) -> None:
        """Build the levels.

        Args:
            weights: weights of the sources, at least one of them above 0; exact as decimals.
            version: plan version.
        """
        exact = [Fraction(str(weight)) for weight in weights]
        self._shares = [weight / sum(exact) for weight in exact]
        self._levels = [_Level(shares) for shares in level_shares(exact, *RULES[version])]
        self._next_level = len(weights)  # in a sequence, this number defers to the next level

    def source_of(self, lane: int, row: int) -> int:
        """Return the source of a lane's row, counted from where these weights began to apply."""
        for depth, level in enumerate(self._levels):
            start = lane_phase(lane, level.period, depth)
            source = int(level.sequence[(start + row) % level.period])
            if source != self._next_level:
                return source
            row = level.count(source, start, row)
        raise AssertionError("the last level defers to no other")

    def drawn(self, lane: int, source: int, rows: int) -> int:
        """Count how many of a lane's first `rows` rows come from a source."""
        total = 0
        for depth, level in enumerate(self._levels):
            start = lane_phase(lane, level.period, depth)
            total += level.count(source, start, rows)
            if len(level.shares) > self._next_level:
                rows = level.count(self._next_level, start, rows)
        return total

    def row_of_use(self, lane: int, source: int, row: int, uses: int) -> int | None:
        """Find a lane's first row, from `row` on, that draws from a source after `uses` others do; None = never."""
        if not self._shares[source]:
            return None
        goal = self.drawn(lane, source, row) + uses  # drawn before the row that is sought
        reach = math.ceil((uses + 1) / self._shares[source])
        low = row
        while self.drawn(lane, source, row + reach) <= goal:
            low, reach = row + reach, 2 * reach
        high = row + reach
        while high - low > 1:  # more than `goal` are drawn within the first `high` rows, not within the first `low`
            middle = (low + high) // 2
            low, high = (low, middle) if self.drawn(lane, source, middle) > goal else (middle, high)
        return low


@lru_cache(maxsize=_MIXES_KEPT)
def mix_of(weights: tuple[float, ...], version: int) -> Mix | None:
    """Return the mix of these weights; None if all of them are 0."""
    return Mix(weights, version) if any(weights) else None
