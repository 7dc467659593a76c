"""From the last cursors of a stage to the first of the next one. lane, source -> carry -> loader.

What stays goes on exactly where it was. With as many lanes as before, a lane keeps its cursors; a window in progress is
cut, and its rest packed again, only if the next stage packs otherwise. With other lanes, the windows of the deals in
progress are dealt to the new lanes in turn, and after them all segments that no lane has begun.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import msgspec
import numpy as np

from shards.plan.cursor import EVERY_SEGMENT, Carried, Cursor, Cut, LaneCursor, LoaderState, Numbering
from shards.source import Source
from shards.stages import Stage, weights_at

Lanes = dict[int, LaneCursor]


def next_state(
    state: LoaderState, before: Stage, after: Stage, num_lanes: int, sources: Sequence[Source]
) -> LoaderState:
    """Return the state in which a stage begins.

    Args:
        state: the last state of the stage before. If the number of lanes changes, it must hold all lanes.
        before, after: the two stages.
        num_lanes: V of the stage that begins.
        sources: the sources as the stage before deals them.
    """
    lanes = {int(number): lane for number, lane in state.lanes.items()}
    numberings = state.numberings or ((EVERY_SEGMENT,) * len(sources),)
    numbered, rows = numberings[-1], state.rows
    if num_lanes != state.num_lanes:
        assert len(lanes) == state.num_lanes, "the windows of lanes that are not here cannot be dealt"
        lanes = {number: _cut(number, lane, state.stage, sources) for number, lane in lanes.items()}
        numbered, rows = tuple(_numbering_after(source, lanes) for source in sources), 0
        lanes = _dealt_again(lanes, num_lanes, state.stage, sources)
    elif _packing_of(before) != _packing_of(after):
        lanes = {number: _cut(number, lane, state.stage, sources) for number, lane in lanes.items()}
    now = weights_at(after.data, after.step)
    for number, lane in lanes.items():
        was = weights_at(before.data, _last_step(number, state, before))
        if any(was.get(name, 0.0) != weight for name, weight in now.items()):
            lanes[number] = msgspec.structs.replace(lane, mixing_rows=0)
    added = len(after.data.sources) - len(sources)
    cursors = (Cursor(),) * added
    return LoaderState(
        version=state.version,
        rows=rows,
        num_lanes=num_lanes,
        source_names=tuple(source.name for source in after.data.sources),
        lanes={str(v): msgspec.structs.replace(lane, sources=lane.sources + cursors) for v, lane in lanes.items()},
        stage=state.stage + 1,
        first_row=rows,
        numberings=(*numberings, numbered + (EVERY_SEGMENT,) * added),
    )


def _packing_of(stage: Stage) -> tuple[object, ...]:
    """Return what decides the rows that a window gives."""
    return stage.data.seq_len, stage.data.packing, stage.data.decontaminate


def _last_step(number: int, state: LoaderState, stage: Stage) -> int:
    """Return the step of the stage's last row of a lane; the stage's first one, if the lane had none."""
    rows = range(number, state.rows, state.num_lanes)
    last = max(rows[-1] if rows else 0, state.first_row)
    return stage.step + (last - state.first_row) // stage.global_batch_size


def _cut(number: int, lane: LaneCursor, stage: int, sources: Sequence[Source]) -> LaneCursor:
    """Cut a lane's windows in progress, so that its cursors' own windows are all untouched."""
    cursors, carried = list(lane.sources), dict(lane.carried)
    for source in sources:
        i = source.number
        cursor, left = cursors[i], carried.pop(str(i), ())
        if cursor.row:
            window = left[0] if left else Carried(stage, number, cursor.segment, cursor.window)
            if not left:
                deal = source.deal(number, cursor.segment)
                is_last = cursor.window + 1 == len(deal.windows)
                cursor = cursor._replace(
                    segment=deal.next if is_last else cursor.segment, window=0 if is_last else cursor.window + 1
                )
            # States of older programs do not know how many rows the window has
            cut = Cut(stage, cursor.row, cursor.window_rows or cursor.row)
            rest = () if cursor.row == cursor.window_rows else (window._replace(cuts=(*window.cuts, cut)),)
            left = rest + left[1:]
            cursors[i] = cursor._replace(row=0, window_rows=0)
        if left:
            carried[str(i)] = left
    return msgspec.structs.replace(lane, sources=tuple(cursors), carried=carried)


def _next_segment(source: Source, number: int, cursor: Cursor) -> int:
    """Return the first segment that a lane, its windows cut, has not begun."""
    return source.deal(number, cursor.segment).next if cursor.window else cursor.segment


def _numbering_after(source: Source, lanes: Lanes) -> Numbering:
    """Return the segments of a source that no lane has begun."""
    begun = np.array([_next_segment(source, v, lanes[v].sources[source.number]) for v in range(len(lanes))])
    gaps = source.rule.numbering.gaps
    stop = max(int(begun.max()) * len(lanes), len(gaps))
    places = np.arange(stop)
    left = places[places // len(lanes) >= begun[places % len(lanes)]]
    first = int(source.plan.number_of(np.array([stop]))[0])
    return Numbering(first, tuple(source.plan.number_of(left).tolist()))


def _dealt_again(lanes: Lanes, num_lanes: int, stage: int, sources: Sequence[Source]) -> Lanes:
    """Deal the windows that are left of the lanes' deals in progress to other lanes."""
    dealt = {v: LaneCursor(0, 0, (Cursor(),) * len(sources), {}) for v in range(num_lanes)}
    for source in sources:
        i = source.number
        left = list(itertools.chain.from_iterable(_left(source, v, lanes[v], stage) for v in range(len(lanes))))
        drawn = sum(lane.sources[i].rows_drawn for lane in lanes.values())
        skipped = sum(lane.sources[i].skipped for lane in lanes.values())
        for v, lane in dealt.items():
            cursors = list(lane.sources)
            # Counts since the run's start, spread so that no rank seems to have all of them
            cursors[i] = Cursor(rows_drawn=len(range(v, drawn, num_lanes)), skipped=len(range(v, skipped, num_lanes)))
            carried = lane.carried | ({str(i): tuple(left[v::num_lanes])} if left[v::num_lanes] else {})
            dealt[v] = msgspec.structs.replace(lane, sources=tuple(cursors), carried=carried)
    return dealt


def _left(source: Source, number: int, lane: LaneCursor, stage: int) -> list[Carried]:
    """List the windows that are left of a lane's deal in progress, and those that it was left itself."""
    cursor = lane.sources[source.number]
    windows = range(cursor.window, len(source.deal(number, cursor.segment).windows)) if cursor.window else ()
    own = [Carried(stage, number, cursor.segment, window) for window in windows]
    return [*lane.carried.get(str(source.number), ()), *own]
