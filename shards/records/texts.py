"""The texts of a shard or of a data set's column, from its beginning, whatever its format.

{json_lines, arrow_rows} -> texts -> {suite, tokenizer_check}.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from shards.config import DEFAULT_MAX_DECODER_WINDOW, DataConfig, SourceConfig
from shards.errors import ShardError
from shards.records import arrow
from shards.records.arrow_rows import Columns
from shards.records.json_lines import bad_record_error, first_bad_record, read_documents
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
    """Yield (sub-source, text) for each document of a shard, which may be a column of an Arrow file.

    Raises: ShardError if the shard is missing or damaged or, with "fail", holds a bad record.
    """
    if not files.is_column(shard):
        for document in read_documents(shard, source, on_bad_record, max_decoder_window, ADVICE):
            yield document.source if document.source != source.name else None, document.text
        return
    columns = Columns()
    indexed = files.stat(shard)
    rows = arrow.num_rows(files.file_of(shard))
    for first in range(0, rows, _ROWS_AT_ONCE):
        records = columns.records(shard, indexed, first, min(_ROWS_AT_ONCE, rows - first), source)
        if records.bad and on_bad_record == "fail":
            raise bad_record_error(shard, records.bad[0], ADVICE)
        yield from zip(records.sub_sources, records.texts, strict=True)


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
    if source.input_ids_key is not None or files.is_column(paths[0]):
        return sample  # a column was found by its name
    options = source, config.max_decoder_window, config.strict_records, open_cache(config.remote_cache)
    bad = {path: first_bad_record(path, *options) for path in sample}
    good = [path for path in sample if bad[path] is None]
    first = bad[sample[0]]
    if not good and first is not None:
        raise ShardError(
            f"source {source.name!r}: none of the first records of {', '.join(sample)} holds a text: {sample[0]}, line "
            f"{first.line}: {first.reason}; set the source's text_key"
        )
    return good
