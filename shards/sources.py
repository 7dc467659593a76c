"""A source as lanes read it: its shards with their indexes, its plan, and the task for any window.

manifest, plan -> sources -> lane.
"""

from shards.config import DataConfig, SourceConfig
from shards.manifest import Shard
from shards.plan import SourcePlan, WindowPlan, key_of
from shards.pool import WindowId
from shards.window import WindowTask


class Source:
    """One source of a run."""

    def __init__(self, config: DataConfig, number: int, shards: list[Shard], lanes: int, seed: int) -> None:
        """
        Args:
            number: of the source in the config.
            shards: of the source, in order.
            lanes: V.
            seed: of the run.
        """
        self.config: SourceConfig = config.sources[number]
        self.shards = shards
        tables = [shard.index.table() for shard in shards]
        self.plan = SourcePlan(self.config.name, tables, config.window_limit, lanes, seed)
        self._number, self._seed = number, seed

    def segments_of_lane(self, lane: int) -> int | None:
        """How many segments the lane reads before the source is exhausted; None = no limit."""
        limit = self.config.max_epochs
        return None if limit is None else self.plan.segments_of_lane(lane, limit)

    def windows(self, lane: int, segment: int) -> list[WindowPlan]:
        """The windows of the lane's q-th segment."""
        return self.plan.windows_of(self.plan.segment_of(lane, segment)[1])

    def task(self, name: WindowId) -> WindowTask:
        """The task that makes a window."""
        epoch, segment = self.plan.segment_of(name.lane, name.segment)
        planned = self.plan.windows_of(segment)[name.window]
        shard = self.shards[planned.shard]
        return WindowTask(
            source=self._number,
            raw=shard.index.raw_range(shard.path, planned.start, planned.stop),
            first_record=planned.first_record,
            num_records=planned.num_records,
            key=key_of("window", self._seed, self.config.name, epoch, name.lane, segment, name.window),
        )
