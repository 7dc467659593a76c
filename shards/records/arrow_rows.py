"""Open columns of Arrow files: consecutive rows -> records. arrow -> arrow_rows -> parquet_rows, window."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import pyarrow as pa

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


def records_of(rows: Sequence[pa.RecordBatch], first: int, source: SourceConfig, path: str) -> Records:
    """Return consecutive rows as records of their source.

    Args:
        rows: what has the source's column, and its `id_key` and `source_from`, where they exist.
        first: number of the first row, counted from 0.
        path: path of the column.
    Raises: ShardError for a token id that no vocabulary can have.
    """
    found = Records([], [], [], [], [], None if source.input_ids_key is None else [])
    for batch in rows:
        _add(found, batch, first, source, path)
        first += batch.num_rows
    return found


def _add(found: Records, rows: pa.RecordBatch, first: int, source: SourceConfig, path: str) -> None:
    """Add rows to records; the arguments are those of `records_of`."""
    column = arrow.column_of(rows, source.column)
    of_texts = found.token_ids is None
    values = column.cast(pa.large_binary()).to_pylist() if of_texts else arrow.token_ids(column, path)
    columns = values, _optional(rows, source.source_from), _optional(rows, source.id_key)
    for line, (value, sub_source, identity) in enumerate(zip(*columns, strict=True), first + 1):
        if value is None:
            found.bad.append(BadRecord(line, f"{source.column!r} is null, or has a null in it"))
            continue
        try:
            text = value.decode() if of_texts else ""
        except UnicodeDecodeError as error:
            found.bad.append(BadRecord(line, f"{source.column!r} is not UTF-8 at its byte {error.start}"))
            continue
        found.texts.append(text)
        found.lines.append(line)
        found.sub_sources.append(name_of(sub_source))
        found.ids.append(None if identity is None else str(identity))
        if found.token_ids is not None:
            found.token_ids.append(value)


def _optional(rows: pa.RecordBatch, column: str | None) -> list[object]:
    """Return the values of an optional column, all None if it is missing."""
    if column is None or arrow.type_of(rows.schema, column) is None:
        return [None] * int(rows.num_rows)
    found: list[object] = arrow.column_of(rows, column).to_pylist()
    return found
