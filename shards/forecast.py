"""How long the data will last and what share each source will have. source, window -> forecast -> loader.

The forecast is a pure function of data and config, so every start of a run makes the same one. Small data is tokenized
in full and packed as in training; of large data, a bounded sample is.
"""

from __future__ import annotations

import bisect
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from shards.arrays import Ints
from shards.config import DataConfig
from shards.errors import ShardError
from shards.hashing import GOLDEN, key_of, mixed
from shards.plan.segments import WindowId
from shards.source import DealRule, Source
from shards.stages import Stage
from shards.windows.packing import pack
from shards.windows.window import SpanTask, WindowMaker, WindowTask

_logger = logging.getLogger(__name__)

COUNTED_BYTES = 8 << 20  # raw bytes of all sources together up to which every document is tokenized
SAMPLE_BYTES = 4 << 20  # raw bytes tokenized of larger data
_PACKED_RECORDS = 500_000  # most records to pack, over all epochs
_DRAWN_RECORDS = 5_000_000  # over all epochs; with more, lanes are long enough to be equally long
_SEARCHED_BYTES = 64 << 20  # raw bytes tokenized at most until a source has given a row
PACKED_WINDOWS = 2000  # most windows to pack, over all epochs
_DECODED_PER_BYTE = 16  # most raw bytes decoded per byte of a sample that is tokenized: small segments lie far apart
_NEARLY = 0.99  # fraction of the requested share that counts as met

Figures = npt.NDArray[np.float64]


class Shortfall(NamedTuple):
    """A source that runs out before the run ends."""

    source: str
    step: int  # approximate step at which it has been read max_epochs times
    wished: float  # share of the run's rows that the weights ask for
    met: float  # share of the rows that it provides


class Forecast(NamedTuple):
    """How long the data lasts and how its sources are drawn.

    Attributes:
        last_step: the step at which the data ends; None if it never does.
        is_exact: True if last_step was counted, not estimated from a sample.
        share_read: fraction of the rows granted by max_epochs that the run reads; None if some source has no limit.
        shortfalls: the sources whose weight is not met, in the config's order.
        unreached: the step of the first stage that never begins, since the data ends before; None if all do.
    """

    last_step: int | None
    is_exact: bool
    share_read: float | None
    shortfalls: tuple[Shortfall, ...]
    unreached: int | None = None


