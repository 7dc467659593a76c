"""The steps and rows in which a run had some documents. run_plan, leg, whereabouts -> history -> pretrain.exposure.

A run records the state of its lanes every few steps. From one such state to the next, only those lanes are drawn
again that have read a window with one of the documents in between; all others are passed over by comparing cursors. All
lanes are drawn where nothing less will do: up to a stage that deals other lanes, up to the run's last step if no state
was recorded there, and where there were batches without a row, which are no steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from shards.errors import CheckpointError
from shards.exposure.search import DocumentPlace
from shards.lane import Draw
from shards.leg import Leg, Ranks
from shards.plan.cursor import LaneCursor, LoaderState
from shards.plan.segments import WindowId
from shards.run_plan import RunPlan
from shards.source import Source
from shards.sparing_pool import Contents, Drop, SparingPool
from shards.whereabouts import ALL, Standing, Whereabouts
from shards.windows.worker_pool import Pool


class Anchor(NamedTuple):
    """A state that a run has recorded."""

    step: int  # optimizer steps that were done
    state: LoaderState  # of all lanes


class Appearance(NamedTuple):
    """A piece of a document in a row."""

    document: int  # number among those that were asked for
    step: int  # counted from 1
    slot: int  # position of the row in the global batch
    start: int  # first token of the piece in its document, BOS counted
    stop: int  # one past its last token
    epoch: int  # of the source, counted from 0
    forgotten: bool  # there is padding in its place, since data.forget names it


class History(NamedTuple):
    """What a run has done with some documents."""

    appearances: list[Appearance]  # in the order of steps, slots and places in the row
    drops: list[set[Drop]]  # of each document, why it was read and gave nothing
    read: list[list[int]]  # of each document, the epochs in which the window that holds it was read to its end


class Historian:
    """Finds where a run has had some documents.

    Args:
        pool: makes windows when they are needed, and none ahead.
        documents: different ones.
    """

    def __init__(self, plan: RunPlan, pool: Pool, documents: Sequence[DocumentPlace]) -> None:
        self._plan = plan
        self._of_source: dict[int, list[int]] = {}  # numbers of the documents that each source takes
        for number, place in enumerate(documents):
            if plan.takes(*place):
                self._of_source.setdefault(place.source, []).append(number)
        columns = {source: np.array([documents[i][1:] for i in found]) for source, found in self._of_source.items()}
        self._whereabouts = {
            source: Whereabouts(source, found[:, 0], found[:, 1] - 1) for source, found in columns.items()
        }
        self.pool = SparingPool(pool, {(place.source, place.shard, place.line): i for i, place in enumerate(documents)})
        self._appearances: list[Appearance] = []
        self._drops: list[set[Drop]] = [set() for _ in documents]
        self.steps_drawn = 0  # steps of single lanes so far

    def find(self, anchors: Iterable[Anchor], steps: int) -> History:
        """Find all rows of the steps that a run has trained.

        Args:
            anchors: states that the run has recorded after steps that it has trained, in the order of steps.
            steps: that it has trained.
        Raises: CheckpointError if the lanes do not come out as the run recorded them; ShardError if a shard changed.
        """
        here = Anchor(0, self._plan.first_state())
        for anchor in anchors:
            while here.step < anchor.step:
                here = self._pass_to(here, anchor)
        while here.step < steps:
            here = self._draw(here, here.state.lanes, steps)
        self._appearances.sort(key=lambda found: (found.step, found.slot))
        return History(self._appearances, self._drops, self._read(here.state))

    def _read(self, state: LoaderState) -> list[list[int]]:
        """Return the epochs that a state has done with each document."""
        sources = self._plan.sources(state)
        read: list[list[int]] = [[] for _ in self._drops]
        for one in self._whereabouts.values():
            done = one.standing(state, sources, one.epochs(state, sources)).drawn == ALL
            for number, epochs in zip(self._of_source[one.source], done.T, strict=True):
                read[number] = np.flatnonzero(epochs).tolist()
        return read

    def _pass_to(self, here: Anchor, there: Anchor) -> Anchor:
        """Draw what must be drawn up to the next recorded state, or up to a stage before it that deals other lanes."""
        lanes = self._lanes_between(here.state, there.state)
        if lanes is None:
            return there
        dealt = {self._plan.lanes_of[stage] for stage in range(here.state.stage, there.state.stage + 1)}
        batches = self._batches_before(there.state) - self._batches_before(here.state)
        if len(dealt) > 1 or batches != there.step - here.step:
            found = self._draw(here, here.state.lanes, there.step)
            self._check(found, there)
            return found
        names = [str(lane) for lane in sorted(lanes)]
        self.pool.learn(msgspec.structs.replace(there.state, lanes={name: there.state.lanes[name] for name in names}))
        self._check(self._draw(here, names, there.step), there)
        return there

    def _lanes_between(self, here: LoaderState, there: LoaderState) -> set[int] | None:
        """Return the lanes that have read one of the documents between two states; None if none has.

        They are those of the second state, where it deals other lanes than the first.
        """
        between: set[int] = set()
        before, after = self._plan.sources(here), self._plan.sources(there)
        for one in self._whereabouts.values():
            epochs = one.epochs(there, after)
            was, now = one.standing(here, before, epochs), one.standing(there, after, epochs)
            if here.stage == there.stage:
                found = np.argwhere(now.drawn > was.drawn).tolist()
                between |= {
                    int(was.lanes[pair])
                    for pair in map(tuple, found)
                    if self._is_drawn(one, after[one.source], was, now, *pair)
                }
            else:
                lanes = np.where(was.lanes < 0, now.lanes, was.lanes)
                between |= set(lanes[now.begun & (was.drawn < ALL)].tolist())
        return between or None

    def _is_drawn(
        self, one: Whereabouts, source: Source, was: Standing, now: Standing, epoch: int, document: int
    ) -> bool:
        """Return whether a row with a document has been drawn between two states of one stage."""
        contents = self._contents(one.name(was, source, epoch, document), source)
        drawn = range(int(was.drawn[epoch, document]), int(now.drawn[epoch, document]))
        number = self._of_source[one.source][document]
        return any(row in drawn for row, pieces in contents.pieces.items() if number in {p.document for p in pieces})

    def _contents(self, name: WindowId, source: Source) -> Contents:
        """Return what a window has of the documents, and note which of its records gave none."""
        contents = self.pool.contents(name, source)
        for drop in contents.drops:
            self._drops[drop.document].add(drop)
        return contents

    def _batches_before(self, state: LoaderState) -> int:
        """Count the batches up to a state, those without a row included, which are no steps."""
        stage = self._plan.stages[state.stage]
        return stage.step + (state.rows - state.first_row) // stage.global_batch_size

    def _draw(self, here: Anchor, lanes: Iterable[str], stop: int) -> Anchor:
        """Draw lanes up to a step, or up to a stage that deals other lanes; note what is found, and return where."""
        step, state = here.step, here.state
        state = msgspec.structs.replace(state, lanes={lane: state.lanes[lane] for lane in lanes})
        is_whole = len(state.lanes) == state.num_lanes
        self.pool.learn(state)
        leg: Leg | None = None
        while step < stop:
            if leg is None or self._plan.ends_stage(state):
                state = _stands(state, leg)
                if self._plan.ends_stage(state):
                    state = self._plan.next_state(state)
                    if self._plan.lanes_of[state.stage - 1] != state.num_lanes:
                        return Anchor(step, state)
                stage, sources = self._plan.stages[state.stage], self._plan.sources(state)
                leg = Leg(stage, self._plan.end_of(state), state, sources, Ranks(0, 1), self.pool)
            draws = list(leg.draws(state.rows))
            state = msgspec.structs.replace(state, rows=state.rows + leg.stage.global_batch_size)
            self._note(leg, step + 1, draws)
            self.steps_drawn += len(state.lanes)
            if not is_whole or any(draw.row for _, draw in draws):
                step += 1
            else:  # a batch without a row is no step, as in training
                state = msgspec.structs.replace(state, empty_rows=state.empty_rows + leg.stage.global_batch_size)
        return Anchor(step, _stands(state, leg))

    def _note(self, leg: Leg, step: int, draws: Iterable[tuple[int, Draw]]) -> None:
        """Note the documents in the rows of a step."""
        for slot, (row, _) in draws:
            if row is None or (one := self._whereabouts.get(row.name.source)) is None:
                continue
            source = leg.sources[row.name.source]
            if not one.reads(row.name, source):
                continue
            epoch, contents = source.epoch(row.name), self._contents(row.name, source)
            for number, _, start, stop, forgotten in contents.pieces.get(row.number, ()):
                self._appearances.append(Appearance(number, step, slot, start, stop, epoch, forgotten))

    def _check(self, found: Anchor, there: Anchor) -> None:
        """Check that lanes stand where the run recorded them. Raises: CheckpointError if one does not."""
        if found.step < there.step:
            return
        for lane, stands in found.state.lanes.items():
            if _plain(stands) != _plain(there.state.lanes[lane]):
                raise CheckpointError(
                    f"drawn again up to step {there.step}, lane {lane} does not stand where the run recorded it; the "
                    "shards, the tokenizer or the program have changed"
                )


def _stands(state: LoaderState, leg: Leg | None) -> LoaderState:
    """Return a state with the cursors of lanes that have been drawn since."""
    if leg is None:
        return state
    return msgspec.structs.replace(state, lanes={str(number): lane.cursor() for number, lane in leg.lanes.items()})


def _plain(stands: LaneCursor) -> LaneCursor:
    """Leave out counts of bad records, which only windows that are made know, and what older programs do not record."""
    cursors = tuple(cursor._replace(skipped=0, window_rows=0) for cursor in stands.sources)
    return msgspec.structs.replace(stands, sources=cursors)
