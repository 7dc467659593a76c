"""Shards -> batches: the streaming loader.

    index.py, manifest.py   shards -> indexes, made once
    plan.py, sources.py     indexes, seed -> segments, dealt to lanes; windows          pure
    window.py               a window -> rows; in worker processes                       pure
    lane.py                 lane v: its row n, from the source that is due
    loader.py               row j of the run: lane j mod V, that lane's row j div V
                            global batch k: rows J_k .. J_k + G; rank r: the lanes v with v mod dp_size == r

A global batch depends on the shards, the tokenizer, the config, the seed and k; not on ranks, workers, restarts or
timing.
"""

import logging
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from shards import manifest
from shards.batch import Batch
from shards.config import DataConfig
from shards.cursor import STATE_VERSION, Cursor, LaneCursor, LoaderState
from shards.decontaminate import Decontaminator
from shards.errors import CheckpointError, ConfigError, ShardError
from shards.fingerprint import fingerprint
from shards.lane import Draw, Lane, Stream
from shards.manifest import Prepared
from shards.pool import InProcess, Pool, WorkerPool
from shards.prefetch import Prefetcher
from shards.recipe import Recipe
from shards.sources import Source
from shards.tokenizer import Tokenizer

FEW_LANES = 256
LARGE_RUN_BYTES = 100 * 10**9  # raw

logger = logging.getLogger(__name__)


