"""A window -> its rows: read, tokenize, shuffle, pack. Pure, so any process may make any window.

decoders, parquet_rows, cells, json_lines, recipe -> window -> worker, worker_pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from shards.arrays import Ints
from shards.config import DataConfig
from shards.errors import ShardError
from shards.index.decoders import Decoders, RawRange
from shards.index.parquet_rows import ParquetRows
from shards.plan.cursor import Cut
from shards.plan.segments import Span
from shards.records.arrow_rows import Columns
from shards.records.json_lines import BadRecord, Records, bad_record_error, parser_for
from shards.records.selection import chosen, of_length
from shards.storage import files
from shards.storage.block_cache import open_cache
from shards.suites.decontaminate import Decontaminator
from shards.tokenize.parts import NO_PROMPTS, Prompts, encode_records
from shards.windows.cells import Cells
from shards.windows.packing import Rest, Rows, rest_of
from shards.windows.recipe import Tools


class SpanTask(msgspec.Struct, frozen=True):
    """Records of one shard, and the raw bytes of the whole cells that hold them."""

    span: Span
    raw: RawRange


class WindowTask(msgspec.Struct, frozen=True):
    """All that a process needs to know to make a window."""

    source: int  # number in the config
    stage: int  # number of the stage whose rows it makes
    spans: tuple[SpanTask, ...]  # at least one
    raw_bytes: int  # approximate
    key: int  # key of the shuffle of its documents and rows
    cuts: tuple[Cut, ...] = ()  # what earlier stages have drawn from it

    def __str__(self) -> str:
        raw, others = self.spans[0].raw, len(self.spans) - 1
        return f"{raw.path}, raw bytes {raw.start} to {raw.stop}" + f" and {others} more places" * (others > 0)


class SkippedRecord(NamedTuple):
    """A record of a window that yields no document."""

    shard: int  # number in the source
    line: int  # counted from 1
    reason: str
    contaminated: bool = False  # its text is also an evaluation suite's


class Documents(NamedTuple):
    """Tokenized documents of a window, in the order of its spans."""

    tokens: npt.NDArray[np.integer]  # tokens of all documents
    lengths: Ints  # [documents]: tokens of each
    lines: Ints  # [documents]: line of each in its shard, counted from 1
    shards: npt.NDArray[np.int32]  # [documents]: number of each one's shard in the source
    sub_sources: list[str | None]  # the sub-source that each names
    texts: list[str]  # empty ones, if the source holds token ids
    forgotten: npt.NDArray[np.bool_]  # [documents]: whether nothing is to be learned from it
    skipped: tuple[SkippedRecord, ...]
    prompts: Prompts = NO_PROMPTS  # what else nothing is to be learned from
    left_out: Ints = np.zeros(0, np.int64)  # tokens of each document that the source's length bounds leave out

    def only(self, kept: npt.NDArray[np.bool_]) -> Documents:
        """Return some of the documents, and the others' lengths as left out. Args: kept: bool [documents]."""
        numbers = np.flatnonzero(kept).tolist()
        return Documents(
            tokens=self.tokens[np.repeat(kept, self.lengths)],
            lengths=self.lengths[kept],
            lines=self.lines[kept],
            shards=self.shards[kept],
            sub_sources=[self.sub_sources[i] for i in numbers],
            texts=[self.texts[i] for i in numbers],
            forgotten=self.forgotten[kept],
            skipped=self.skipped,
            prompts=self.prompts.only(kept),
            left_out=self.lengths[~kept],
        )


class Window(NamedTuple):
    """The rows of a window and where their pieces come from."""

    rows: Rows
    lines: Ints  # [documents]: line of each in its shard, counted from 1
    shards: npt.NDArray[np.int32]  # [documents]: number of each one's shard in the source
    sub_sources: tuple[str, ...]  # the sub-sources that the documents name
    sub_source_of: npt.NDArray[np.int32]  # [documents]: position in sub_sources; -1 = none
    forgotten: npt.NDArray[np.bool_]  # [documents]: whether nothing is to be learned from it
    skipped: tuple[SkippedRecord, ...]
    prompts: Prompts = NO_PROMPTS  # what else nothing is to be learned from
    replays: int = 0  # entries that proved invalid while it was read, so that decoding began before them