class _Pace:
    """Rows drawn by a step, counted in rows as long as the first stage's, and back."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        first = stages[0]
        self._steps = [stage.step for stage in stages]
        self._per_step = [stage.global_batch_size * stage.data.seq_len / first.data.seq_len for stage in stages]
        self._rows = [0.0]
        for (a, b), each in zip(itertools.pairwise(self._steps), self._per_step, strict=False):
            self._rows.append(self._rows[-1] + (b - a) * each)

    def rows(self, step: float) -> float:
        """Return the rows drawn when `step` steps are done."""
        i = bisect.bisect_right(self._steps, step) - 1
        return self._rows[i] + (step - self._steps[i]) * self._per_step[i]

    def step(self, rows: float) -> int:
        """Return the step in which so many rows are reached."""
        i = bisect.bisect_right(self._rows, rows) - 1
        return math.ceil(self._steps[i] + (rows - self._rows[i]) / self._per_step[i])


def _weightings(stages: Sequence[Stage], num_sources: int) -> list[tuple[int, tuple[float, ...]]]:
    """Return (first step, weights of all sources) wherever they may change, in order."""
    found = []
    for stage, end in zip(stages, [*(stage.step for stage in stages[1:]), math.inf], strict=True):
        for step, weights in stage.data.weightings():
            if step < end:
                found.append((max(step, stage.step), weights + (0.0,) * (num_sources - len(weights))))
    return found


def forecast(
    stages: Sequence[Stage], maker: WindowMaker, sources: Sequence[Source], lanes: int, steps: int | None
) -> Forecast:
    """Forecast a run. Where it has several stages, rows are counted as the first one packs them.

    Args:
        maker: makes the windows that are tokenized; closed when done.
        sources: those of all stages, as the first deals them.
        lanes: V of the first.
        steps: optimizer steps that the run should have; None = as many as the data lasts.
    Raises: ShardError if the data that is looked at cannot be read, or a source keeps nothing of it.
    """
    config, global_batch_size, pace = stages[0].data, stages[0].global_batch_size, _Pace(stages)
    weightings = _weightings(stages, len(sources))
    drawn = [i for i in range(len(sources)) if any(weights[i] > 0 for _, weights in weightings)]
    limited = [i for i in drawn if sources[i].config.max_epochs is not None]
    if not limited:
        return Forecast(None, is_exact=True, share_read=None, shortfalls=())
    rows, is_counted = _rows_of_lanes(config, maker, [sources[i] for i in limited], lanes)
    supply = [math.inf] * len(sources)
    for i, of_source in zip(limited, rows, strict=True):
        supply[i] = float(of_source.sum())
    starts = [(pace.rows(step), weights) for step, weights in weightings]
    end, _, _ = _drain(supply, starts, math.inf)
    last_step = None if math.isinf(end) else pace.step(end)
    if last_step is not None and len(weightings) == 1:
        last_step = _last_step(rows.sum(axis=0), global_batch_size)
    total = (last_step if steps is None else steps if last_step is None else min(steps, last_step)) or 0
    _, met, _ = _drain(supply, starts, pace.rows(total))
    granted = sum(supply[i] for i in drawn)
    return Forecast(
        last_step=last_step,
        is_exact=is_counted and len(weightings) == 1 and lanes <= global_batch_size,
        share_read=None if math.isinf(granted) else min(1.0, sum(met) / max(1.0, granted)),
        shortfalls=tuple(_shortfalls(sources, supply, starts, total, pace)),
        unreached=next((stage.step for stage in stages[1:] if _ends_before(stage.step, supply, starts, pace)), None),
    )


def _ends_before(
    step: int, supply: Sequence[float], weightings: Sequence[tuple[float, Sequence[float]]], pace: _Pace
) -> bool:
    """Return whether what is drawn before a stage begins has run out by then; the other arguments are `_drain`'s."""
    begin = pace.rows(step)
    end, _, _ = _drain(supply, [(row, weights) for row, weights in weightings if row < begin], math.inf)
    return end < begin


def _shortfalls(
    sources: Sequence[Source],
    supply: Sequence[float],
    weightings: Sequence[tuple[float, Sequence[float]]],
    steps: int,
    pace: _Pace,
) -> Iterator[Shortfall]:
    """Yield the sources that run out within `steps` and so provide less than their weight asks for.

    Args:
        supply, weightings: as for `_drain`.
    """
    rows = pace.rows(steps)
    _, met, empty = _drain(supply, weightings, rows)
    wished = _wished(weightings, rows)
    for i, source in enumerate(sources):
        share = met[i] / max(1.0, sum(met))
        if empty.get(i, rows) < rows and share < _NEARLY * wished[i]:
            yield Shortfall(source.config.name, pace.step(empty[i]), wished[i], share)


