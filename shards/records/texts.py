"""The texts of a shard or of a data set's column, from its beginning, whatever its format.

{json_lines, parquet, arrow_rows} -> texts -> {suite, tokenizer_check, training_sample}.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Literal

import pyarrow as pa

from shards.config import DEFAULT_MAX_DECODER_WINDOW, DataConfig, SourceConfig
from shards.errors import ShardError
from shards.records import arrow, parquet
from shards.records.arrow_rows import Columns, records_of
from shards.records.json_lines import Records, bad_record_error, first_bad_record, read_documents, read_records
from shards.storage import files
from shards.storage.block_cache import open_cache

# A suite's figures must not depend on records left out
ADVICE = "fix it, since no record of a suite is skipped"
_ROWS_AT_ONCE = 256  # rows read at a time from a data set's column
_SAMPLED_SHARDS = 4  # shards per source, spread over all of them


def texts_of(
    shard: str,
    source: SourceConfig,
    on_bad_record: Literal["fail", "skip"] = "fail",
    max_decoder_window: int = DEFAULT_MAX_DECODER_WINDOW,
) -> Iterator[tuple[str | None, str]]:
    """Yield (sub-source, text) for each document of a shard, which may be a column of an Arrow or a Parquet file.

    Raises: ShardError if the shard is missing or damaged or, with "fail", holds a bad record.
    """
    if not files.is_column(shard):
        for document in read_documents(shard, source, on_bad_record, max_decoder_window, ADVICE):
            yield document.source if document.source != source.name else None, document.text
        return
    for records in records_of_shard(shard, source):
        if records.bad and on_bad_record == "fail":
            raise bad_record_error(shard, records.bad[0], ADVICE)
        yield from zip(records.sub_sources, records.texts, strict=True)


def records_of_shard(shard: str, source: SourceConfig) -> Iterator[Records]:
    """Yield the records of a shard, which may be a column, a part at a time; bad ones are for the caller to judge.

    Raises: ShardError if the shard is missing or damaged.
    """
    if not files.is_column(shard):
        return read_records(shard, source)
    return _of_parquet(shard, source) if files.is_parquet(shard) else _of_arrow(shard, source)


def _of_parquet(shard: str, source: SourceConfig) -> Iterator[Records]:
    """Yield the records of a column of a Parquet file. Raises: ShardError if it is missing or damaged."""
    with contextlib.closing(parquet.ParquetFile(shard)) as file:
        parquet.check_column(file.schema, shard)
        first = 0
        for batch in file.batches(file.present(parquet.columns_of(source))):
            texts = parquet.texts_of(batch, files.column_of(shard))
            yield records_of(pa.Table.from_batches([batch]), texts, first, source)
            first += batch.num_rows


def _of_arrow(shard: str, source: SourceConfig) -> Iterator[Records]:
    """Yield the records of a column of an Arrow file. Raises: ShardError if it is missing or damaged."""
    columns = Columns()
    indexed = files.stat(shard)
    rows = arrow.num_rows(files.file_of(shard))
    for first in range(0, rows, _ROWS_AT_ONCE):
        yield columns.records(shard, indexed, first, min(_ROWS_AT_ONCE, rows - first), source)


def spread(paths: Sequence[str]) -> list[str]:
    """Pick a few shards spread over a list of at least one."""
    return list(paths[:: -(-len(paths) // _SAMPLED_SHARDS)])


def sample_of(config: DataConfig, source: SourceConfig, paths: Sequence[str]) -> list[str]:
    """Pick a few shards of a source that begin with texts; others might have to be read far to find one.

    Args:
        paths: paths of all shards of the source.
    Raises: ShardError if none of them begins with texts, so that the source's text_key must be wrong.
    """
    sample = spread(paths)
    options = source, config.max_decoder_window, config.strict_records, open_cache(config.remote_cache)
    # A column was found by its name
    bad = {path: None if files.is_column(path) else first_bad_record(path, *options) for path in sample}
    good = [path for path in sample if bad[path] is None]
    first = bad[sample[0]]
    if not good and first is not None:
        raise ShardError(
            f"source {source.name!r}: none of the first records of {', '.join(sample)} holds a text: {sample[0]}, line "
            f"{first.line}: {first.reason}; set the source's text_key"
        )
    return good
