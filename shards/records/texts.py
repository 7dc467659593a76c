"""The documents of a shard or of a data set's column, from its beginning, whatever its format.

{json_lines, parquet, arrow_rows} -> texts -> {suite, tokenizer_check, training_sample}.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import pyarrow as pa

from shards.config import DEFAULT_MAX_DECODER_WINDOW, DEFAULT_TEXT_KEY, DataConfig, SourceConfig
from shards.errors import ShardError
from shards.records import arrow, parquet
from shards.records.arrow_rows import records_of
from shards.records.forms import Part
from shards.records.json_lines import (
    Document,
    Records,
    Stretch,
    bad_record_error,
    first_bad_record,
    read_records,
)
from shards.records.selection import check_take, chosen
from shards.storage import files
from shards.storage.block_cache import open_cache

# A suite's figures must not depend on records left out
ADVICE = "fix it, since no record of a suite is skipped"
_ROWS_AT_ONCE = 256  # rows read at a time from a data set's column
_SAMPLED_SHARDS = 4  # shards per source, spread over all of them


def read_documents(
    path: str | Path,
    source: SourceConfig | None = None,
    on_bad_record: Literal["fail", "skip"] = "fail",
    max_decoder_window: int = DEFAULT_MAX_DECODER_WINDOW,
    advice: str = "fix the line, or pass on_bad_record='skip'",
) -> Iterator[Document]:
    """Yield a shard's documents in order, from its beginning.

    Args:
        path: a shard in any of the formats; of a Parquet file FILE#COLUMN, or the file if the source names the column.
        source: the keys to read and the documents' source, whatever part of the shard that takes; None = keys of the
            Pile and Dolma, and the shard's name without its suffixes.
        on_bad_record: end with an error at a bad record, or skip it.
        max_decoder_window: in bytes.
        advice: what the error suggests about a bad record, if the caller has other options.
    Raises: ShardError if the shard is missing, damaged or truncated, holds token ids or (with "fail") a bad record.
    """
    (shard,) = files.with_columns([str(path)], source.column if source else DEFAULT_TEXT_KEY)
    name = source.name if source else Path(shard).name.split(".")[0]
    for records in records_of_shard(shard, source, max_decoder_window):
        first_bad = records.bad[0] if records.bad and on_bad_record == "fail" else None
        columns = records.texts, records.lines, records.sub_sources, records.ids, parts_of(records)
        for text, line, sub_source, identity, parts in zip(*columns, strict=True):
            if first_bad and first_bad.line < line:
                break
            yield Document(text, sub_source or name, shard, line, identity, parts)
        if first_bad:
            raise bad_record_error(shard, first_bad, advice)


def records_of_source(
    shards: Sequence[str], source: SourceConfig, beside: str | None = None
) -> Iterator[tuple[str, Records]]:
    """Yield the records that are a source's, a part at a time, each with its shard; bad ones are for the caller.

    Args:
        shards: all of the source's, in order.
        beside: column of the texts that go with token ids; None = texts of token ids are empty.
    Raises: ShardError if a shard is missing, damaged or truncated, or there are fewer records than the source takes.
    """
    first, end = source.take or (0, None)
    before = 0
    for shard in shards:
        count = 0  # of its records so far
        bounds = max(first - before, 0), None if end is None else end - before
        for stretch in _stretches(shard, source, DEFAULT_MAX_DECODER_WINDOW, *bounds, beside):
            yield shard, chosen(stretch.records, source)
            count = stretch.end
        before += count
        if end is not None and before >= end:
            return
    check_take(source, before)


def parts_of(records: Records) -> Sequence[list[Part] | None]:
    """Return the parts of each record's document, None where it is one text."""
    return records.parts or [None] * len(records.texts)


def source_of_column(shard: str) -> SourceConfig:
    """Return a source of the texts of one column, with the other keys of the Pile and Dolma."""
    return SourceConfig(name="shard", paths=(shard,), text_key=files.column_of(shard))


def records_of_shard(
    shard: str, source: SourceConfig | None = None, max_decoder_window: int = DEFAULT_MAX_DECODER_WINDOW
) -> Iterator[Records]:
    """Yield the records of a shard, which may be a column, a part at a time; bad ones are for the caller to judge.

    Args:
        source: the keys to read; None = those of the Pile and Dolma, and the shard's column.
        max_decoder_window: in bytes.
    Raises: ShardError if the shard is missing, damaged or truncated, or holds token ids.
    """
    if source is not None and source.input_ids_key is not None and files.is_column(shard):
        raise ShardError(f"{shard}: holds token ids, no texts to read")
    return (records for records, _ in _stretches(shard, source, max_decoder_window))


