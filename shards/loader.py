"""Shards -> batches: the streaming loader.

    index/, preparation     shards -> indexes, made once
    plan/segments, source   indexes, seed -> segments, dealt to lanes; windows          pure
    windows/                a window -> rows; in worker processes                       pure
    plan/mixing, lane       lane v: its row n, from the source that is due
    leg                     a stage's rows: row j is lane j mod V's row j div V; a rank has every dp_size-th of a batch
    carry, run_plan         where one stage leaves off, and the next one goes on
    loader                  the run: stage after stage, from a state or from the start

A global batch depends on the shards, the tokenizer, the config, the seed and the step; not on ranks, workers, restarts
or timing.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from types import TracebackType
from typing import Self

import msgspec

from shards import preparation
from shards.batch import Batch
from shards.config import DataConfig, check_split
from shards.errors import CheckpointError, ShardError
from shards.fingerprint import fingerprint
from shards.forecast import Forecast, forecast
from shards.index.manifest import Shard
from shards.lane import Lane
from shards.leg import Leg, Ranks, announce_lanes
from shards.plan.cursor import LoaderState
from shards.preparation import Prepared
from shards.records import texts
from shards.records.forms import form_of
from shards.run_plan import RunPlan
from shards.stages import Stage
from shards.tokenize.tokenizer import Tokenizer
from shards.windows.recipe import Tools, template_files
from shards.windows.window import WindowMaker
from shards.windows.worker_pool import InProcess, Pool, WorkerPool

_MARKERS_NAMED = 4  # in a warning

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
        stages: Sequence[Stage] = (),
        tokenizer: Tokenizer | None = None,
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
            stages: the stages that follow the first, which `config` and `global_batch_size` describe.
            tokenizer: `Tokenizer.of(config)`, if it is open already; None = it is opened.
        Raises: ConfigError if the batch cannot be split over the ranks; ShardError if a shard is missing or damaged.
        """
        assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
        self._stages = [Stage(0, config, global_batch_size), *stages]
        for stage in self._stages:
            check_split(stage.global_batch_size, dp_size)
        self._config, self._seed, self._ranks = config, seed, Ranks(dp_rank, dp_size)
        tokenizer = tokenizer or Tokenizer.of(config)
        if tokenizer.obstacle and dp_rank == 0:
            slower = "encodes documents whole, several times slower than word by word"
            _logger.warning("%s %s: %s", config.tokenizer, slower, tokenizer.obstacle)
        if dp_rank == 0:
            _announce_markers(tokenizer, self._stages[-1].data)
        shards = _open_shards(self._stages[-1].data, prepared)
        self.plan = RunPlan(self._stages, shards, seed)
        self.num_lanes = self.plan.lanes_of[0]
        if dp_rank == 0:
            self._announce_lanes()
        configs = [stage.data for stage in self._stages]
        filters = preparation.prepared_filters(configs, prepared and prepared.filters)
        forgotten = preparation.forgotten_lists(self._stages, shards)
        self._tools = Tools(tokenizer, filters, forgotten, template_files(configs[-1].sources))
        self.fingerprint = fingerprint(self._stages, self.plan.lanes_of, shards, self._tools, seed)
        recipe = self._tools.recipe()
        self.pool: Pool
        self.pool = WorkerPool(configs, recipe) if config.num_workers else InProcess(configs, recipe, self._tools)
        weakref.finalize(self, self.pool.close)  # runs even if the loader is dropped or the interpreter exits
        self.ended = False  # all lanes of this rank are exhausted
        self._leg: Leg
        self._state = self._mine(self.plan.first_state())
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
        self.pool.close()

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
        while self._ranks.size == 1 and not batch.num_rows and not ended:
            self._state = _passed_over(state, self._leg.stage)
            state, batch, ended = self._make_batch(state.rows)
        if ended:
            if self._ranks.size == 1:
                self.check_end(self.rows_drawn)
            raise StopIteration
        self._state, self._torn = state, False  # last, since an interrupt before this must not lose the batch
        return batch

    def next_batch(self) -> Batch:
        """Return the next batch, even one without rows, and without end, as other ranks may have rows left."""
        self._restore()
        state, batch, ended = self._make_batch(self._state.rows)
        self._state, self.ended, self._torn = state, ended, False
        return batch

    def pass_over(self) -> None:
        """Say that the last batch was no step, since no rank had a row in it."""
        self._state = _passed_over(self._state, self._leg.stage)

    @property
    def stage(self) -> int:
        """Return the number of the stage of the last batch."""
        return self._state.stage

    @property
    def ends_stage(self) -> bool:
        """True if the next batch begins another stage; then a loader of several ranks has to be told all lanes.

        Pass what `merge_states` makes of the states of all ranks to `load_state_dict`.
        """
        return self.plan.ends_stage(self._state)

    def _restore(self) -> None:
        """Put the lanes back if the last batch could not be made, and mark them as torn while one is being made."""
        if self.ends_stage:
            self._begin_stage()
        if self._torn:
            self._put_back()
        self._torn = True

    def _begin_stage(self) -> None:
        """Go over to the next stage.

        Raises: CheckpointError if this deals other lanes and the state does not hold all of the old ones.
        """
        number = self._state.stage + 1
        if self.plan.lanes_of[number] != self._state.num_lanes != len(self._state.lanes):
            raise CheckpointError(
                f"the stage at step {self._stages[number].step} has other lanes, dealt from those of all ranks; merge "
                "the states of all ranks and load them"
            )
        self._torn = True
        self._state = self._mine(self.plan.next_state(self._state))

    def _make_batch(self, first: int) -> tuple[LoaderState, Batch, bool]:
        """Make the batch from row `first` of the run: (the lanes' state after it, the batch, True if all are dry)."""
        leg, stage = self._leg, self._leg.stage
        draws, is_empty = leg.draw(first)
        lanes = {str(number): lane.cursor() for number, lane in leg.lanes.items()}
        state = msgspec.structs.replace(self._state, rows=first + stage.global_batch_size, lanes=lanes)
        slots = range(self._ranks.rank, stage.global_batch_size, self._ranks.size)
        skipped = _skipped_in(leg.reported())
        batch = Batch(draws, slots, leg.sources, stage.data.seq_len, state, skipped, leg.epochs(), stage.data.attention)
        self._check_skipped(batch)
        ended = is_empty and leg.is_dry(first)
        if is_empty and not ended:
            leg.announce_gap(first)
        return state, batch, ended

    def check_end(self, rows_drawn: int) -> None:
        """Check that the data may end here.

        Args:
            rows_drawn: non-empty rows since the run's start, over all ranks.
        Raises: ShardError if it gave none, or a stage is still to come.
        """
        stage, names = self._state.stage, ", ".join(source.name for source in self._leg.stage.data.sources)
        if not rows_drawn:
            raise ShardError(
                f"the data ends without a single row; all lines of {names} are blank or bad, or take, hash_range, "
                "min_tokens, max_tokens and packing leave out the others; is text_key, or template or messages_key, "
                "right?"
            )
        if stage + 1 < len(self._stages):
            raise ShardError(
                f"the sources {names} end before the stage at step {self._stages[stage + 1].step} begins: let it begin "
                "earlier, or raise their max_epochs"
            )

    @property
    def rows_drawn(self) -> int:
        """Return the non-empty rows since the run's start in the lanes that this rank reports on: sum it over ranks."""
        return sum(stream.cursor.rows_drawn for lane in self._leg.reported() for stream in lane.streams)

    def forecast(self, steps: int | None) -> Forecast:
        """Forecast how long the data will last, the same at every start of a run; see `forecast.forecast`."""
        configs = [stage.data for stage in self._stages]
        sources = self.plan.sources_undivided(0, range(len(configs[-1].sources)))
        with closing(WindowMaker(configs, self._tools)) as maker:  # not the rows' maker, which counts replays
            return forecast(self._stages, maker, sources, self.num_lanes, steps)

    def state_dict(self) -> dict[str, object]:
        """Return the cursors of this rank's lanes after the last batch, as JSON-able values.

        `merge_states` joins the states of all ranks.
        """
        return self._state.to_dict()

    def load_state_dict(self, state: Mapping[str, object], step: int | None = None) -> None:
        """Resume from a state that holds at least this rank's lanes, whatever number of ranks made it.

        Args:
            step: optimizer steps done, if they are known beside it: states of older programs do not say how many of
                their batches were no steps.
        Raises: CheckpointError if it belongs to another run or version, or lacks a lane.
        """
        loaded = LoaderState.from_dict(state)
        if loaded.stage >= len(self._stages):
            raise CheckpointError(
                f"loader state is of stage {loaded.stage}, but the config has {len(self._stages) - 1} stages after the "
                "first; put them back"
            )
        names = tuple(source.name for source in self._stages[loaded.stage].data.sources)
        lanes = self.plan.lanes_of[loaded.stage]
        for key, theirs, ours in (("lanes", loaded.num_lanes, lanes), ("sources", loaded.source_names, names)):
            if theirs != ours:
                raise CheckpointError(f"loader state was made with data.{key}={theirs}, now it is {ours}; set it back")
        if missing := [lane for lane in self._lane_names(loaded) if lane not in loaded.lanes]:
            raise CheckpointError(
                f"loader state lacks lane {missing[0]}, which rank {self._ranks.rank} of {self._ranks.size} reads; "
                "merge the states of all ranks that saved it"
            )
        if step is not None and not loaded.stage:
            empty = loaded.rows - step * self._stages[0].global_batch_size
            loaded = msgspec.structs.replace(loaded, empty_rows=empty)
        self._torn, self.ended = True, False
        self._state = loaded
        if not self.ends_stage:  # otherwise the next stage is dealt from the lanes of all ranks
            self._state = self._mine(loaded)
            self._put_back()

    def _lane_names(self, state: LoaderState) -> list[str]:
        """List the lanes that this rank reads in a state's stage, by their names in it."""
        return [str(lane) for lane in self._ranks.lanes(state.num_lanes)]

    def _mine(self, state: LoaderState) -> LoaderState:
        """Return a state with the lanes of this rank only."""
        return msgspec.structs.replace(state, lanes={lane: state.lanes[lane] for lane in self._lane_names(state)})

    def _put_back(self) -> None:
        """Put the lanes where the state says, whatever was drawn, requested or interrupted since."""
        self._torn = True  # until the end, since this may be interrupted too
        self.pool.clear()
        stage, sources = self._stages[self._state.stage], self.plan.sources(self._state)
        self._leg = Leg(stage, self.plan.end_of(self._state), self._state, sources, self._ranks, self.pool)
        self._torn = False

    def _check_skipped(self, batch: Batch) -> None:
        """Check the bad records of all lanes that this rank reads. Raises: ShardError if there are too many."""
        limit, skipped = self._config.max_bad_records, batch.skipped
        if skipped and limit is not None and (so_far := _skipped_in(self._leg.lanes.values())) > limit:
            raise ShardError(
                f"{so_far} bad records on rank {self._ranks.rank}, more than data.max_bad_records={limit}; "
                f"the last: {skipped[-1].shard}, line {skipped[-1].line}: {skipped[-1].reason}"
            )

    def _announce_lanes(self) -> None:
        """Log the consequences of the number of lanes, for each stage that chooses it."""
        before = None
        for number, (stage, lanes) in enumerate(zip(self._stages, self.plan.lanes_of, strict=True)):
            if lanes != before:
                weights = stage.data.weightings()
                drawn = [i for i in range(len(stage.data.sources)) if any(mix[i] > 0 for _, mix in weights)]
                sources = self.plan.sources_undivided(number, drawn)
                announce_lanes(lanes, self._ranks, sources)
            before = lanes