def _rows_of_lanes(
    config: DataConfig, maker: WindowMaker, sources: Sequence[Source], lanes: int
) -> tuple[Figures, bool]:
    """Count or estimate the rows of each lane from each source: [sources, V], and True if they were counted."""
    is_small = sum(source.plan.raw_bytes for source in sources) <= COUNTED_BYTES
    is_counted = is_small and _can_be_packed(sources, lanes)
    rows = np.zeros((len(sources), lanes))
    try:
        for i, source in enumerate(sources):
            if is_counted:
                rows[i] = _counted_rows(source, config, lanes, maker)
                _check_kept(source, rows[i])
            else:
                rows[i] = _estimated_rows(source, config, lanes, maker, SAMPLE_BYTES // len(sources))
    finally:
        maker.close()
    return rows, is_counted


def _check_kept(source: Source, rows: Figures) -> None:
    """Check that a source keeps some of its records. Raises: ShardError if none of them gives a row."""
    if source.config.selection and not rows.any():
        parts = " and ".join(source.config.selection_texts.values())
        raise ShardError(
            f"source {source.config.name!r}: {parts} leave no document of its {source.plan.num_records:,} records that "
            "gives a row; widen what they choose, or leave the source out"
        )


def _can_be_packed(sources: Sequence[Source], lanes: int) -> bool:
    """Return whether everything that max_epochs grants is small enough to pack at a start."""
    records = windows = 0
    for source in sources:
        epochs = source.config.max_epochs or 1
        limits = [source.plan.segments_of_lane(lane, 1) for lane in range(lanes)]
        records += epochs * source.plan.num_records
        windows += epochs * sum(1 for lane, limit in enumerate(limits) for _ in _windows(source, lane, limit))
    return records <= _PACKED_RECORDS and windows <= PACKED_WINDOWS


def _windows(source: Source, lane: int, segments: int) -> Iterator[WindowId]:
    """Yield the windows of a lane's first segments."""
    q = 0
    while q < segments:
        deal = source.deal(lane, q)
        yield from (WindowId(source.number, lane, q, window) for window in range(len(deal.windows)))
        q = deal.next


def _counted_rows(source: Source, config: DataConfig, lanes: int, maker: WindowMaker) -> Figures:
    """Count the rows of each lane, [V]: every document is tokenized once and packed as often as in training."""
    lengths = [np.full(shard.index.num_records, -1, np.int64) for shard in source.shards]  # -1: no document
    # Reading as a single lane of version 1 unpacks each cell once; each of many lanes would need most cells
    as_read = config.model_copy(update={"plan_version": 1, "sources": (*config.sources, source.config)})
    in_a_row = Source(as_read, len(config.sources), source.shards, 0, {0: DealRule(1, 1)})
    for name in _windows(in_a_row, 0, in_a_row.plan.num_segments):
        task = msgspec.structs.replace(in_a_row.task(name), source=source.number)
        found = maker.documents(task, skip_bad=True)
        for shard in set(found.shards.tolist()):
            chosen = found.shards == shard
            lengths[shard][found.lines[chosen] - 1] = found.lengths[chosen]
    rows = np.zeros(lanes)
    for lane in range(lanes):
        for name in _windows(source, lane, source.segments_of_lane(lane) or 0):
            spans = source.window(name).spans
            dealt = [lengths[s.shard][s.first_record : s.first_record + s.num_records] for s in spans]
            rows[lane] += _num_rows(np.concatenate(dealt), config, source.key(name))
    return rows


def _num_rows(lengths: Ints, config: DataConfig, key: int) -> int:
    found = lengths[lengths >= 0]
    return pack(np.zeros(int(found.sum()), np.uint16), found, config.seq_len, config.packing, key).num_rows


def _estimated_rows(source: Source, config: DataConfig, lanes: int, maker: WindowMaker, budget: int) -> Figures:
    """Estimate the rows of each lane, [V], from the source's raw bytes and the row rate of a sample of windows."""
    size = rows = unpacked = 0
    lengths: list[Ints] = []
    for name in _sample(source, lanes):
        task = source.task(name)
        if rows and (size + task.raw_bytes > budget or unpacked > _DECODED_PER_BYTE * budget):
            break
        if not rows:
            if size > _SEARCHED_BYTES:
                break
            task = _beginning(task, budget)
        found = maker.documents(task, skip_bad=True)
        size += maker.raw_bytes(task)
        unpacked += sum(item.span.stop - item.span.start for item in task.spans)
        rows += _num_rows(found.lengths, config, task.key)
        lengths.append(found.lengths)
    if not rows:
        _logger.warning(
            "source %s: none of the %.0f MB that a start looks at gives a row%s; how long it lasts is not known, and it"
            " counts as empty in the forecast",
            source.config.name, size / 1e6, "".join(f", {text}" for text in source.config.selection_texts.values()),
        )  # fmt: skip
        return np.zeros(lanes)
    limits = [source.segments_of_lane(lane) or 0 for lane in range(lanes)]
    counts, raw_bytes = source.plan.read_before(np.array(limits, np.int64))
    parts = raw_bytes.astype(np.float64)
    total = parts.sum() * rows / max(1, size)
    if source.plan.segment_bytes < config.cell_bytes and counts.sum() <= _DRAWN_RECORDS:
        parts *= _spread(np.concatenate(lengths), counts, key_of("forecast", source.config.name))
    parts *= total / max(1.0, parts.sum())
    return parts


def _spread(lengths: Ints, counts: Ints, key: int) -> Figures:
    """Draw, from a sample, how much longer each lane's documents are than the mean when chance deals them: [V].

    Segments smaller than a cell have no known raw size, and a few long documents decide which lane is longest and
    by how much.

    Args:
        lengths: tokens of the sample's documents.
        counts: int64 [V], documents dealt to each lane.
    """
    numbers = mixed(np.uint64(key) + np.arange(1, int(counts.sum()) + 1, dtype=np.uint64) * np.uint64(GOLDEN))
    drawn = lengths[(numbers % np.uint64(max(1, len(lengths)))).astype(np.intp)].astype(np.float64)
    sums = np.bincount(np.repeat(np.arange(len(counts)), counts), drawn, len(counts))
    spread: Figures = sums / np.maximum(1, counts) / max(1.0, float(lengths.mean()))
    return spread


def _beginning(task: WindowTask, limit: int) -> WindowTask:
    """Cut a task down to its first records, about `limit` raw bytes of them and at least one."""
    spans: list[SpanTask] = []
    left = limit
    for item in task.spans:
        size, records = item.span.raw_bytes, item.span.num_records
        taken = records if size <= left else max(int(not spans), records * left // size)
        if taken:
            span = msgspec.structs.replace(item.span, num_records=taken)
            spans.append(msgspec.structs.replace(item, span=span))
        if taken < records:
            break
        left -= size
    raw_bytes = sum(item.span.raw_bytes for item in spans)
    return msgspec.structs.replace(task, spans=tuple(spans), raw_bytes=raw_bytes)


def _sample(source: Source, lanes: int) -> Iterator[WindowId]:
    """Yield all windows of the first epoch, every deal's first before any second, to sample the whole source."""
    number, found = 0, True
    while found:
        found = False
        for lane in range(lanes):
            q, limit = 0, source.plan.segments_of_lane(lane, 1)
            while q < limit:
                deal = source.deal(lane, q)
                if number < len(deal.windows):
                    found = True
                    yield WindowId(source.number, lane, q, number)
                q = deal.next
        number += 1


def _last_step(rows: Figures, global_batch_size: int) -> int:
    """Find the step that holds the very last row, given the number of rows in each lane."""
    lanes = len(rows)
    last = [lane + (math.ceil(count) - 1) * lanes for lane, count in enumerate(rows.tolist()) if count > 0]
    return max(last, default=-1) // global_batch_size + 1


def _drain(
    supply: Sequence[float], weightings: Sequence[tuple[float, Sequence[float]]], rows: float
) -> tuple[float, list[float], dict[int, float]]:
    """Draw rows by weight, giving a source's share to the others once its supply is used up.

    Args:
        supply: rows that each source has.
        weightings: (row from which they apply, weights), in order.
        rows: most rows to draw.
    Returns: the row at which drawing stops; rows drawn from each source; the row at which each exhausted one ran out.
    """
    at, drawn, empty = 0.0, [0.0] * len(supply), dict[int, float]()
    ends = [float(start) for start, _ in weightings[1:]] + [math.inf]
    for (_, weights), end in zip(weightings, ends, strict=True):
        while at < min(end, rows):
            left = [i for i, weight in enumerate(weights) if weight > 0 and i not in empty]
            total = sum(weights[i] for i in left)
            if not left:
                break  # nothing that has a weight is left; later weights begin without a step in between
            lasts = {i: (supply[i] - drawn[i]) * total / weights[i] for i in left}
            step = min(min(end, rows) - at, *lasts.values())
            if math.isinf(step):
                return math.inf, drawn, empty
            at += step
            for i in left:
                drawn[i] += step * weights[i] / total
                if lasts[i] <= step:
                    drawn[i], empty[i] = supply[i], at
    return at, drawn, empty


def _wished(weightings: Sequence[tuple[float, Sequence[float]]], rows: float) -> list[float]:
    """Return the share of the first `rows` rows that the weights ask of each source."""
    shares = [0.0] * len(weightings[0][1])
    ends = [float(start) for start, _ in weightings[1:]] + [math.inf]
    for (start, weights), end in zip(weightings, ends, strict=True):
        part = max(0.0, min(end, rows) - start) / max(1.0, rows)
        for i, weight in enumerate(weights):
            shares[i] += part * weight / sum(weights)
    return shares
