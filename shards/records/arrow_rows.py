"""Open columns of Arrow files: consecutive rows -> records. arrow -> arrow_rows -> parquet_rows, window."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from shards.arrays import Ints
from shards.config import SourceConfig
from shards.errors import ShardError
from shards.records import arrow
from shards.records.json_lines import BadRecord, Records, name_of
from shards.storage import files

MAX_OPEN = 32  # files kept mapped


class Columns:
    """Rows of columns, read from files of which the last used stay mapped."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, pa.Table] = OrderedDict()  # by file, least recently used first

    def records(
        self, path: str, indexed: files.Stat, first: int, count: int, source: SourceConfig, content_hash: str = ""
    ) -> Records:
        """Return consecutive rows of a column as records of its source.

        Args:
            path: path of the column.
            indexed: stat of its file when it was indexed.
            first: first row, counted from 0.
            count: number of rows; a null, or a list that contains one, is a bad record.
            content_hash: hash of the column when it was indexed, which decides if its file was only touched.
        Raises: ShardError if the file changed after it was indexed.
        """
        rows = self._table(path, indexed, content_hash).slice(first, count)
        if rows.num_rows != count:
            raise ShardError(f"{path}: has fewer rows than its index says; put the old file back")
        return records_of(rows.to_batches(), first, source, path)

    def close(self) -> None:
        """Release all files."""
        self._open.clear()

    def _table(self, path: str, indexed: files.Stat, content_hash: str) -> pa.Table:
        if path not in self._open:
            found = files.check_size(path, indexed)
            if found != indexed and arrow.measure(path).content_hash != content_hash:
                raise files.changed(path, indexed, found)
            self._open[path] = arrow.table(files.file_of(path))
        self._open.move_to_end(path)
        while len(self._open) > MAX_OPEN:
            self._open.popitem(last=False)
        return self._open[path]


def records_of(
    rows: Sequence[pa.RecordBatch], first: int, source: SourceConfig, path: str, beside: str | None = None
) -> Records:
    """Return consecutive rows as records of their source.

    Args:
        rows: what has the source's column, and its `id_key` and `source_from`, where they exist.
        first: number of the first row, counted from 0.
        path: path of the column.
        beside: column of the texts that go with token ids; None = those are empty.
    Raises: ShardError for a token id that no vocabulary can have.
    """
    found = Records([], [], [], [], [], None if source.input_ids_key is None else [])
    for batch in rows:
        _add(found, batch, first, source, path, beside)
        first += batch.num_rows
    return found


def _add(found: Records, rows: pa.RecordBatch, first: int, source: SourceConfig, path: str, beside: str | None) -> None:
    """Add rows to records; the arguments are those of `records_of`."""
    of_texts = source.column if found.token_ids is None else beside
    no_text: list[bytes | None] = [b""] * rows.num_rows
    texts = no_text if of_texts is None else arrow.column_of(rows, of_texts).cast(pa.large_binary()).to_pylist()
    token_ids: list[Ints | None] = [np.zeros(0, np.int64)] * rows.num_rows
    if found.token_ids is not None:
        token_ids = arrow.token_ids(arrow.column_of(rows, source.column), path)
    columns = texts, token_ids, _optional(rows, source.source_from), _optional(rows, source.id_key)
    for line, (content, ids, sub_source, identity) in enumerate(zip(*columns, strict=True), first + 1):
        if content is None or ids is None:
            null = source.column if ids is None else of_texts
            found.bad.append(BadRecord(line, f"{null!r} is null, or has a null in it"))
            continue
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            found.bad.append(BadRecord(line, f"{of_texts!r} is not UTF-8 at its byte {error.start}"))
            continue
        found.texts.append(text)
        found.lines.append(line)
        found.sub_sources.append(name_of(sub_source))
        found.ids.append(None if identity is None else str(identity))
        if found.token_ids is not None:
            found.token_ids.append(ids)


def _optional(rows: pa.RecordBatch, column: str | None) -> list[object]:
    """Return the values of an optional column, all None if it is missing."""
    if column is None or arrow.type_of(rows.schema, column) is None:
        return [None] * int(rows.num_rows)
    found: list[object] = arrow.column_of(rows, column).to_pylist()
    return found