class Loader:
    """Iterates over the batches of one data-parallel rank; a context manager that ends its workers."""

    def __init__(
        self,
        config: DataConfig,
        global_batch_size: int,
        seed: int = 0,
        dp_rank: int = 0,
        dp_size: int = 1,
        prepared: Sequence[Prepared] | None = None,
    ) -> None:
        """
        Args:
            config: of the data.
            global_batch_size: rows per optimizer step, over all ranks.
            seed: of all shuffling.
            dp_rank, dp_size: which rank of how many; ranks together give the same global batches for every dp_size.
            prepared: what `prepare` said of this config, on any rank: then no shard is looked at before it is read.
                None = all shards are looked at now, and indexed where that is missing.
        Raises: ConfigError if lanes or batch cannot be split over the ranks; ShardError if a shard is missing or
        damaged.
        """
        self.num_lanes = config.num_lanes(global_batch_size)
        _check_split(self.num_lanes, global_batch_size, dp_rank, dp_size)
        self._config, self._seed = config, seed
        self._global_batch_size, self._dp_rank, self._dp_size = global_batch_size, dp_rank, dp_size
        tokenizer = Tokenizer(config.tokenizer, config.bos, config.eos)
        if tokenizer.obstacle and dp_rank == 0:
            slower = "encodes documents whole, several times slower than word by word"
            logger.warning("%s %s: %s", config.tokenizer, slower, tokenizer.obstacle)
        if prepared is None:
            shards = [manifest.source_shards(config, source) for source in config.sources]
        else:
            pairs = zip(config.sources, prepared, strict=True)
            shards = [manifest.prepared_shards(config, source, found) for source, found in pairs]
        self._sources = [Source(config, i, found, self.num_lanes, seed) for i, found in enumerate(shards)]
        self._check_lanes()
        decontaminator = Decontaminator.of(config.decontaminate, config.index_dir) if config.decontaminate else None
        self.fingerprint = fingerprint(config, self._sources, tokenizer, decontaminator, self.num_lanes, seed)
        self._stages = _weight_stages(config)
        recipe = Recipe.of(tokenizer, decontaminator)
        self._pool: Pool = WorkerPool(config, recipe) if config.num_workers else InProcess(config, recipe)
        weakref.finalize(self, self._pool.close)  # a loader that is dropped, or left at the interpreter's end
        self._ended = False
        self._lanes: dict[int, Lane]
        self._state = self._first_state()
        self._torn = True  # the lanes may stand elsewhere than the state says
        self._put_back()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers. What they have made ahead is thrown away: a state needs no more than its cursors."""
        self._pool.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next batch; after an error or an interrupt the same one that could not be made, from its first row on.

        Raises: StopIteration when one of its rows cannot be filled, all sources having reached their max_epochs. Other
            ranks may get one batch more: a step counts only if all ranks have theirs.
        """
        if self._ended:
            raise StopIteration
        if self._torn:
            self._put_back()
        self._torn = True
        first = self._state.rows
        draws: list[Draw] = []
        rows = range(first + (self._dp_rank - first) % self._dp_size, first + self._global_batch_size, self._dp_size)
        for j in rows:
            draw = self._draw(j)
            if draw is None:
                self._ended = True
                raise StopIteration
            draws.append(draw)
        state = self._snapshot(first + self._global_batch_size)
        slots = [j - first for j in rows]
        batch = Batch(draws, slots, self._sources, self._config.seq_len, state, self._epochs())
        self._check_skipped(batch)
        self._state, self._torn = state, False  # last of all: until here the batch is not given out
        return batch

    def state_dict(self) -> dict[str, object]:
        """Where this rank's lanes stand after the last batch; plain, JSON-able.

        `merge_states` joins those of all ranks.
        """
        return self._state.to_dict()

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Goes on from a state that holds at least this rank's lanes, whatever number of ranks it was made with.

        Raises: CheckpointError if it is of another run, another version, or lacks a lane.
        """
        loaded = LoaderState.from_dict(state)
        names = tuple(source.name for source in self._config.sources)
        for key, theirs, ours in (("lanes", loaded.num_lanes, self.num_lanes), ("sources", loaded.source_names, names)):
            if theirs != ours:
                raise CheckpointError(f"loader state was made with data.{key}={theirs}, now it is {ours}; set it back")
        lanes = [str(lane) for lane in range(self._dp_rank, self.num_lanes, self._dp_size)]
        if missing := [lane for lane in lanes if lane not in loaded.lanes]:
            raise CheckpointError(
                f"loader state lacks lane {missing[0]}, which rank {self._dp_rank} of {self._dp_size} reads; "
                "merge the states of all ranks that saved it"
            )
        mine = {lane: loaded.lanes[lane] for lane in lanes}
        self._torn, self._ended = True, False
        self._state = LoaderState(loaded.version, loaded.rows, loaded.num_lanes, loaded.source_names, mine)
        self._put_back()

    def _first_state(self) -> LoaderState:
        start = LaneCursor(0, 0, (Cursor(),) * len(self._sources))
        lanes = {str(lane): start for lane in range(self._dp_rank, self.num_lanes, self._dp_size)}
        names = tuple(source.name for source in self._config.sources)
        return LoaderState(STATE_VERSION, 0, self.num_lanes, names, lanes)

    def _put_back(self) -> None:
        """Puts the lanes where the state says, whatever was drawn, requested or interrupted since."""
        self._torn = True  # until the end: this may be interrupted, too
        self._pool.clear()
        self._lanes = {}
        for number, cursor in self._state.lanes.items():
            streams = [
                Stream(source, i, int(number), cursor.sources[i], self._config.seq_len + 1)
                for i, source in enumerate(self._sources)
            ]
            self._lanes[int(number)] = Lane(int(number), streams, cursor.rows, cursor.mixing_rows)
        stages = [(step * self._global_batch_size, weights) for step, weights in self._stages]
        lanes = list(self._lanes.values())
        self._prefetcher = Prefetcher(self._pool, lanes, self.num_lanes, stages, self._config.prefetch_bytes)
        self._torn = False

    def _draw(self, j: int) -> Draw | None:
        lane = self._lanes[j % self.num_lanes]
        weights, step = self._weights(j)
        changed = j >= self.num_lanes and self._weights(j - self.num_lanes)[1] < step
        draw = lane.draw(weights, changed, self._pool)
        if draw is not None:
            self._prefetcher.taken(draw.name)
        return draw

    def _weights(self, j: int) -> tuple[tuple[float, ...], int]:
        """The sources' weights at row j, and the step from which they count."""
        step = j // self._global_batch_size
        return next((weights, start) for start, weights in reversed(self._stages) if start <= step)

    def _snapshot(self, rows: int) -> LoaderState:
        lanes = {str(number): lane.cursor() for number, lane in self._lanes.items()}
        return LoaderState(self._state.version, rows, self.num_lanes, self._state.source_names, lanes)

    def _epochs(self) -> dict[str, float]:
        return {
            source.config.name: sum(lane.streams[i].progress() for lane in self._lanes.values())
            * self._dp_size
            / source.plan.num_segments
            for i, source in enumerate(self._sources)
        }

    def _check_skipped(self, batch: Batch) -> None:
        """Raises: ShardError if bad records are too many."""
        limit, skipped = self._config.max_bad_records, batch.skipped
        if skipped and limit is not None and batch.skipped_so_far > limit:
            raise ShardError(
                f"{batch.skipped_so_far} bad records on rank {self._dp_rank}, more than data.max_bad_records={limit}; "
                f"the last: {skipped[-1].shard}, line {skipped[-1].line}: {skipped[-1].reason}"
            )

    def _check_lanes(self) -> None:
        """A lane without any segment would end the run before its first step. Raises: ConfigError."""
        raw_bytes = sum(source.plan.raw_bytes for source in self._sources)
        if self._dp_rank == 0 and self.num_lanes < FEW_LANES and raw_bytes > LARGE_RUN_BYTES:
            logger.warning(
                "data.lanes=%d: a batch is only as diverse as its lanes; %d or more suit a run of this size",
                self.num_lanes,
                FEW_LANES,
            )
        granted = [source.segments_of_lane(self.num_lanes - 1) for source in self._sources]
        if not any(segments is None or segments > 0 for segments in granted):
            counts = ", ".join(f"{source.config.name} has {source.plan.num_segments}" for source in self._sources)
            raise ConfigError(
                f"data.lanes={self.num_lanes}: some lanes would get no segment within max_epochs ({counts}); "
                "lower data.lanes or data.window_bytes, or raise max_epochs"
            )


def _check_split(num_lanes: int, global_batch_size: int, dp_rank: int, dp_size: int) -> None:
    assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
    for key, value in (("data.lanes", num_lanes), ("train.global_batch_size", global_batch_size)):
        if value % dp_size:
            common = [size for size in range(1, num_lanes + 1) if num_lanes % size == global_batch_size % size == 0]
            raise ConfigError(
                f"{key}={value} cannot be split over {dp_size} data-parallel ranks; "
                f"numbers of ranks that work: {', '.join(map(str, common))}"
            )


def _weight_stages(config: DataConfig) -> list[tuple[int, tuple[float, ...]]]:
    """(first step, weights in the order of the sources), in the order of steps."""
    weights = {source.name: source.weight for source in config.sources}
    stages = [(0, tuple(weights.values()))]
    for change in config.weight_changes:
        weights |= change.weights
        stages.append((change.step, tuple(weights.values())))
    return stages