def _stretches(
    shard: str,
    source: SourceConfig | None,
    max_decoder_window: int,
    first: int = 0,
    stop: int | None = None,
    beside: str | None = None,
) -> Iterator[Stretch]:
    """Yield the records of a shard from one number to another, as `read_records`, in any format.

    Args:
        beside: column of the texts that go with token ids.
    """
    if not files.is_column(shard):
        return read_records(shard, source, max_decoder_window, first, stop)
    source = source or source_of_column(shard)
    of_columns = _of_parquet if files.is_parquet(shard) else _of_arrow
    return of_columns(shard, source, first, sys.maxsize if stop is None else stop, beside)


def _of_parquet(shard: str, source: SourceConfig, first: int, stop: int, beside: str | None) -> Iterator[Stretch]:
    """Yield the rows of a Parquet file. Raises: ShardError if it is missing or damaged, or lacks a column."""
    with contextlib.closing(parquet.ParquetFile(shard)) as file:
        _check_columns(file.schema, shard, source, beside)
        number, stop = min(first, file.num_rows), min(stop, file.num_rows)
        columns = (*parquet.columns_of(source), *([beside] if beside else ()))
        for batch in file.batches(file.present(tuple(dict.fromkeys(columns))), number) if number < stop else ():
            rows = batch.slice(0, stop - number)
            yield Stretch(records_of([rows], number, source, shard, beside), number + rows.num_rows)
            number += rows.num_rows
            if number == stop:
                return
        yield Stretch(records_of([], number, source, shard), number)


def _of_arrow(shard: str, source: SourceConfig, first: int, stop: int, beside: str | None) -> Iterator[Stretch]:
    """Yield the rows of an Arrow file. Raises: ShardError if it is missing or damaged, or lacks a column."""
    rows = arrow.table(files.file_of(shard))
    _check_columns(rows.schema, shard, source, beside)
    number, stop = min(first, rows.num_rows), min(stop, rows.num_rows)
    while number < stop:
        part = rows.slice(number, min(_ROWS_AT_ONCE, stop - number))
        yield Stretch(records_of(part.to_batches(), number, source, shard, beside), number + part.num_rows)
        number += part.num_rows
    yield Stretch(records_of([], number, source, shard), number)


def _check_columns(schema: pa.Schema, shard: str, source: SourceConfig, beside: str | None) -> None:
    """Check that a file has the columns to read. Raises: ShardError if it does not."""
    arrow.check_column(schema, shard, source)
    if beside is None:
        return
    file = files.file_of(shard)
    if arrow.kind_of(schema, files.column_path(file, beside)) != arrow.TEXTS:
        raise ShardError(f"{file}: column {beside!r} holds token ids; text_key is for the texts that they spell")


def misfit(source: SourceConfig, shards: Sequence[str]) -> str:
    """Return why some of a source's shards cannot hold its documents, and what would be right; empty if all can."""
    columns = [path for path in shards if files.is_column(path)]
    if source.input_ids_key is not None and (others := [path for path in shards if path not in columns]):
        return (
            "input_ids_key is for a data set or Parquet files, which JSON lines are not: "
            f"{files.listed(others)}; leave it out, or make them a source of their own"
        )
    if source.form and columns:
        return (
            f"{source.content_key} reads JSON lines, and of {files.listed(columns)} a single column is read; write its"
            " rows as JSON lines"
        )
    return ""


def spread(paths: Sequence[str]) -> list[str]:
    """Pick a few shards spread over a list of at least one."""
    return list(paths[:: -(-len(paths) // _SAMPLED_SHARDS)])


def sample_of(config: DataConfig, source: SourceConfig, paths: Sequence[str]) -> list[str]:
    """Pick a few shards of a source that begin with texts; others might have to be read far to find one.

    Args:
        paths: paths of all shards of the source.
    Raises: ShardError if none of them begins with texts, so that the source's keys must be wrong; also if one of
        them is a Parquet file without the source's column.
    """
    sample = spread(paths)
    for path in filter(files.is_parquet, sample):
        with contextlib.closing(parquet.ParquetFile(path, open_cache(config.remote_cache))) as file:
            arrow.check_column(file.schema, path, source)
    options = source, config.max_decoder_window, config.strict_records, open_cache(config.remote_cache)
    bad = {path: None if files.is_column(path) else first_bad_record(path, *options) for path in sample}
    good = [path for path in sample if bad[path] is None]
    first = bad[sample[0]]
    if not good and first is not None:
        raise ShardError(
            f"source {source.name!r}: none of the first records of {', '.join(sample)} holds a text: {sample[0]}, line "
            f"{first.line}: {first.reason}; set the source's {source.content_key}"
        )
    return good
