"""One stage of a run as one rank reads it: its lanes, and the rows that fall on them. lane, prefetch -> leg -> loader.

Row j of the run, counted from where the number of lanes was chosen, is row j div V of lane j mod V; a stage begins at
row `first_row`, and its global batch k is rows first_row + k G .. first_row + (k + 1) G. A rank has every dp_size-th
row of a batch. It reads every lane that one of them falls on, and passes over the rows in it that other ranks have.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from shards.arrays import Ints
from shards.lane import Draw, Lane, Stream
from shards.plan.cursor import LoaderState
from shards.prefetch import Prefetcher
from shards.source import Source
from shards.stages import Stage
from shards.windows.worker_pool import Pool

_FEW_LANES = 256
LARGE_RUN_BYTES = 100 * 10**9  # raw bytes
_SHARED_LANE_BYTES = 10**9  # raw bytes above which lanes read by several ranks are worth a warning

_logger = logging.getLogger(__name__)


class Ranks(NamedTuple):
    """A rank's place among the data-parallel ranks, whose number divides every stage's batch and so its first row."""

    rank: int
    size: int

    def lanes(self, num_lanes: int) -> range:
        """Return the lanes that this rank reads in a stage: those with the same remainder modulo `stride`."""
        stride = self.stride(num_lanes)
        return range(self.rank % stride, num_lanes, stride)

    def stride(self, num_lanes: int) -> int:
        """Return the distance between the lanes that one rank reads."""
        return math.gcd(num_lanes, self.size)


class Leg:
    """The lanes of one rank, or some others, from a state on, as far as the state's stage goes.

    Args:
        stage: the stage.
        end: the step at which the next one begins; None for the last.
        state: where these lanes stand.
        sources: the stage's, planned.
    """

    def __init__(
        self,
        stage: Stage,
        end: int | None,
        state: LoaderState,
        sources: Sequence[Source],
        ranks: Ranks,
        pool: Pool,
    ) -> None:
        self.stage, self.sources = stage, sources
        self._ranks, self._num_lanes, self._first_row = ranks, state.num_lanes, state.first_row
        # From the stage's first step on; changes of weights up to then are in its sources already
        self._weightings = [
            (max(step, stage.step), weights) for step, weights in stage.data.weightings() if end is None or step < end
        ]
        self.lanes: dict[int, Lane] = {}
        read = [self._records_before(state, i) for i in range(len(sources))]
        for name, cursor in state.lanes.items():
            number = int(name)
            streams = [
                Stream(source, number, cursor.sources[i], int(read[i][number]), cursor.carried.get(str(i), ()))
                for i, source in enumerate(sources)
            ]
            self.lanes[number] = Lane(number, streams, cursor.rows, cursor.mixing_rows, stage.data.plan)
        mixes = [(self._row_of(step), weights) for step, weights in self._weightings]
        self._prefetcher = Prefetcher(pool, list(self.lanes.values()), state.num_lanes, mixes, stage.data)
        self._gap_announced: int | None = None  # step of weight_changes at which the last announced gap ends

    def _records_before(self, state: LoaderState, number: int) -> Ints:
        """Count the records of a source in the segments that this rank's lanes have finished: int64 [V]."""
        counts = np.zeros(state.num_lanes, np.int64)
        for lane, cursor in state.lanes.items():
            counts[int(lane)] = cursor.sources[number].segment
        return self.sources[number].plan.read_before(counts)[0]

    def draw(self, first: int) -> tuple[list[Draw], bool]:
        """Draw this rank's rows of the batch that begins at row `first`; return also whether its lanes gave none."""
        draws: list[Draw] = []
        is_empty = True
        for slot, draw in self.draws(first):
            is_empty = is_empty and draw.row is None
            if slot % self._ranks.size == self._ranks.rank:
                draws.append(draw)
        return draws, is_empty

    def draws(self, first: int) -> Iterator[tuple[int, Draw]]:
        """Draw the rows of the batch from row `first` on that fall on these lanes; yield each with its slot."""
        for slot in range(self.stage.global_batch_size):
            if (first + slot) % self._num_lanes in self.lanes:
                yield slot, self._draw(first + slot)

    def _draw(self, j: int) -> Draw:
        lane = self.lanes[j % self._num_lanes]
        weights, step = self._weights(j)
        before = max(j - self._num_lanes, self._first_row)  # the lane's previous row in this stage, or its beginning
        changed = self._weights(before)[1] < step
        draw = lane.draw(weights, changed, self._prefetcher.take)
        self._prefetcher.fill()
        return draw

    def reported(self) -> Iterator[Lane]:
        """Yield the lanes that this rank reports on, so that lanes shared by several ranks are counted once."""
        return (lane for number, lane in self.lanes.items() if number % self._ranks.size == self._ranks.rank)

    def epochs(self) -> dict[str, float]:
        """Return how often each source has been read through, as far as the lanes go that this rank reports on."""
        return {
            source.config.name: sum(lane.streams[i].progress() for lane in self.reported()) / source.plan.num_records
            for i, source in enumerate(self.sources)
        }

    def is_dry(self, j: int) -> bool:
        """Return whether, from row j on, every lane of this rank is out of sources with a weight."""
        left = [self._weights(j)[0], *(weights for step, weights in self._weightings if self._row_of(step) > j)]
        return all(lane.is_dry(left) for lane in self.lanes.values())

    def _weights(self, j: int) -> tuple[tuple[float, ...], int]:
        """Return the sources' weights at row j and the step from which they apply."""
        step = self._step_of(j)
        return next((weights, start) for start, weights in reversed(self._weightings) if start <= step)

    def _step_of(self, j: int) -> int:
        return self.stage.step + (j - self._first_row) // self.stage.global_batch_size

    def _row_of(self, step: int) -> int:
        return self._first_row + (step - self.stage.step) * self.stage.global_batch_size

    def announce_gap(self, j: int) -> None:
        """Warn once per gap if, at row j, no lane of this rank has a row left before the weights change."""
        change = next((step for step, _ in self._weightings if self._row_of(step) > j), None)
        weights, _ = self._weights(j)
        if change in (None, self._gap_announced) or not all(lane.is_dry([weights]) for lane in self.lanes.values()):
            return
        self._gap_announced = change
        _logger.warning(
            "the sources in use have run out at step %d; batches are empty up to step %d, where data.weight_changes "
            "brings in others: move that step earlier, or raise max_epochs",
            self._step_of(j),
            change,
        )


