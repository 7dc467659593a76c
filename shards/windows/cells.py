"""The lines of spans, cut from their cells, with a cache of divided cells. decoders -> cells -> window.

If segments are smaller than a cell, the windows of all lanes want parts of the same cells, which are decoded and
verified as a whole. A cache makes sure that a small corpus is decoded about once, however finely it is dealt.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from shards.arrays import Ints
from shards.errors import ShardError
from shards.index.decoders import Decoders, RawRange
from shards.plan.segments import Span

_CACHED_BYTES = 32 << 20  # raw bytes per process
LINE_FEED = 10


class Cells:
    """Cells decoded on demand, of which the last used are kept."""

    def __init__(self, decoders: Decoders) -> None:
        self._decoders = decoders
        self._cached: OrderedDict[tuple[str, int, int], tuple[bytes, Ints]] = OrderedDict()  # least recently used first
        self._cached_bytes = 0

    def lines(self, span: Span, wanted: RawRange) -> bytes:
        """Return the bytes of a span's lines.

        Args:
            wanted: the span's cells.
        Raises: ShardError if they cannot be read, or do not hold as many lines as the index says.
        """
        if span.num_records == span.cells_records:
            return self._read(span, wanted)
        name = (wanted.path, wanted.start, wanted.stop)
        if name not in self._cached:
            raw = self._read(span, wanted)
            feeds = np.flatnonzero(np.frombuffer(raw, np.uint8) == LINE_FEED) + 1
            self._cached[name] = raw, np.concatenate([[0], feeds, [len(raw)]])  # offsets where lines begin
            self._cached_bytes += len(raw)
            while self._cached_bytes > _CACHED_BYTES and len(self._cached) > 1:
                self._cached_bytes -= len(self._cached.popitem(last=False)[1][0])
        self._cached.move_to_end(name)
        raw, begins = self._cached[name]
        first = span.first_record - span.cells_record
        return raw[int(begins[first]) : int(begins[first + span.num_records])]

    def _read(self, span: Span, wanted: RawRange) -> bytes:
        raw = self._decoders.read(wanted)
        num_records = raw.count(b"\n") + (not raw.endswith(b"\n"))
        if num_records != span.cells_records:
            raise ShardError(
                f"{wanted.path}: raw bytes {wanted.start} to {wanted.stop} hold {num_records} lines, but its index "
                f"says {span.cells_records}; it changed after it was indexed: put the old file back, or start a new run"
            )
        return raw
