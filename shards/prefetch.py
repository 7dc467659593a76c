"""Asks for windows before lanes need them, the most urgent first, bounded in bytes. lane -> prefetch -> worker_pool.

It decides only when a window is made, never which rows a lane gives out.
"""

import heapq
from collections import defaultdict, deque
from collections.abc import Sequence

from shards.lane import Lane
from shards.plan.segments import WindowId
from shards.windows.worker_pool import Pool

WINDOWS_PER_STREAM = 2


class Prefetcher:
    """Keeps the pool busy with what the lanes of one rank will need next."""

    def __init__(
        self,
        pool: Pool,
        lanes: Sequence[Lane],
        num_lanes: int,
        stages: Sequence[tuple[int, Sequence[float]]],
        max_bytes: int,
    ) -> None:
        """
        Args:
            num_lanes: V, those of other ranks counted.
            stages: (row of the run from which they count, weights of the sources), in their order.
            max_bytes: raw bytes of windows that are requested and not taken; `pool.ahead` windows are always allowed,
                and never more than a few per stream, which small windows would not fill the bytes with.
        """
        self._pool, self._num_lanes, self._stages, self._max_bytes = pool, num_lanes, stages, max_bytes
        self._lanes = {lane.number: lane for lane in lanes}
        self._max_windows = WINDOWS_PER_STREAM * sum(len(lane.streams) for lane in lanes)
        # By (source, lane) the windows requested and not taken, in their order, with their raw bytes.
        self._requested: defaultdict[tuple[int, int], deque[tuple[WindowId, int]]] = defaultdict(deque)
        self._windows = self._bytes = 0  # of all of them
        self._next: list[tuple[int, int, int]] = []  # heap: (row of its lane that needs it, lane, source)
        if pool.ahead:
            for lane in lanes:
                for source in range(len(lane.streams)):
                    self._offer(lane, source)
            self._fill()

    def taken(self, name: WindowId) -> None:
        """Takes note that a lane drew from this window, maybe for the first time."""
        requested = self._requested[name.source, name.lane]
        before = self._windows
        # Those before it that gave no row were taken, too.
        while requested and requested[0][0] <= name:
            self._bytes -= requested.popleft()[1]
            self._windows -= 1
        if self._windows < before:
            self._fill()

    def _fill(self) -> None:
        while self._next and (self._has_room() or self._windows < self._pool.ahead):
            due, number, source = heapq.heappop(self._next)
            lane = self._lanes[number]
            stream = lane.streams[source]
            wanted = stream.next_request()
            if wanted is None:
                continue
            name, task = wanted
            self._pool.request(name, task, due)
            stream.requested(task)
            self._requested[name.source, name.lane].append((name, task.raw_bytes))
            self._bytes += task.raw_bytes
            self._windows += 1
            self._offer(lane, source)

    def _has_room(self) -> bool:
        return self._bytes < self._max_bytes and self._windows < self._max_windows

    def _offer(self, lane: Lane, source: int) -> None:
        """Puts a stream's next window in line."""
        stages = [(-(-(row - lane.number) // self._num_lanes), weights) for row, weights in self._stages]
        due = lane.row_of_use(source, lane.streams[source].rows_until_request(), stages)
        if due is not None:
            heapq.heappush(self._next, (due, lane.number, source))
