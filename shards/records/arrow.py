"""Columns of Arrow and Parquet files as shards: a row is a record, with a text or with token ids.

hf_datasets -> arrow -> parquet, shard_index, arrow_rows. The path of such a shard is FILE.arrow#COLUMN, with dots for
a column in structs. Rows of an Arrow file are found by their number in the mapped file, so nothing is decoded on the
way. Lengths stand in for raw bytes: a text counts its bytes in UTF-8, a token id 4, and each row 1 more, as a line
feed would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from shards.arrays import Ints
from shards.config import SourceConfig
from shards.errors import ShardError
from shards.storage import files


class Kind(NamedTuple):
    """What a column's values are made of: a text of bytes, a list of token ids."""

    name: str  # enters the content hash
    raw_bytes: int  # that one byte or token id counts
    stored_bytes: int  # that it takes in `Values.data`


TEXTS = Kind("text", 1, 1)
TOKEN_IDS = Kind("token ids", 4, 8)


class Values(NamedTuple):
    """Consecutive rows of a column, as they are counted and hashed."""

    kind: Kind
    lengths: Ints  # [rows], in bytes or token ids; -1 for null
    data: bytes | memoryview  # the bytes of all texts, or all token ids, each as a little-endian int64

    def row_bytes(self) -> Ints:
        """Return int64 [rows], the raw bytes that each row counts."""
        return np.maximum(self.lengths, 0) * self.kind.raw_bytes + 1

    def offsets(self) -> Ints:
        """Return int64 [rows + 1], the raw offset of each row from the first, and the end."""
        return np.concatenate([[0], np.cumsum(self.row_bytes())])

    def between(self, offsets: Ints, first: int, stop: int) -> Values:
        """Return rows [first, stop). Args: offsets: as `offsets` returns them."""
        begin, end = (self._stored(int(offsets[row]), row) for row in (first, stop))
        return Values(self.kind, self.lengths[first:stop], memoryview(self.data)[begin:end])

    def _stored(self, raw_offset: int, row: int) -> int:
        return (raw_offset - row) // self.kind.raw_bytes * self.kind.stored_bytes


class ContentHash:
    """The hash of a column's values, however its file splits or stores them."""

    def __init__(self, kind: Kind) -> None:
        self._kind, self._of_lengths, self._of_data = kind, xxhash.xxh3_128(), xxhash.xxh3_128()

    def update(self, values: Values) -> None:
        """Take in the next rows."""
        self._of_lengths.update(values.lengths.astype("<i8").tobytes())
        self._of_data.update(values.data)

    def hexdigest(self) -> str:
        return xxhash.xxh3_128_hexdigest(self._kind.name.encode() + self._of_lengths.digest() + self._of_data.digest())


class Measure(NamedTuple):
    """The result of one pass over a column."""

    row_bytes: Ints  # [rows]
    num_documents: int  # rows that are not null
    content_hash: str


def num_rows(file: str) -> int:
    """Count the rows of an Arrow file. Raises: ShardError if it is not one."""
    return int(table(file).num_rows)


def measure(path: str) -> Measure:
    """Read a column once. Raises: ShardError if it is missing, or holds neither texts nor token ids."""
    rows = table(files.file_of(path))
    content_hash = ContentHash(kind_of(rows.schema, path))
    parts = [np.zeros(0, np.int64)]
    nulls = 0
    for batch in rows.to_batches():
        values = values_of(column_of(batch, files.column_of(path)), path)
        content_hash.update(values)
        nulls += int((values.lengths < 0).sum())
        parts.append(values.row_bytes())
    row_bytes = np.concatenate(parts)
    return Measure(row_bytes, len(row_bytes) - nulls, content_hash.hexdigest())


def table(file: str) -> pa.Table:
    """Map an Arrow file's rows into memory. Raises: ShardError if it is not one."""
    try:
        return pa.ipc.open_stream(pa.memory_map(file)).read_all()  # maps the columns and reads none of them
    except (OSError, pa.ArrowInvalid) as error:
        raise ShardError(f"{file}: cannot be read as an Arrow stream ({error}); make the data set again") from None


def type_of(schema: pa.Schema, column: str) -> pa.DataType | None:
    """Return the type of a column, with dots for one in a struct; None if there is no such column."""
    if column in schema.names:
        return schema.field(column).type
    first, *inner = column.split(".")
    kind = schema.field(first).type if first in schema.names else None
    for name in inner:
        if kind is None or not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
            return None
        kind = kind.field(kind.get_field_index(name)).type
    return kind


def column_names(schema: pa.Schema) -> list[str]:
    """List a file's columns as the keys of a source would name them."""
    return [name for field in schema for name in _names(field)]


def kind_of(schema: pa.Schema, path: str) -> Kind:
    """Return what the column of a path holds.

    Raises: ShardError if there is no such column, naming those that are there, or it holds neither texts nor token ids.
    """
    column, file = files.column_of(path), files.file_of(path)
    kind = type_of(schema, column)
    if kind is None:
        raise ShardError(
            f"{file}: has no column {column!r}; its columns are {', '.join(column_names(schema))}: set text_key, or "
            "input_ids_key for token ids, to one of them"
        )
    if _is_text(kind):
        return TEXTS
    if _is_list(kind) and pa.types.is_integer(kind.value_type):
        return TOKEN_IDS
    raise ShardError(f"{file}: column {column!r} holds {kind}, neither texts nor lists of token ids")


