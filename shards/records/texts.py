"""The documents of a shard or of a data set's column, from its beginning, whatever its format.

{json_lines, parquet, arrow_rows} -> texts -> {suite, tokenizer_check, training_sample}.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from shards.config import DEFAULT_MAX_DECODER_WINDOW, DEFAULT_TEXT_KEY, DataConfig, SourceConfig
from shards.errors import ShardError
from shards.records import arrow, parquet
from shards.records.arrow_rows import Columns, records_of
from shards.records.forms import Part
from shards.records.json_lines import Document, Records, bad_record_error, first_bad_record, read_records
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
        source: the keys to read and the documents' source; None = keys of the Pile and Dolma, and the shard's name
            without its suffixes.
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


def texts_of(
    shard: str,
    source: SourceConfig,
    on_bad_record: Literal["fail", "skip"] = "fail",
    max_decoder_window: int = DEFAULT_MAX_DECODER_WINDOW,
) -> Iterator[tuple[str | None, str, list[Part] | None]]:
    """Yield (sub-source, text, parts if it has a form) for each document of a shard. Raises: as `read_documents`."""
    if not files.is_column(shard):
        for document in read_documents(shard, source, on_bad_record, max_decoder_window, ADVICE):
            yield document.source if document.source != source.name else None, document.text, document.parts
        return
    for records in records_of_shard(shard, source):
        if records.bad and on_bad_record == "fail":
            raise bad_record_error(shard, records.bad[0], ADVICE)
        yield from zip(records.sub_sources, records.texts, parts_of(records), strict=True)


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
    if not files.is_column(shard):
        return read_records(shard, source, max_decoder_window)
    source = source or source_of_column(shard)
    if source.input_ids_key is not None:
        raise ShardError(f"{shard}: holds token ids, no texts to read")
    return _of_parquet(shard, source) if files.is_parquet(shard) else _of_arrow(shard, source)


def _of_parquet(shard: str, source: SourceConfig) -> Iterator[Records]:
    """Yield the records of a column of a Parquet file. Raises: ShardError if it is missing or damaged."""
    with contextlib.closing(parquet.ParquetFile(shard)) as file:
        arrow.check_column(file.schema, shard, source)
        first = 0
        for batch in file.batches(file.present(parquet.columns_of(source))):
            yield records_of([batch], first, source, shard)
            first += batch.num_rows


def _of_arrow(shard: str, source: SourceConfig) -> Iterator[Records]:
    """Yield the records of a column of an Arrow file. Raises: ShardError if it is missing or damaged."""
    columns = Columns()
    indexed = files.stat(shard)
    rows = arrow.table(files.file_of(shard))
    arrow.check_column(rows.schema, shard, source)
    for first in range(0, rows.num_rows, _ROWS_AT_ONCE):
        yield columns.records(shard, indexed, first, min(_ROWS_AT_ONCE, rows.num_rows - first), source)


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