class WindowMaker:
    """A maker of windows of a run's sources, with open decoders of its own.

    Args:
        stages: the data config of each stage of the run; the last has the sources of all.
    """

    def __init__(self, stages: Sequence[DataConfig], tools: Tools) -> None:
        self._stages, self._config = stages, (config := stages[-1])
        self._tokenizer, self._filters, self._forgotten, _ = tools
        cache = open_cache(config.remote_cache)
        self._decoders = Decoders(config.max_decoder_window, cache, config.index_dir, config.cell_bytes)
        self._columns, self._parquet = Columns(), ParquetRows(cache)
        self._parsers = [parser_for(source, config.strict_records) for source in config.sources]
        self._cells = Cells(self._decoders)

    def make(self, task: WindowTask) -> Window:
        """Make the rows of a window. Raises: as `documents`."""
        replays = self._decoders.replays
        found = self.documents(task)
        rest, skipped = Rest.whole(found.tokens, found.lengths), found.skipped
        stages = [*(cut.stage for cut in task.cuts), task.stage]
        for cut, stage in zip(task.cuts, stages[1:], strict=True):
            before = self._stages[cut.stage]
            rest = rest_of(rest.packed(before.seq_len, before.packing, task.key), cut.rows)
            rest, skipped = self._filtered_again(rest, found, cut.stage, stage)
        config = self._stages[task.stage]
        rows = rest.packed(config.seq_len, config.packing, task.key)
        names = sorted({name for name in found.sub_sources if name is not None})
        number_of = {name: number for number, name in enumerate(names)}
        return Window(
            rows=rows,
            lines=found.lines,
            shards=found.shards,
            sub_sources=tuple(names),
            sub_source_of=np.array([-1 if name is None else number_of[name] for name in found.sub_sources], np.int32),
            forgotten=found.forgotten,
            skipped=skipped,
            prompts=found.prompts,
            replays=self._decoders.replays - replays,
        )

    def documents(self, task: WindowTask, skip_bad: bool = False) -> Documents:
        """Read and tokenize the documents of a window, filtered as in the stage that first drew from it.

        Args:
            skip_bad: skip bad records, whatever the config says.
        Raises: ShardError if a shard changed or is damaged, or holds a bad record that may not be skipped.
        """
        stage = task.cuts[0].stage if task.cuts else task.stage
        parts = [_decontaminated(self._read(item, task.source, skip_bad), self._filters[stage]) for item in task.spans]
        numbers = [item.span.shard for item in task.spans]
        lines = [line for part in parts for line in part.lines]
        counts, prompts = [len(part.lines) for part in parts], NO_PROMPTS
        if any(part.token_ids is not None for part in parts):
            paths = [item.raw.path for item, count in zip(task.spans, counts, strict=True) for _ in range(count)]
            tokens, lengths = self._join([ids for part in parts for ids in part.token_ids or ()], lines, paths)
        else:
            tokens, lengths, prompts = encode_records(self._tokenizer, parts)
        source = self._config.sources[task.source]
        found = Documents(
            tokens=tokens,
            lengths=lengths,
            lines=np.array(lines, np.int64),
            shards=np.repeat(np.array(numbers, np.int32), counts),
            sub_sources=[name for part in parts for name in part.sub_sources],
            texts=[text for part in parts for text in part.texts],
            forgotten=self._forgotten_in(task, parts),
            skipped=tuple(
                SkippedRecord(number, *bad) for number, part in zip(numbers, parts, strict=True) for bad in part.bad
            ),
            prompts=NO_PROMPTS if source.learns_prompts else prompts,
        )
        return found.only(of_length(lengths, source)) if source.has_length_bounds else found

    def raw_bytes(self, task: WindowTask) -> int:
        """Count the raw bytes of a window exactly, though the plan knows only those of the cells that hold it."""
        return sum(
            item.span.raw_bytes
            if files.is_column(item.raw.path) or item.span.num_records == item.span.cells_records
            else len(self._cells.lines(item.span, item.raw))
            for item in task.spans
        )

    def _filtered_again(
        self, rest: Rest, found: Documents, before: int, stage: int
    ) -> tuple[Rest, tuple[SkippedRecord, ...]]:
        """Drop from the rest of a window what only the filter of a later stage finds; return what it has found."""
        later = self._filters[stage]
        if later is None or later is self._filters[before]:
            return rest, ()
        flags = later.shares_text(found.texts)
        rest, left = rest.without(flags), set(rest.documents.tolist())
        return rest, tuple(
            SkippedRecord(int(found.shards[i]), int(found.lines[i]), later.reason, contaminated=True)
            for i in np.flatnonzero(flags).tolist()
            if i in left
        )

    def _forgotten_in(self, task: WindowTask, parts: Sequence[Records]) -> npt.NDArray[np.bool_]:
        """Return bool [documents]: what the list of the task's stage names."""
        listed, name = self._forgotten[task.stage], self._config.sources[task.source].name
        if listed is None:
            return np.zeros(sum(len(part.lines) for part in parts), np.bool_)
        return np.concatenate(
            [listed.contains(name, item.raw.path, part) for item, part in zip(task.spans, parts, strict=True)]
        )

    def _read(self, item: SpanTask, source: int, skip_bad: bool) -> Records:
        """Read the records of a span that are the source's."""
        span, path = item.span, item.raw.path
        config = self._config.sources[source]
        if files.is_parquet(path):
            cells, rows = (span.cells_record, span.cells_records), (span.first_record, span.num_records)
            records = self._parquet.records(item.raw, cells, rows, config)
        elif files.is_column(path):
            records = self._columns.records(
                path, item.raw.stat, span.first_record, span.num_records, config, item.raw.content_hash
            )
        else:
            records = self._parsers[source].parse(self._cells.lines(span, item.raw), span.first_record + 1)
        if records.bad and not skip_bad and self._config.on_bad_record == "fail":
            raise bad_record_error(path, records.bad[0])
        return chosen(records, config)

    def _join(self, token_ids: list[Ints], lines: list[int], paths: list[str]) -> tuple[npt.NDArray[np.integer], Ints]:
        """Join rows of token ids as `Tokenizer.encode_documents` returns them. Raises: ShardError for an unknown id."""
        lengths = np.array([len(ids) for ids in token_ids], np.int64)
        tokens = np.concatenate([np.zeros(0, np.int64), *token_ids])
        wrong = np.flatnonzero((tokens < 0) | (tokens >= self._tokenizer.vocab_size))
        if len(wrong):
            document = int(np.searchsorted(np.cumsum(lengths), wrong[0], side="right"))
            raise ShardError(
                f"{paths[document]}, line {lines[document]}: token id {tokens[wrong[0]]}, but data.tokenizer has "
                f"{self._tokenizer.vocab_size} tokens; name the tokenizer that the ids were made with"
            )
        return tokens.astype(self._tokenizer.dtype), lengths

    def close(self) -> None:
        """Close open shards."""
        self._decoders.close()
        self._columns.close()
        self._parquet.close()


def _decontaminated(records: Records, decontaminator: Decontaminator | None) -> Records:
    """Move the records that share text with the evaluation suite to the bad ones."""
    if decontaminator is None:
        return records
    flags = decontaminator.shares_text(records.texts).tolist()
    dropped = [
        BadRecord(line, decontaminator.reason, contaminated=True)
        for line, flag in zip(records.lines, flags, strict=True)
        if flag
    ]
    return records.only([i for i, flag in enumerate(flags) if not flag], dropped)
