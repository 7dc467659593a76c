"""The cells of a source of which some records are taken, and where they lie in their shards. record tables -> segments.

A cell is decoded and verified as a whole, whatever is taken of it. So the plan counts the records that are taken, and
their share of a cell's bytes, and a span names the whole cells that hold its records.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from shards.arrays import Ints

Range = tuple[int, int]  # the first record of a shard that is taken, and one past the last


class TakenCells(NamedTuple):
    """The cells of a source that hold records that are taken. Only the first and the last of them may be cut.

    Attributes:
        tables: of each shard, int64 [cells + 1, 2]: the records and raw bytes that are taken before each cell, and of
            all. A cell that is cut has a share of its bytes, as if all its records had equal length.
        skipped: int64 [shards], the first record that is taken.
        shifts: int64 [shards, 2], what to add to a place in the concatenation of `tables` to get the record and raw
            offset in the shard; right for bounds beside no cell that is cut.
        head, tail: record and raw offset, in their shards, where the first cell of all begins and the last one ends.
    """

    tables: list[Ints]
    skipped: Ints
    shifts: Ints
    head: tuple[int, int]
    tail: tuple[int, int]

    @property
    def raw_bytes(self) -> int:
        """Return the raw bytes that are taken, about."""
        return sum(int(table[-1, 1]) for table in self.tables)


def taken_cells(tables: Sequence[Ints], taken: Sequence[Range]) -> TakenCells:
    """Find the cells that hold what is taken.

    Args:
        tables: of each shard, int64 [cells + 1, 2]: each cell's first record and raw offset; last, the shard's end.
        taken: of each shard; all of them together are consecutive records of the source.
    """
    counted = [np.zeros((1, 2), np.int64) for _ in tables]
    shifts = np.zeros((len(tables), 2), np.int64)
    bounds: list[Ints] = []
    base = np.zeros(2, np.int64)
    for number, (table, (first, stop)) in enumerate(zip(tables, taken, strict=True)):
        if first >= stop:
            continue
        begin, end = np.searchsorted(table[:, 0], [first, stop], side="right").tolist()
        cells = table[begin - 1 : end + (table[end - 1, 0] < stop)]
        records = np.diff(np.clip(cells[:, 0], first, stop))
        sizes = np.diff(cells[:, 1]) * records // np.maximum(1, np.diff(cells[:, 0]))
        counted[number] = np.concatenate([np.zeros((1, 2), np.int64), np.cumsum([records, sizes], axis=1).T])
        uncut = int(cells[0, 0] < first)  # the first bound without a cell before it that is cut
        shifts[number] = cells[uncut] - counted[number][uncut] - base
        base += counted[number][-1]
        bounds += [cells[0], cells[-1]]
    head, tail = (tuple(bound.tolist()) for bound in ((bounds[0], bounds[-1]) if bounds else (base, base)))
    return TakenCells(counted, np.array([first for first, _ in taken], np.int64), shifts, head, tail)