def _announce_markers(tokenizer: Tokenizer, config: DataConfig) -> None:
    """Warn of markers of a chat format that the tokenizer has no special tokens for."""
    for source in config.sources:
        form = form_of(source)
        missing = [name for name in form.markers if tokenizer.index(name) is None] if form else []
        if missing:
            _logger.warning(
                "source %r: the tokenizer %s has no token %s of the %s, so that these are spelled like other text; a "
                "tokenizer that has them needs one token for each",
                source.name,
                tokenizer.path,
                " or ".join(missing[:_MARKERS_NAMED]),
                f"chat_template {source.chat_template}"
                if source.chat_template
                else f"chat_format {source.chat_format}",
            )


def _open_shards(config: DataConfig, prepared: Prepared | None) -> list[list[Shard]]:
    """Return the shards of each source, examined now unless they were prepared."""
    if prepared is not None:
        pairs = zip(config.sources, prepared.manifests, strict=True)
        return [preparation.prepared_shards(config, source, found) for source, found in pairs]
    shards = [preparation.source_shards(config, source) for source in config.sources]
    for source, found in zip(config.sources, shards, strict=True):
        texts.sample_of(config, source, [shard.path for shard in found])
    return shards


def _passed_over(state: LoaderState, stage: Stage) -> LoaderState:
    """Return a state whose last batch was no step."""
    return msgspec.structs.replace(state, empty_rows=state.empty_rows + stage.global_batch_size)


def _skipped_in(lanes: Iterable[Lane]) -> int:
    return sum(stream.cursor.skipped for lane in lanes for stream in lane.streams)
