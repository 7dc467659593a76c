"""Open columns of Arrow files: consecutive rows -> records. arrow -> arrow_rows -> parquet_rows, window."""

from __future__ import annotations

from collections import OrderedDict

import pyarrow as pa

from shards.config import SourceConfig
from shards.errors import ShardError
from shards.records import arrow
from shards.records.json_lines import BadRecord, Records, parser_for
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
        name = files.column_of(path)
        if source.input_ids_key is None:
            return records_of(rows, rows.column(name).cast(pa.large_binary()), first, source)
        return records_of(rows, rows.column(name), first, source)

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


def records_of(rows: pa.Table, column: pa.ChunkedArray, first: int, source: SourceConfig) -> Records:
    """Return consecutive rows as records of their source.

    Args:
        rows: what has the source's `id_key` and `source_from`, where they exist.
        column: the rows' token ids, if the source names them, else their texts, as bytes.
        first: number of the first row, counted from 0.
    """
    token_ids = arrow.token_ids(column) if source.input_ids_key is not None else []
    texts = [b""] * len(token_ids) or column.to_pylist()
    name = source.input_ids_key or source.text_key
    parser = parser_for(source)
    outer = _values(rows, source.source_from.split(".")[0] if source.source_from else None)
    found = Records([], [], [], [], [], [] if token_ids else None)
    columns = texts, outer, _values(rows, source.id_key)
    for i, (text, value, identity) in enumerate(zip(*columns, strict=True)):
        line = first + i + 1
        if text is None or (token_ids and token_ids[i] is None):
            found.bad.append(BadRecord(line, f"{name!r} is null, or has a null in it"))
            continue
        try:
            found.texts.append(text.decode())
        except UnicodeDecodeError as error:
            found.bad.append(BadRecord(line, f"{name!r} is not UTF-8 at its byte {error.start}"))
            continue
        found.lines.append(line)
        found.sub_sources.append(parser.sub_source(value))
        found.ids.append(None if identity is None else str(identity))
        if found.token_ids is not None and (ids := token_ids[i]) is not None:
            found.token_ids.append(ids)
    return found


def _values(rows: pa.Table, name: str | None) -> list[object]:
    """Return the values of an optional column, all None if it is missing."""
    if name is None or name not in rows.column_names:
        return [None] * int(rows.num_rows)
    found: list[object] = rows.column(name).to_pylist()
    return found
