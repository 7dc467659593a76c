"""The texts of a shard or of a data set's column, from its beginning, whatever it is made of.

{reader, columns} -> texts -> {suite, soundness}.
"""

from collections.abc import Iterator
from typing import Literal

from shards import arrow, files
from shards.columns import Columns
from shards.config import DEFAULT_MAX_DECODER_WINDOW, SourceConfig
from shards.reader import bad_record_error, read_documents

# Of a suite: its figures would be of another text
ADVICE = "mend it, since no record of a suite is skipped"
ROWS_AT_ONCE = 256  # of a data set's column


def texts_of(
    shard: str,
    source: SourceConfig,
    on_bad_record: Literal["fail", "skip"] = "fail",
    max_decoder_window: int = DEFAULT_MAX_DECODER_WINDOW,
) -> Iterator[tuple[str | None, str]]:
    """Yields (sub-source, text) of each document of a shard, a column of an Arrow file among them.

    Raises: ShardError if the shard is missing or damaged, or holds a bad record, with "fail".
    """
    if not arrow.is_column(shard):
        for document in read_documents(shard, source, on_bad_record, max_decoder_window, ADVICE):
            yield document.source if document.source != source.name else None, document.text
        return
    columns = Columns()
    indexed = files.stat(shard)
    rows = arrow.num_rows(arrow.file_of(shard))
    for first in range(0, rows, ROWS_AT_ONCE):
        records = columns.records(shard, indexed, first, min(ROWS_AT_ONCE, rows - first), source)
        if records.bad and on_bad_record == "fail":
            raise bad_record_error(shard, records.bad[0], ADVICE)
        yield from zip(records.sub_sources, records.texts, strict=True)
