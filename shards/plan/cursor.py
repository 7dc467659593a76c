"""The lanes' positions: typed, versioned, JSON-able. lane -> cursor -> checkpoint, and back.

A state is a cursor, never a buffer: it names the next row of each lane, from which the rows are made again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from shards.errors import CheckpointError

LOADER_STATE_VERSION = 1


class Cursor(NamedTuple):
    """The position of a lane in one source."""

    rows_drawn: int = 0  # rows since the run's start
    segment: int = 0  # number of segments finished by the lane: the current deal begins with its q-th
    window: int = 0  # number in the deal
    row: int = 0  # the next row in the window; may be one past its last
    skipped: int = 0  # bad records in the windows entered so far
    window_rows: int = 0  # rows of the window, once one was drawn; 0 in the states of older programs


class Cut(NamedTuple):
    """Rows drawn from a window in a stage that ended before it did; the next stage packs the rest in its own way."""

    stage: int  # number of the stage
    rows: int  # the first rows of the window, as that stage packed it
    of: int  # rows that it had


class Carried(NamedTuple):
    """A window that a stage has left to the next one."""

    stage: int  # number of the stage in whose plan it has this name
    lane: int
    segment: int
    window: int
    cuts: tuple[Cut, ...] = ()


class LaneCursor(msgspec.Struct, frozen=True, omit_defaults=True):
    """The position of a lane."""

    rows: int  # rows yielded since the number of lanes was chosen, including empty ones
    mixing_rows: int  # rows drawn since the weights last changed or a source was exhausted
    sources: tuple[Cursor, ...]  # in the config's order
    # Windows to read before the cursor's own, by number of the source; while there are any, a cursor's row is in the
    # first of them
    carried: dict[str, tuple[Carried, ...]] = {}


class Numbering(NamedTuple):
    """The segments of a source that a stage deals: those in `gaps`, then all from number `first` on.

    A number counts the segments of all epochs' permutations in turn.
    """

    first: int = 0
    gaps: tuple[int, ...] = ()  # rising, below `first`


EVERY_SEGMENT = Numbering()


class LoaderState(msgspec.Struct, frozen=True, omit_defaults=True):
    """The positions of some or all lanes of a run, between two global batches."""

    version: int
    rows: int  # rows of all lanes since the number of lanes was chosen: at the run's start, or by a stage
    num_lanes: int  # V
    source_names: tuple[str, ...]
    lanes: dict[str, LaneCursor]  # by lane number
    stage: int = 0  # number of the run's stage
    first_row: int = 0  # `rows` when the stage began
    empty_rows: int = 0  # of `rows`, those since the stage began of global batches without a row, which are no steps
    numberings: tuple[tuple[Numbering, ...], ...] = ()  # of each source in each stage up to this; none in the first

    def to_dict(self) -> dict[str, object]:
        """Return plain dicts, lists, numbers and strings."""
        plain: dict[str, object] = msgspec.to_builtins(self)
        return plain

    @staticmethod
    def from_dict(state: Mapping[str, object]) -> LoaderState:
        """Read what `to_dict` returned. Raises: CheckpointError if `state` does not come from this version of it."""
        if state.get("version") != LOADER_STATE_VERSION:
            raise CheckpointError(
                f"loader state has version {state.get('version')!r}; this program reads {LOADER_STATE_VERSION}"
            )
        try:
            return msgspec.convert(dict(state), LoaderState)
        except msgspec.ValidationError as error:
            raise CheckpointError(f"loader state is damaged: {error}") from None


def merge_states(states: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """Join the states that all ranks took after the same step into one with all lanes, valid for every dp_size.

    Raises: CheckpointError if they are of different steps or runs, a lane is missing, or two states differ in a lane.
    """
    if not states:
        raise CheckpointError("no loader state to merge")
    parts = [LoaderState.from_dict(state) for state in states]
    first = parts[0]
    lanes: dict[str, LaneCursor] = {}
    for part in parts:
        for name in ("rows", "num_lanes", "source_names", "stage", "first_row", "empty_rows", "numberings"):
            if getattr(part, name) != getattr(first, name):
                raise CheckpointError(
                    f"loader states differ in {name}: {getattr(first, name)!r} and {getattr(part, name)!r}; "
                    "merge states that all ranks took after the same step"
                )
        for lane, cursor in part.lanes.items():
            if lanes.setdefault(lane, cursor) != cursor:  # ranks that share a lane each read all of its rows
                raise CheckpointError(f"loader states differ in lane {lane}: {lanes[lane]} and {cursor}")
    missing = [lane for lane in range(first.num_lanes) if str(lane) not in lanes]
    if missing:
        raise CheckpointError(
            f"loader states lack lane {missing[0]} of {first.num_lanes} (and {len(missing) - 1} more)"
        )
    merged = {str(lane): lanes[str(lane)] for lane in range(first.num_lanes)}
    return msgspec.structs.replace(first, lanes=merged).to_dict()
