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


class LaneCursor(msgspec.Struct, frozen=True):
    """The position of a lane."""

    rows: int  # rows yielded since the run's start, including empty ones
    mixing_rows: int  # rows drawn since the weights last changed or a source was exhausted
    sources: tuple[Cursor, ...]  # in the config's order


class LoaderState(msgspec.Struct, frozen=True):
    """The positions of some or all lanes of a run, between two global batches."""

    version: int
    rows: int  # rows of all lanes since the run's start
    num_lanes: int  # V
    source_names: tuple[str, ...]
    lanes: dict[str, LaneCursor]  # by lane number

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
        for name in ("rows", "num_lanes", "source_names"):
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
