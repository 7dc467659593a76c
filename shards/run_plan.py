"""The sources of a run as each of its stages deals them, and the state in which each begins.

source, carry -> run_plan -> loader, history.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property

from shards.carry import next_state
from shards.errors import ConfigError
from shards.index.manifest import Shard
from shards.plan.cursor import EVERY_SEGMENT, LOADER_STATE_VERSION, Cursor, LaneCursor, LoaderState
from shards.plan.taken import Range
from shards.records.selection import taken_of
from shards.source import DealRule, Source, raw_bytes_of
from shards.stages import Stage


class RunPlan:
    """All of a run that its batches follow from, but for what the shards hold.

    Attributes:
        stages: all of them, the first of which begins at step 0.
        shards: those of each source of the last stage.
        lanes_of: V of each stage.
    """

    def __init__(self, stages: Sequence[Stage], shards: Sequence[list[Shard]], seed: int) -> None:
        self.stages, self.shards, self._seed = stages, shards, seed
        self.lanes_of = self._count_lanes()
        self._kept: tuple[object, list[Source]] | None = None  # the sources of a stage, and what they were planned by

    def takes(self, source: int, shard: int, line: int) -> bool:
        """Return whether a source takes a line of one of its shards, counted from 1."""
        first, stop = self._taken[source][shard]
        return first < line <= stop

    @cached_property
    def _taken(self) -> list[list[Range]]:
        sources = zip(self.stages[-1].data.sources, self.shards, strict=True)
        return [taken_of(source, [shard.index.num_records for shard in found]) for source, found in sources]

    def first_state(self) -> LoaderState:
        """Return the state of all lanes in which the run begins."""
        names = tuple(source.name for source in self.stages[0].data.sources)
        start = LaneCursor(0, 0, (Cursor(),) * len(names))
        lanes = {str(lane): start for lane in range(self.lanes_of[0])}
        return LoaderState(LOADER_STATE_VERSION, 0, self.lanes_of[0], names, lanes)

    def ends_stage(self, state: LoaderState) -> bool:
        """Return whether the batch after a state begins another stage."""
        if state.stage + 1 == len(self.stages):
            return False
        stage, after = self.stages[state.stage], self.stages[state.stage + 1]
        rows = state.rows - state.first_row - state.empty_rows
        return rows >= (after.step - stage.step) * stage.global_batch_size

    def end_of(self, state: LoaderState) -> int | None:
        """Return the step at which a state's stage ends and another one begins; None for the last."""
        later = self.stages[state.stage + 1 :]
        return later[0].step if later else None

    def next_state(self, state: LoaderState) -> LoaderState:
        """Return the state in which the next stage begins; if it has other lanes, `state` must hold all of the old.

        Raises: ConfigError if the stage cannot follow.
        """
        number = state.stage + 1
        before, after = self.stages[number - 1 : number + 1]
        if state.empty_rows and before.data.weight_changes:
            raise ConfigError(
                f"the run has passed over {state.empty_rows} rows in which it waited for data.weight_changes, so that "
                f"the weights at step {after.step} depend on whose steps are counted; a stage cannot follow"
            )
        return next_state(state, before, after, self.lanes_of[number], self.sources(state))

    def sources(self, state: LoaderState) -> list[Source]:
        """Plan the sources as a state's stage deals them, and keep what is planned until another stage is asked for."""
        key = (state.stage, state.numberings)
        if self._kept is None or self._kept[0] != key:
            config = self.stages[state.stage].data
            self._kept = (
                key,
                [
                    Source(config, i, self.shards[i], self._seed, self._rules(state, i), state.stage)
                    for i in range(len(config.sources))
                ],
            )
        return self._kept[1]

    def sources_undivided(self, number: int, sources: Sequence[int]) -> list[Source]:
        """Plan some sources as a stage would deal all of their segments, whatever stages before have dealt."""
        config = self.stages[-1].data
        own = self.stages[number].data.model_copy(update={"sources": config.sources})
        rules = [{number: DealRule(self.lanes_of[number], self._segment_lanes(i))} for i in sources]
        return [
            Source(own, i, self.shards[i], self._seed, rule, number) for i, rule in zip(sources, rules, strict=True)
        ]

    def _rules(self, state: LoaderState, number: int) -> dict[int, DealRule]:
        """Return how each stage up to a state's has dealt a source since it was added."""
        rules = {}
        for stage in range(state.stage + 1):
            numberings = state.numberings[stage] if state.numberings else ()
            if number < len(self.stages[stage].data.sources):
                numbering = numberings[number] if numberings else EVERY_SEGMENT
                rules[stage] = DealRule(self.lanes_of[stage], self._segment_lanes(number), numbering)
        return rules

    def _segment_lanes(self, number: int) -> int:
        """Return V of the stage that added a source."""
        stages = zip(self.stages, self.lanes_of, strict=True)
        return next(lanes for stage, lanes in stages if number < len(stage.data.sources))

    def _count_lanes(self) -> list[int]:
        """Return V of each stage: as many as its config says, else as before."""
        config = self.stages[0].data
        weights = [weights for _, weights in config.weightings()]
        sizes = [raw_bytes_of(*each) for each in zip(self.stages[-1].data.sources, self.shards, strict=True)]
        drawn = [any(mix[i] > 0 for mix in weights) for i in range(len(config.sources))]
        counts = [config.num_lanes(self.stages[0].global_batch_size, sum(itertools.compress(sizes, drawn)))]
        for stage in self.stages[1:]:
            counts.append(stage.data.lanes or counts[-1])
        return counts