def check_column(schema: pa.Schema, path: str, source: SourceConfig) -> None:
    """Check that the column of a path holds what its source says. Raises: ShardError as `kind_of`, and if not."""
    kind = kind_of(schema, path)
    if kind != (TEXTS if source.input_ids_key is None else TOKEN_IDS):
        key = "text_key" if kind == TEXTS else "input_ids_key"
        what = "texts" if kind == TEXTS else kind.name
        raise ShardError(f"{files.file_of(path)}: column {files.column_of(path)!r} holds {what}; name it with {key}")


def column_of(rows: pa.RecordBatch, column: str) -> pa.Array:
    """Return a column, with dots for one in a struct; null where its value, or a struct around it, is null."""
    if column in rows.schema.names:
        return rows.column(column)
    first, *inner = column.split(".")
    return pc.struct_field(rows.column(first), inner)


def values_of(column: pa.Array, path: str) -> Values:
    """Return the values of some rows. Raises: ShardError for an id that no vocabulary can have. Args: path: for it."""
    if _is_text(column.type):
        return Values(TEXTS, *_lengths_and_bytes(column.cast(pa.large_binary())))
    lengths, missing = _numbers(pc.list_value_length(column).cast(pa.int64()))
    ids, missing_ids = _numbers(_signed(column.flatten(), path))
    filled = np.where(missing, -1, lengths), np.where(missing_ids, -1, ids)
    return Values(TOKEN_IDS, filled[0], filled[1].astype("<i8").tobytes())


def joined(parts: Sequence[Values]) -> Values:
    """Join the values of rows that follow each other, at least one part."""
    lengths, data = np.concatenate([part.lengths for part in parts]), b"".join(part.data for part in parts)
    return Values(parts[0].kind, lengths, data)


def token_ids(column: pa.Array, path: str) -> list[Ints | None]:
    """Return int64 [tokens] for each row; None for null and for a list that contains a null.

    Raises: ShardError as `values_of`.
    """
    lengths, missing = _numbers(pc.list_value_length(column).cast(pa.int64()))
    ids, missing_ids = _numbers(_signed(column.flatten(), path))
    stops = np.cumsum(np.where(missing, 0, lengths)).tolist()
    holes = np.concatenate([[0], np.cumsum(missing_ids)])  # nulls among the ids before each
    found: list[Ints | None] = []
    for start, stop, is_null in zip([0, *stops], stops, missing.tolist(), strict=False):
        found.append(None if is_null or holes[start] != holes[stop] else ids[start:stop])
    return found


def _lengths_and_bytes(texts: pa.Array) -> tuple[Ints, bytes]:
    """Return int64 [rows], the bytes of each text with -1 for null, and all their bytes. Args: texts: large_binary."""
    if not len(texts):
        return np.zeros(0, np.int64), b""
    validity, offsets, data = texts.buffers()
    rows = slice(texts.offset, texts.offset + len(texts))
    bounds = np.frombuffer(offsets, "<i8")[rows.start : rows.stop + 1]
    lengths = np.where(_missing(validity, rows), -1, np.diff(bounds))
    return lengths, b"" if data is None else memoryview(data)[int(bounds[0]) : int(bounds[-1])].tobytes()


def _numbers(values: pa.Array) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Return int64 [values], anything where one is null, and bool [values], whether it is. Args: values: int64."""
    validity, data = values.buffers()
    rows = slice(values.offset, values.offset + len(values))
    return np.frombuffer(data or b"", "<i8")[rows], _missing(validity, rows)


def _missing(validity: pa.Buffer | None, rows: slice) -> npt.NDArray[np.bool_]:
    """Return bool [rows], whether each is null, from an array's buffer of validity.

    As all of this module it works on buffers, since `to_numpy` and `fill_null` import pandas, which would take each
    worker 50 MB and a third of a second.
    """
    if validity is None:
        return np.zeros(rows.stop - rows.start, np.bool_)
    return np.unpackbits(np.frombuffer(validity, np.uint8), bitorder="little")[rows] == 0


def _is_text(kind: pa.DataType) -> bool:
    """Return whether a type holds texts; bytes count, since older writers do not mark a column as UTF-8."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(
        is_kind(kind)
        for is_kind in (
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_string_view,
            pa.types.is_binary,
            pa.types.is_large_binary,
        )
    )


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _signed(ids: pa.Array, path: str) -> pa.Array:
    """Convert token ids of any integer type to int64, which has room for a -1."""
    try:
        return ids.cast(pa.int64())
    except pa.ArrowInvalid as error:  # 2^63 or more
        raise ShardError(f"{path}: holds a token id beyond any vocabulary: {error}") from None


def _names(field: pa.Field) -> list[str]:
    if not pa.types.is_struct(field.type):
        return [field.name]
    return [f"{field.name}.{name}" for inner in field.type for name in _names(inner)]
