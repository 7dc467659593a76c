"""The windows that the lanes of one rank will take: which are requested, when they are due, which are ready.

lane, worker_pool -> prefetch -> loader. Windows are requested before lanes need them, the most urgent first, up to a
bound in bytes. That decides only when a window is made, never which rows a lane yields.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence

from shards.config import DataConfig
from shards.lane import Lane, Stream
from shards.plan.segments import WindowId
from shards.windows.window import Window
from shards.windows.worker_pool import NOW, Pool, WindowRequest

_WINDOWS_PER_STREAM = 2
_BYTES_PER_TOKEN = 4  # approximate raw text per token, used only to guess when a window will be needed


class _Queue:
    """The windows of one stream that are requested but not yet taken, in the order in which its lane takes them."""

    def __init__(self, lane: Lane, stream: Stream) -> None:
        self.lane, self.stream = lane, stream
        self.requests: deque[WindowRequest] = deque()
        self.next = stream.position  # the first window not yet requested; None = the source has no more


class Prefetcher:
    """The supply of windows for the lanes of one rank, which keeps the pool busy with what they will need next."""

    def __init__(
        self,
        pool: Pool,
        lanes: Sequence[Lane],
        num_lanes: int,
        weightings: Sequence[tuple[int, Sequence[float]]],
        config: DataConfig,
    ) -> None:
        """Request the first windows.

        Args:
            num_lanes: V, including the lanes of other ranks.
            weightings: (row of the run from which they apply, weights of the sources), in order.
            config: its `prefetch_bytes` bound the raw bytes of windows requested but not taken. `pool.ahead` windows
            are
                always allowed, and never more than a few per stream, since small ones would not fill the bytes.
        """
        self._pool, self._num_lanes, self._weightings = pool, num_lanes, weightings
        self._max_bytes, self._bytes_per_row = config.prefetch_bytes, _BYTES_PER_TOKEN * (config.seq_len + 1)
        self._queues = {(stream.number, lane.number): _Queue(lane, stream) for lane in lanes for stream in lane.streams}
        self._max_windows = _WINDOWS_PER_STREAM * len(self._queues)
        self._windows = self._bytes = 0  # totals over all queues
        self._due: list[tuple[int, int, int]] = []  # heap: (row of its lane that needs a queue's next, source, lane)
        if pool.ahead:
            for queue in self._queues.values():
                self._schedule(queue)
            self.fill()

    def take(self, lane: int, name: WindowId) -> Window:
        """Wait for the next window of a lane's stream, requested or not, and return it.

        Raises: what making it raised.
        """
        queue = self._queues[name.source, lane]
        if not queue.requests:
            self._request(queue, NOW)
        request = queue.requests.popleft()
        assert request.name == name, (request.name, name)
        self._windows -= 1
        self._bytes -= request.task.raw_bytes
        return self._pool.wait_for(request)

    def fill(self) -> None:
        """Request what is due next, as much as is allowed. Lanes must be between two draws."""
        while self._due and (self._has_room() or self._windows < self._pool.ahead):
            due, *key = heapq.heappop(self._due)
            queue = self._queues[key[0], key[1]]
            if queue.next is not None:
                self._request(queue, due)
                self._schedule(queue)

    def _has_room(self) -> bool:
        return self._bytes < self._max_bytes and self._windows < self._max_windows

    def _request(self, queue: _Queue, due: float) -> None:
        name = queue.next
        assert name is not None
        request = WindowRequest(name, queue.stream.source.task(name), due)
        self._pool.submit(request)
        queue.requests.append(request)
        queue.next = queue.stream.after(name)
        self._windows += 1
        self._bytes += request.task.raw_bytes

    def _schedule(self, queue: _Queue) -> None:
        """Record about when a queue's next window will be needed, if ever."""
        lane, stream = queue.lane, queue.stream
        weightings = [(-(-(row - lane.number) // self._num_lanes), weights) for row, weights in self._weightings]
        guessed = sum(request.task.raw_bytes for request in queue.requests) // self._bytes_per_row
        due = lane.row_of_use(stream.number, stream.rows_left + guessed, weightings)
        if due is not None:
            heapq.heappush(self._due, (due, stream.number, lane.number))
