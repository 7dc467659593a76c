"""Which record of which source is read where and when: pure functions of (record tables, config, seed).

index -> plan -> lane.

Randomness is counter-based: a hash of what a thing is called, never a generator with a state.
"""

import heapq
import itertools
from fractions import Fraction
from functools import lru_cache

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

MIXING_PERIOD = 1 << 14  # rows after which the sequence of sources repeats; a weight is exact to 1 in this
MAX_SEGMENT_BYTES = 16 << 20
SEGMENTS_PER_LANE = 8  # at least this many per epoch, where the source is large enough
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: multiples of it spread evenly over the ring


def key_of(*parts: int | str) -> int:
    """A 64-bit key for a thing named by `parts`."""
    return xxhash.xxh3_64_intdigest(msgspec.json.encode(parts))


def permutation(key: int, size: int) -> Ints:
    """The keyed permutation of range(size): numbers in the order of their hashes (splitmix64), ties by number."""
    hashes = mixed(np.uint64(key) + np.arange(1, size + 1, dtype=np.uint64) * np.uint64(GOLDEN))
    return np.argsort(hashes, kind="stable")


def mixed(x: Hashes) -> Hashes:
    """splitmix64's finalizer; Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def greedy_groups(offsets: Ints, bounds: Ints, limit: int) -> Ints:
    """Groups consecutive cells, each group as long as it stays within `limit` bytes; a larger cell is its own group.

    Args:
        offsets: int64 [cells + 1], rising: where each cell begins, and where the last one ends, in bytes.
        bounds: int64 [n + 1], rising: cells at which a group must begin (a shard's first); the last is where all end.
        limit: bytes per group.
    Returns: int64 [groups], the first cell of each group.
    """
    current, stop = bounds[:-1], bounds[1:]
    starts = []
    # One step makes one group in each shard: as many steps as the longest shard has groups, not as there are groups.
    while True:
        unfinished = current < stop
        current, stop = current[unfinished], stop[unfinished]
        if not current.size:
            break
        starts.append(current)
        reach = np.searchsorted(offsets, offsets[current] + limit, side="right") - 1
        current = np.minimum(np.maximum(reach, current + 1), stop)
    return np.sort(np.concatenate(starts)) if starts else np.zeros(0, np.int64)


def integer_weights(weights: tuple[float, ...], period: int = MIXING_PERIOD) -> tuple[int, ...]:
    """Shares of `period` by the largest remainder, of equal ones the earlier; a weight above 0 gets at least 1."""
    exact = [Fraction(str(weight)) for weight in weights]
    quotas = [weight * period / sum(exact) for weight in exact]
    shares = [max(int(quota), int(quota > 0)) for quota in quotas]
    by_remainder = sorted(range(len(shares)), key=lambda i: (int(quotas[i]) - quotas[i], i))
    for i in by_remainder[: max(0, period - sum(shares))]:
        shares[i] += 1
    while sum(shares) > period:  # many weights were lifted to 1
        shares[shares.index(max(shares))] -= 1
    return tuple(shares)


@lru_cache(maxsize=64)
def mixing_sequence(shares: tuple[int, ...]) -> npt.NDArray[np.int32]:
    """The order in which a lane draws from sources: earliest deadline first.

    Source i's k-th row may come at slot floor(k * P / share) and must come before ceil((k + 1) * P / share), P being
    the period, sum(shares). Every prefix then holds each source's share of it to less than one row, every stretch to
    less than two.

    Returns: int32 [P], source numbers.
    Source: Liu, Layland 1973 (EDF); Tijdeman 1980, "The chairman assignment problem".
    """
    period = sum(shares)
    waiting = [(0, i, 0) for i, share in enumerate(shares) if share]  # (first slot, source, its row k)
    ready: list[tuple[int, int, int]] = []  # (deadline, source, k)
    sequence = np.empty(period, np.int32)
    heapq.heapify(waiting)
    for slot in range(period):
        while waiting and waiting[0][0] <= slot:
            _, i, k = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(k + 1) * period // shares[i]), i, k))
        _, i, k = heapq.heappop(ready)
        sequence[slot] = i
        heapq.heappush(waiting, ((k + 1) * period // shares[i], i, k + 1))
    return sequence


def lane_phase(lane: int, period: int = MIXING_PERIOD) -> int:
    """Where a lane starts in the mixing sequence: floor(frac(lane / golden ratio) * period), in integers."""
    return ((lane * GOLDEN) % (1 << 64) * period) >> 64


def source_of_row(lane: int, row: int, shares: tuple[int, ...]) -> int:
    """The source that a lane draws its row from, counted since the weights last changed."""
    period = sum(shares)
    return int(mixing_sequence(shares)[(lane_phase(lane, period) + row) % period])


class WindowPlan(msgspec.Struct, frozen=True):
    """Consecutive records of one segment: what a window is made of."""

    shard: int  # number in the source
    first_record: int  # number in the shard, counted from 0
    num_records: int
    start: int  # raw offset in the shard
    stop: int


class SourcePlan:
    """One source's records, cut into segments and windows, dealt to lanes for any number of epochs."""

    def __init__(self, name: str, tables: list[Ints], window_limit: int, lanes: int, seed: int) -> None:
        """
        Args:
            name: of the source; its order depends on it.
            tables: per shard int64 [cells + 1, 2]: each cell's first record and raw offset; last, the shard's end.
            window_limit: raw bytes per window.
            lanes: V.
            seed: of the run.
        """
        self.name, self._lanes, self._seed = name, lanes, seed
        self._window_limit = window_limit
        self._tables = tables
        self._shard_cells = np.cumsum([0, *(len(table) - 1 for table in tables)])  # each shard's first cell
        # Offsets in the concatenation of all shards, so that one search serves them all.
        bases = np.cumsum([0, *(int(table[-1, 1]) for table in tables)])
        offsets = [base + table[:-1, 1] for base, table in zip(bases[:-1], tables, strict=True)]
        self._global = np.concatenate([*offsets, bases[-1:]])
        self.raw_bytes = int(bases[-1])
        self.segment_bytes = max(window_limit, min(self.raw_bytes // (SEGMENTS_PER_LANE * lanes), MAX_SEGMENT_BYTES))
        self._segments = greedy_groups(self._global, self._shard_cells, self.segment_bytes)
        self._permutation = lru_cache(maxsize=8)(self._permute)

    @property
    def num_segments(self) -> int:
        return len(self._segments)

    def _permute(self, epoch: int) -> Ints:
        return permutation(key_of("segments", self._seed, self.name, epoch), self.num_segments)

    def segments_of_lane(self, lane: int, max_epochs: int) -> int:
        """How many segments a lane is dealt in that many epochs."""
        return len(range(lane, max_epochs * self.num_segments, self._lanes))

    def segment_of(self, lane: int, q: int) -> tuple[int, int]:
        """(epoch, segment) of a lane's q-th: number q * V + lane in the concatenated permutations of the epochs."""
        epoch, position = divmod(q * self._lanes + lane, self.num_segments)
        return epoch, int(self._permutation(epoch)[position])

    def windows_of(self, segment: int) -> list[WindowPlan]:
        """The windows of a segment, in the order of its records."""
        first = int(self._segments[segment])
        shard = int(np.searchsorted(self._shard_cells, first, side="right")) - 1
        stop = int(self._shard_cells[shard + 1])
        if segment + 1 < self.num_segments:
            stop = min(stop, int(self._segments[segment + 1]))
        starts = greedy_groups(self._global, np.array([first, stop]), self._window_limit)
        marks = [self._mark(int(cell), shard) for cell in (*starts, stop)]
        return [
            WindowPlan(shard, record, next_record - record, offset, next_offset)
            for (record, offset), (next_record, next_offset) in itertools.pairwise(marks)
        ]

    def _mark(self, cell: int, shard: int) -> tuple[int, int]:
        """(record, raw offset) at which a cell of a shard begins, or at which the shard ends."""
        record, offset = self._tables[shard][cell - int(self._shard_cells[shard])].tolist()
        return record, offset
