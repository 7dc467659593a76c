"""A source as lanes read it: its shards with their indexes, its plan, and the task of any window.

manifest, segments -> source -> lane.
"""

from __future__ import annotations

from shards.config import DataConfig, SourceConfig
from shards.hashing import key_of
from shards.index.manifest import Shard
from shards.plan.segments import Deal, SourcePlan, WindowId, WindowPlan
from shards.windows.window import SpanTask, WindowTask


class Source:
    """One source of a run."""

    def __init__(self, config: DataConfig, number: int, shards: list[Shard], lanes: int, seed: int) -> None:
        """Plan a source.

        Args:
            number: the source's number in the config.
            shards: the source's shards, in order.
            lanes: V.
            seed: the run's seed.
        """
        self.config: SourceConfig = config.sources[number]
        self.shards = shards
        tables = [shard.index.table() for shard in shards]
        self.plan = SourcePlan(self.config.name, tables, config.window_limit, lanes, seed, config.plan)
        self.number, self._seed = number, seed

    def segments_of_lane(self, lane: int) -> int | None:
        """Count the segments that a lane reads before the source is exhausted; None = no limit."""
        limit = self.config.max_epochs
        return None if limit is None else self.plan.segments_of_lane(lane, limit)

    def deal(self, lane: int, segment: int) -> Deal:
        """Return the deal that begins with a lane's q-th segment."""
        return self.plan.deal(lane, segment)

    def window(self, name: WindowId) -> WindowPlan:
        """Return the plan of a window."""
        return self.plan.deal(name.lane, name.segment).windows[name.window]

    def task(self, name: WindowId) -> WindowTask:
        """Build the task that makes a window."""
        planned = self.window(name)
        spans = tuple(
            SpanTask(span, self.shards[span.shard].index.raw_range(self.shards[span.shard].path, span.start, span.stop))
            for span in planned.spans
        )
        return WindowTask(self.number, spans, planned.raw_bytes, self.key(name))

    def key(self, name: WindowId) -> int:
        """Compute the key of a window's shuffle."""
        deal = self.deal(name.lane, name.segment)
        return key_of("window", self._seed, self.config.name, deal.epoch, name.lane, deal.segments[0], name.window)
