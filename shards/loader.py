"""Shards -> batches: the streaming loader.

    index/, preparation     shards -> indexes, made once
    plan/segments, source   indexes, seed -> segments, dealt to lanes; windows          pure
    windows/                a window -> rows; in worker processes                       pure
    plan/mixing, lane       lane v: its row n, from the source that is due
    loader                  row j of the run: lane j mod V, that lane's row j div V
                            global batch k: rows k G .. (k + 1) G; rank r has the rows j with j mod dp_size == r

A rank reads every lane that one of its rows falls on and skips the rows in it that belong to other ranks. A global
batch depends on the shards, the tokenizer, the config, the seed and k; not on ranks, workers, restarts or timing.
"""

from __future__ import annotations

import itertools
import logging
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from types import TracebackType
from typing import Self

import numpy as np

from shards import preparation
from shards.arrays import Ints
from shards.batch import Batch
from shards.config import DataConfig, check_split
from shards.errors import CheckpointError, ShardError
from shards.fingerprint import fingerprint
from shards.forecast import Forecast, forecast
from shards.lane import Draw, Lane, Stream
from shards.plan.cursor import LOADER_STATE_VERSION, Cursor, LaneCursor, LoaderState
from shards.prefetch import Prefetcher
from shards.preparation import Prepared
from shards.records import texts
from shards.source import Source
from shards.tokenize.tokenizer import Tokenizer
from shards.windows.recipe import Tools
from shards.windows.window import WindowMaker
from shards.windows.worker_pool import InProcess, Pool, WorkerPool

_FEW_LANES = 256
LARGE_RUN_BYTES = 100 * 10**9  # raw bytes
_SHARED_LANE_BYTES = 10**9  # raw bytes above which lanes read by several ranks are worth a warning

_logger = logging.getLogger(__name__)


