"""A source as lanes read it: its shards with their indexes, its plan in each stage, and the task of any window.

manifest, segments -> source -> lane.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from shards.config import DataConfig, SourceConfig
from shards.hashing import key_of
from shards.index.manifest import Shard
from shards.plan.cursor import EVERY_SEGMENT, Numbering
from shards.plan.segments import Deal, SourcePlan, WindowId, WindowPlan
from shards.plan.taken import taken_cells
from shards.records.selection import taken_of
from shards.windows.window import SpanTask, WindowTask


class DealRule(NamedTuple):
    """How a stage deals a source."""

    lanes: int  # V
    segment_lanes: int  # V of the stage that added the source
    numbering: Numbering = EVERY_SEGMENT


class Source:
    """One source of a run, in one of its stages."""

    def __init__(
        self,
        config: DataConfig,
        number: int,
        shards: list[Shard],
        seed: int,
        rules: Mapping[int, DealRule],
        stage: int = 0,
    ) -> None:
        """Plan a source.

        Args:
            config: the stage's.
            number: the source's number in the config.
            shards: the source's shards, in order.
            seed: the run's seed.
            rules: how each stage deals it that has the source, up to this one, by the stages' numbers.
            stage: the stage's number.
        """
        self.config: SourceConfig = config.sources[number]
        self.shards, self.packing = shards, config.packing
        self.number, self.stage, self._seed = number, stage, seed
        self.rules, self.rule = rules, rules[stage]
        tables = [shard.index.table() for shard in shards]
        self.taken = taken_of(self.config, [shard.index.num_records for shard in shards])
        plans = {
            rule: SourcePlan(
                self.config.name,
                tables,
                config.window_limit,
                rule.lanes,
                seed,
                config.plan,
                rule.segment_lanes,
                rule.numbering,
                self.taken,
            )
            for rule in set(rules.values())
        }
        self.plans = {number: plans[rule] for number, rule in rules.items()}
        self.plan = self.plans[stage]

    def segments_of_lane(self, lane: int) -> int | None:
        """Count the segments that a lane reads before the source is exhausted; None = no limit."""
        limit = self.config.max_epochs
        return None if limit is None else self.plan.segments_of_lane(lane, limit)

    def deal(self, lane: int, segment: int) -> Deal:
        """Return the deal that begins with a lane's q-th segment."""
        return self.plan.deal(lane, segment)

    def epoch(self, name: WindowId) -> int:
        """Return the epoch, counted from 0, to which a window belongs."""
        return self._deal_of(name).epoch

    def window(self, name: WindowId) -> WindowPlan:
        """Return the plan of a window."""
        return self._deal_of(name).windows[name.window]

    def task(self, name: WindowId) -> WindowTask:
        """Build the task that makes a window."""
        planned = self.window(name)
        spans = tuple(
            SpanTask(span, self.shards[span.shard].index.raw_range(self.shards[span.shard].path, span.start, span.stop))
            for span in planned.spans
        )
        return WindowTask(self.number, self.stage, spans, planned.raw_bytes, self.key(name), name.cuts)

    def key(self, name: WindowId) -> int:
        """Compute the key of a window's shuffle."""
        deal = self._deal_of(name)
        return key_of("window", self._seed, self.config.name, deal.epoch, name.lane, deal.segments[0], name.window)

    def _deal_of(self, name: WindowId) -> Deal:
        return self.plans[name.stage].deal(name.lane, name.segment)


def raw_bytes_of(config: SourceConfig, shards: Sequence[Shard]) -> int:
    """Return the raw bytes that a source takes of its shards, about. Raises: ShardError as `taken_of`."""
    indexes = [shard.index for shard in shards]
    taken = taken_of(config, [index.num_records for index in indexes])
    return taken_cells([index.table() for index in indexes], taken).raw_bytes
