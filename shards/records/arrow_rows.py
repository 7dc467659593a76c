"""Open columns of Arrow files: consecutive rows -> records. arrow -> arrow_rows -> window, provenance."""

from __future__ import annotations

from collections import OrderedDict

import pyarrow as pa

from shards.arrays import Ints
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
        texts: list[str | None] = [""] * count
        token_ids: list[Ints | None] = []
        if source.input_ids_key is None:
            texts = rows.column(name).to_pylist()
        else:
            token_ids = arrow.token_ids(rows.column(name))
        parser = parser_for(source)
        outer = _values(rows, source.source_from.split(".")[0] if source.source_from else None)
        found = Records([], [], [], [], [], [] if token_ids else None)
        for i, (text, value, identity) in enumerate(zip(texts, outer, _values(rows, source.id_key), strict=True)):
            line = first + i + 1
            if text is None or (token_ids and token_ids[i] is None):
                found.bad.append(BadRecord(line, f"{name!r} is null, or has a null in it"))
                continue
            found.texts.append(text)
            found.lines.append(line)
            found.sub_sources.append(parser.sub_source(value))
            found.ids.append(None if identity is None else str(identity))
            if found.token_ids is not None and (ids := token_ids[i]) is not None:
                found.token_ids.append(ids)
        return found

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


def _values(rows: pa.Table, name: str | None) -> list[object]:
    """Return the values of an optional column, all None if it is missing."""
    if name is None or name not in rows.column_names:
        return [None] * int(rows.num_rows)
    found: list[object] = rows.column(name).to_pylist()
    return found