class Loader:
    """The iterator over the batches of one data-parallel rank; a context manager that ends its workers."""

    def __init__(
        self,
        config: DataConfig,
        global_batch_size: int,
        seed: int = 0,
        dp_rank: int = 0,
        dp_size: int = 1,
        prepared: Prepared | None = None,
    ) -> None:
        """Open the sources at the run's start.

        Args:
            config: the data config.
            global_batch_size: rows per optimizer step, over all ranks.
            seed: seed of all shuffling.
            dp_rank, dp_size: this rank and the number of ranks, which together yield the same global batches for any
            dp_size. prepared: what `prepare` returned for this config, on any rank: then no shard is examined before it
            is read.
                None = all shards are examined now and indexed where necessary.
        Raises: ConfigError if the batch cannot be split over the ranks; ShardError if a shard is missing or damaged.
        """
        assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
        check_split(global_batch_size, dp_size)
        self._config, self._seed = config, seed
        self._global_batch_size, self._dp_rank, self._dp_size = global_batch_size, dp_rank, dp_size
        tokenizer = Tokenizer(config.tokenizer, config.bos, config.eos)
        if tokenizer.obstacle and dp_rank == 0:
            slower = "encodes documents whole, several times slower than word by word"
            _logger.warning("%s %s: %s", config.tokenizer, slower, tokenizer.obstacle)
        if prepared is None:
            shards = [preparation.source_shards(config, source) for source in config.sources]
            for source, found in zip(config.sources, shards, strict=True):
                texts.sample_of(config, source, [shard.path for shard in found])
        else:
            pairs = zip(config.sources, prepared.manifests, strict=True)
            shards = [preparation.prepared_shards(config, source, found) for source, found in pairs]
        self._stages = config.weight_stages()
        sizes = [sum(shard.index.raw_bytes for shard in found) for found in shards]
        drawn = [any(weights[i] > 0 for _, weights in self._stages) for i in range(len(shards))]
        self.num_lanes = config.num_lanes(global_batch_size, sum(itertools.compress(sizes, drawn)))
        # All rows of a rank fall on the lanes whose numbers have the same remainder modulo this.
        self._stride = math.gcd(self.num_lanes, dp_size)
        self._sources = [Source(config, i, found, self.num_lanes, seed) for i, found in enumerate(shards)]
        if dp_rank == 0:
            self._announce_lanes(list(itertools.compress(self._sources, drawn)))
        decontaminator = preparation.prepared_filter(config, prepared and prepared.filter)
        self.fingerprint = fingerprint(config, self._sources, tokenizer, decontaminator, self.num_lanes, seed)
        self._tools = Tools(tokenizer, decontaminator)
        recipe = self._tools.recipe()
        self._pool: Pool
        self._pool = WorkerPool(config, recipe) if config.num_workers else InProcess(config, recipe, self._tools)
        weakref.finalize(self, self._pool.close)  # runs even if the loader is dropped or the interpreter exits
        self.ended = False  # all lanes of this rank are exhausted
        self._gap_announced: int | None = None  # step of weight_changes at which the last announced gap ends
        self._lanes: dict[int, Lane]
        self._state = self._first_state()
        self._torn = True  # the lanes may be elsewhere than the state says
        self._put_back()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. Windows made ahead are thrown away, since a state consists of cursors alone."""
        self._pool.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """Return the next batch; after an error or an interrupt, the batch that could not be made, from its first row.

        Raises: StopIteration when all lanes of this rank are exhausted, all sources having reached their max_epochs;
            other ranks may have rows left. ShardError if that happens before the first row.
        """
        self._restore()
        state, batch, ended = self._make_batch(self._state.rows)
        # A batch without rows is no step: its lanes are exhausted, others are not. Only all ranks together can tell.
        while self._dp_size == 1 and not batch.num_rows and not ended:
            state, batch, ended = self._make_batch(state.rows)
        if ended:
            if self._dp_size == 1:
                check_not_empty(self.rows_drawn, [source.name for source in self._config.sources])
            raise StopIteration
        self._state, self._torn = state, False  # last, since an interrupt before this must not lose the batch
        return batch

    def next_batch(self) -> Batch:
        """Return the next batch, even one without rows, and without end, as other ranks may have rows left."""
        self._restore()
        state, batch, ended = self._make_batch(self._state.rows)
        self._state, self.ended, self._torn = state, ended, False
        return batch

    def _restore(self) -> None:
        """Put the lanes back if the last batch could not be made, and mark them as torn while one is being made."""
        if self._torn:
            self._put_back()
        self._torn = True

    def _make_batch(self, first: int) -> tuple[LoaderState, Batch, bool]:
        """Make the batch from row `first` of the run: (the lanes' state after it, the batch, True if all are dry)."""
        draws: list[Draw] = []
        is_empty = True
        for j in range(first + self._dp_rank % self._stride, first + self._global_batch_size, self._stride):
            draw = self._draw(j)
            is_empty = is_empty and draw.row is None
            if j % self._dp_size == self._dp_rank:
                draws.append(draw)
        state = self._snapshot(first + self._global_batch_size)
        slots = range(self._dp_rank, self._global_batch_size, self._dp_size)
        skipped = _skipped_in(self._reported())
        batch = Batch(draws, slots, self._sources, self._config.seq_len, state, skipped, self._epochs())
        self._check_skipped(batch)
        ended = is_empty and self._is_dry(first)
        if is_empty and not ended:
            self._announce_gap(first)
        return state, batch, ended

    @property
    def rows_drawn(self) -> int:
        """Number of non-empty rows since the run's start in the lanes that this rank reports on: sum it over ranks."""
        return sum(stream.cursor.rows_drawn for lane in self._reported() for stream in lane.streams)

    def forecast(self, steps: int | None) -> Forecast:
        """Forecast how long the data will last, the same at every start of a run; see `forecast.forecast`."""
        with closing(WindowMaker(self._config, self._tools)) as maker:  # not the rows' maker, which counts replays
            return forecast(self._config, maker, self._sources, self.num_lanes, self._global_batch_size, steps)

    def state_dict(self) -> dict[str, object]:
        """Return the cursors of this rank's lanes after the last batch, as JSON-able values.

        `merge_states` joins the states of all ranks.
        """
        return self._state.to_dict()

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Resume from a state that holds at least this rank's lanes, whatever number of ranks made it.

        Raises: CheckpointError if it belongs to another run or version, or lacks a lane.
        """
        loaded = LoaderState.from_dict(state)
        names = tuple(source.name for source in self._config.sources)
        for key, theirs, ours in (("lanes", loaded.num_lanes, self.num_lanes), ("sources", loaded.source_names, names)):
            if theirs != ours:
                raise CheckpointError(f"loader state was made with data.{key}={theirs}, now it is {ours}; set it back")
        lanes = self._lane_names()
        if missing := [lane for lane in lanes if lane not in loaded.lanes]:
            raise CheckpointError(
                f"loader state lacks lane {missing[0]}, which rank {self._dp_rank} of {self._dp_size} reads; "
                "merge the states of all ranks that saved it"
            )
        mine = {lane: loaded.lanes[lane] for lane in lanes}
        self._torn, self.ended = True, False
        self._state = LoaderState(loaded.version, loaded.rows, loaded.num_lanes, loaded.source_names, mine)
        self._put_back()

    def _first_state(self) -> LoaderState:
        start = LaneCursor(0, 0, (Cursor(),) * len(self._sources))
        lanes = dict.fromkeys(self._lane_names(), start)
        names = tuple(source.name for source in self._config.sources)
        return LoaderState(LOADER_STATE_VERSION, 0, self.num_lanes, names, lanes)

    def _lane_names(self) -> list[str]:
        """List the lanes that this rank reads, by their names in a state."""
        return [str(lane) for lane in range(self._dp_rank % self._stride, self.num_lanes, self._stride)]

    def _reported(self) -> Iterator[Lane]:
        """Yield the lanes that this rank reports on, so that lanes shared by several ranks are counted once."""
        return (lane for number, lane in self._lanes.items() if number % self._dp_size == self._dp_rank)

    def _put_back(self) -> None:
        """Put the lanes where the state says, whatever was drawn, requested or interrupted since."""
        self._torn = True  # until the end, since this may be interrupted too
        self._pool.clear()
        self._lanes = {}
        read = [self._records_before(i, source) for i, source in enumerate(self._sources)]
        for number, cursor in self._state.lanes.items():
            streams = [
                Stream(source, int(number), cursor.sources[i], int(read[i][int(number)]))
                for i, source in enumerate(self._sources)
            ]
            self._lanes[int(number)] = Lane(int(number), streams, cursor.rows, cursor.mixing_rows, self._config.plan)
        stages = [(step * self._global_batch_size, weights) for step, weights in self._stages]
        lanes = list(self._lanes.values())
        self._prefetcher = Prefetcher(self._pool, lanes, self.num_lanes, stages, self._config)
        self._torn = False

    def _records_before(self, number: int, source: Source) -> Ints:
        """Count the records of a source in the segments that this rank's lanes have finished: int64 [V]."""
        counts = np.zeros(self.num_lanes, np.int64)
        for lane, cursor in self._state.lanes.items():
            counts[int(lane)] = cursor.sources[number].segment
        return source.plan.read_before(counts)[0]

    def _draw(self, j: int) -> Draw:
        lane = self._lanes[j % self.num_lanes]
        weights, step = self._weights(j)
        changed = j >= self.num_lanes and self._weights(j - self.num_lanes)[1] < step
        draw = lane.draw(weights, changed, self._prefetcher.take)
        self._prefetcher.fill()
        return draw

    def _is_dry(self, j: int) -> bool:
        """Return whether, from row j of the run on, every lane of this rank is out of sources with a weight."""
        left = [self._weights(j)[0], *(weights for step, weights in self._stages if step * self._global_batch_size > j)]
        return all(lane.is_dry(left) for lane in self._lanes.values())

    def _weights(self, j: int) -> tuple[tuple[float, ...], int]:
        """Return the sources' weights at row j and the step from which they apply."""
        step = j // self._global_batch_size
        return next((weights, start) for start, weights in reversed(self._stages) if start <= step)

    def _snapshot(self, rows: int) -> LoaderState:
        lanes = {str(number): lane.cursor() for number, lane in self._lanes.items()}
        return LoaderState(self._state.version, rows, self.num_lanes, self._state.source_names, lanes)

    def _epochs(self) -> dict[str, float]:
        return {
            source.config.name: sum(lane.streams[i].progress() for lane in self._reported()) / source.plan.num_records
            for i, source in enumerate(self._sources)
        }

    def _announce_gap(self, j: int) -> None:
        """Warn once per gap if, at row j, no lane of this rank has a row left before the weights change."""
        change = next((step for step, _ in self._stages if step * self._global_batch_size > j), None)
        weights, _ = self._weights(j)
        if change in (None, self._gap_announced) or not all(lane.is_dry([weights]) for lane in self._lanes.values()):
            return
        self._gap_announced = change
        _logger.warning(
            "the sources in use have run out at step %d; batches are empty up to step %d, where data.weight_changes "
            "brings in others: move that step earlier, or raise max_epochs",
            j // self._global_batch_size,
            change,
        )

    def _check_skipped(self, batch: Batch) -> None:
        """Check the bad records of all lanes that this rank reads. Raises: ShardError if there are too many."""
        limit, skipped = self._config.max_bad_records, batch.skipped
        if skipped and limit is not None and (so_far := _skipped_in(self._lanes.values())) > limit:
            raise ShardError(
                f"{so_far} bad records on rank {self._dp_rank}, more than data.max_bad_records={limit}; "
                f"the last: {skipped[-1].shard}, line {skipped[-1].line}: {skipped[-1].reason}"
            )

    def _announce_lanes(self, sources: list[Source]) -> None:
        """Log the consequences of the number of lanes, given the sources that are drawn from."""
        raw_bytes = sum(source.plan.raw_bytes for source in sources)
        if self.num_lanes < _FEW_LANES and raw_bytes > LARGE_RUN_BYTES:
            _logger.warning(
                "data.lanes=%d: a batch is only as diverse as its lanes; %d or more suit a run of this size",
                self.num_lanes,
                _FEW_LANES,
            )
        if self._stride < self._dp_size:
            _logger.log(
                logging.WARNING if raw_bytes > _SHARED_LANE_BYTES else logging.INFO,
                "data.lanes=%d on %d data-parallel ranks: %d ranks read each lane, so each document is tokenized %d "
                "times; that takes more workers, and nothing else changes",
                self.num_lanes,
                self._dp_size,
                self._dp_size // self._stride,
                self._dp_size // self._stride,
            )
        passes = [source.config.max_epochs for source in sources]
        dealt = [
            0 if limit is None else limit * source.plan.num_segments
            for source, limit in zip(sources, passes, strict=True)
        ]
        if None not in passes and max(dealt) < self.num_lanes:
            _logger.warning(
                "data.lanes=%d: %d of them get no segment within max_epochs (%s) and give only empty rows; lower "
                "data.lanes, or leave it out",
                self.num_lanes,
                self.num_lanes - max(dealt),
                ", ".join(f"{source.config.name} has {source.plan.num_segments}" for source in sources),
            )


def check_not_empty(rows_drawn: int, sources: Sequence[str]) -> None:
    """Check that the data, now at its end, gave any row. Raises: ShardError if it gave none, over all ranks."""
    if not rows_drawn:
        names = ", ".join(sources)
        raise ShardError(
            f"the data ends without a single row; all lines of {names} are blank or bad; is text_key right?"
        )


def _skipped_in(lanes: Iterable[Lane]) -> int:
    return sum(stream.cursor.skipped for lane in lanes for stream in lane.streams)
