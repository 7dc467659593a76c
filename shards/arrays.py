"""Array types that the whole package uses, and grouping of consecutive cells by size."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


def greedy_groups(offsets: Ints, bounds: Ints, limit: int) -> Ints:
    """Group consecutive cells, each group as long as it stays within `limit` bytes; a larger cell is its own group.

    Args:
        offsets: int64 [cells + 1], rising: where each cell begins and where the last one ends, in bytes.
        bounds: int64 [n + 1], rising: cells at which a group must begin (a shard's first); the last is the end of all.
        limit: bytes per group.
    Returns: int64 [groups], the first cell of each group.
    """
    current, stop = bounds[:-1], bounds[1:]
    starts = []
    # One iteration makes one group in every shard, so the loop runs as often as the longest shard has groups.
    while True:
        unfinished = current < stop
        current, stop = current[unfinished], stop[unfinished]
        if not current.size:
            break
        starts.append(current)
        reach = np.searchsorted(offsets, offsets[current] + limit, side="right") - 1
        current = np.minimum(np.maximum(reach, current + 1), stop)
    return np.sort(np.concatenate(starts)) if starts else np.zeros(0, np.int64)