def announce_lanes(num_lanes: int, ranks: Ranks, sources: Sequence[Source]) -> None:
    """Log the consequences of the number of lanes, given the sources that are drawn from."""
    raw_bytes = sum(source.plan.raw_bytes for source in sources)
    if num_lanes < _FEW_LANES and raw_bytes > LARGE_RUN_BYTES:
        _logger.warning(
            "data.lanes=%d: a batch is only as diverse as its lanes; %d or more suit a run of this size",
            num_lanes,
            _FEW_LANES,
        )
    sharing = ranks.size // ranks.stride(num_lanes)
    if sharing > 1:
        _logger.log(
            logging.WARNING if raw_bytes > _SHARED_LANE_BYTES else logging.INFO,
            "data.lanes=%d on %d data-parallel ranks: %d ranks read each lane, so each document is tokenized %d "
            "times; that takes more workers, and nothing else changes",
            num_lanes,
            ranks.size,
            sharing,
            sharing,
        )
    passes = [source.config.max_epochs for source in sources]
    dealt = [
        0 if limit is None else limit * source.plan.num_segments for source, limit in zip(sources, passes, strict=True)
    ]
    if None not in passes and max(dealt) < num_lanes:
        _logger.warning(
            "data.lanes=%d: %d of them get no segment within max_epochs (%s) and give only empty rows; lower "
            "data.lanes, or leave it out",
            num_lanes,
            num_lanes - max(dealt),
            ", ".join(f"{source.config.name} has {source.plan.num_segments}" for source in sources),
        )
