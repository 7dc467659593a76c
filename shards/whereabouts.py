"""How far a state of a run has come with some documents. source -> whereabouts -> history.

The plan names the window that reads a document in an epoch, and a state names the window in which each lane is. So it
is known of every document whether its window lies ahead, behind, or is being read, and no window is made for it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shards.arrays import Ints
from shards.plan.cursor import Carried, LoaderState
from shards.plan.segments import WindowId
from shards.source import DealRule, Source

ALL = np.iinfo(np.int64).max  # rows drawn of a window of which none is left

Place = tuple[int, int, int]  # the lane, segment and window of a window's name


class Standing(NamedTuple):
    """What has become of the windows that read some documents: arrays [epochs, documents]."""

    begun: npt.NDArray[np.bool_]  # a row of it may have been drawn
    drawn: Ints  # rows drawn of it, as the present stage packs it
    lanes: Ints  # the lane that reads it; -1 = it was done before the present lanes were dealt, or has not been dealt
    carried: dict[tuple[int, int], Carried]  # (epoch, document) -> its window, if an earlier stage has left it


class Whereabouts:
    """Some documents of one source, and where the stages of a run read them.

    Args:
        source: the source's number.
        shards: int64 [documents], number of each one's shard in the source.
        records: int64 [documents], number of each in its shard, counted from 0.
    """

    def __init__(self, source: int, shards: Ints, records: Ints) -> None:
        self.source, self._shards, self._records = source, shards, records
        self._places: dict[tuple[DealRule, int], Ints] = {}  # by rule and epoch: [3, documents]
        self._named: dict[DealRule, dict[Place, list[tuple[int, int]]]] = {}
        self._num_named: dict[DealRule, int] = {}  # epochs whose windows are in `_named`

    def standing(self, state: LoaderState, sources: list[Source], epochs: int) -> Standing:
        """Return how far a state has come with the documents.

        Args:
            state: of all lanes.
            sources: as the state's stage deals them.
            epochs: the first ones, which are looked at.
        """
        if self.source >= len(sources):
            nothing = np.zeros((epochs, len(self._shards)), np.int64)
            return Standing(nothing > 0, nothing, nothing - 1, {})
        source = sources[self.source]
        places = [self._places_in(source, state.stage, epoch) for epoch in range(epochs)]
        lanes, segments, windows = np.moveaxis(np.array(places, np.int64).reshape(epochs, 3, -1), 1, 0)
        at = np.zeros((5, state.num_lanes), np.int64)
        for lane in np.unique(lanes[lanes >= 0]).tolist():
            stands, cursor = state.lanes[str(lane)], state.lanes[str(lane)].sources[self.source]
            waits = str(self.source) in stands.carried  # then the row is that of another window
            at[:, lane] = cursor.segment, cursor.window, cursor.row, cursor.window_rows, waits
        segment, window, row, window_rows, waiting = at[:, lanes]
        gone = lanes < 0  # dealt by an earlier stage; what is left of that is carried, and looked at below
        passed = gone | (segments < segment) | ((segments == segment) & (windows < window))
        current = ~gone & (segments == segment) & (windows == window) & (waiting == 0)
        drawn = np.where(current, np.where((row > 0) & (row == window_rows), ALL, row), np.where(passed, ALL, 0))
        found = Standing(drawn > 0, drawn, lanes.copy(), {})
        self._look_at_carried(found, state, source)
        return found

    def _look_at_carried(self, found: Standing, state: LoaderState, source: Source) -> None:
        """Correct what is said of windows that earlier stages have left to the lanes."""
        for lane, stands in state.lanes.items():
            cursor = stands.sources[self.source]
            for place, left in enumerate(stands.carried.get(str(self.source), ())):
                named = self._named_in(source, left.stage, len(found.lanes))
                for one in named.get((left.lane, left.segment, left.window), ()):
                    if one[0] >= len(found.lanes):
                        continue
                    drawn = cursor.row if place == 0 else 0
                    found.drawn[one] = ALL if drawn and drawn == cursor.window_rows else drawn
                    found.begun[one] = drawn > 0 or len(left.cuts) > 0
                    found.lanes[one] = int(lane)
                    found.carried[one] = left

    def name(self, standing: Standing, source: Source, epoch: int, document: int) -> WindowId:
        """Return the name by which the lane asks for the window that reads a document in an epoch."""
        if left := standing.carried.get((epoch, document)):
            return WindowId(self.source, left.lane, left.segment, left.window, left.stage, left.cuts)
        lane, segment, window = self._places_in(source, source.stage, epoch)[:, document].tolist()
        return WindowId(self.source, lane, segment, window, source.stage)

    def reads(self, name: WindowId, source: Source) -> bool:
        """Return whether a window reads one of the documents."""
        return (name.lane, name.segment, name.window) in self._named_in(source, name.stage, source.epoch(name) + 1)

    def epochs(self, state: LoaderState, sources: list[Source]) -> int:
        """Count the epochs of the source that a state may have begun."""
        if self.source >= len(sources):
            return 0
        plan = sources[self.source].plan
        places = [
            stands.sources[self.source].segment * state.num_lanes + int(lane) for lane, stands in state.lanes.items()
        ]
        return int(plan.number_of(np.array(places)).max()) // plan.num_segments + 1

    def _places_in(self, source: Source, stage: int, epoch: int) -> Ints:
        key = source.rules[stage], epoch
        if key not in self._places:
            self._places[key] = np.stack(source.plans[stage].places_of(self._shards, self._records, epoch))
        return self._places[key]

    def _named_in(self, source: Source, stage: int, epochs: int) -> dict[Place, list[tuple[int, int]]]:
        """Return (epoch, document) of the documents of every window that has any, by its name in a stage."""
        rule = source.rules[stage]
        named = self._named.setdefault(rule, {})
        for epoch in range(self._num_named.get(rule, 0), epochs):
            for document, (lane, segment, window) in enumerate(self._places_in(source, stage, epoch).T.tolist()):
                named.setdefault((lane, segment, window), []).append((epoch, document))
        self._num_named[rule] = max(epochs, self._num_named.get(rule, 0))
        return named
