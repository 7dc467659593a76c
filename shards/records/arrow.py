"""Columns of Arrow files as shards: a row is a record, with a text or with token ids.

hf_datasets -> arrow -> parquet, shard_index, arrow_rows. The path of such a shard is FILE.arrow#COLUMN. Rows are found
by their number in the mapped file, so nothing is decoded on the way. Lengths stand in for raw bytes: a text counts its
bytes in UTF-8, a token id 4, and each row 1 more, as a line feed would.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from shards.arrays import Ints
from shards.errors import ShardError
from shards.storage import files

_BYTES_PER_TOKEN_ID = 4


class Measure(NamedTuple):
    """The result of one pass over a column."""

    row_bytes: Ints  # [rows]
    num_documents: int  # rows that are not null
    content_hash: str  # hash of the values, however the file splits or stores them


def num_rows(file: str) -> int:
    """Count the rows of an Arrow file. Raises: ShardError if it is not one."""
    return int(table(file).num_rows)


def holds_texts(path: str) -> bool:
    """Return True for a column of texts, False for one of token ids. Raises: ShardError as `measure`."""
    rows, column = _column(path)
    return is_text(rows.schema.field(column).type)


def measure(path: str) -> Measure:
    """Read a column once. Raises: ShardError if it is missing, or holds neither texts nor token ids."""
    rows, column = _column(path)
    of_lengths, of_values = xxhash.xxh3_128(), xxhash.xxh3_128()
    parts = [np.zeros(0, np.int64)]
    nulls = 0
    for chunk in rows.column(column).chunks:
        try:
            lengths, values = _lengths_and_values(chunk)
        except pa.ArrowInvalid as error:  # 2^63 or more
            raise ShardError(f"{path}: holds a token id beyond any vocabulary: {error}") from None
        of_lengths.update(lengths.tobytes())
        of_values.update(values)
        nulls += chunk.null_count
        parts.append(np.maximum(lengths, 0) * (1 if is_text(chunk.type) else _BYTES_PER_TOKEN_ID) + 1)
    row_bytes = np.concatenate(parts)
    kind = b"text" if is_text(rows.schema.field(column).type) else b"token ids"
    content_hash = xxhash.xxh3_128_hexdigest(kind + of_lengths.digest() + of_values.digest())
    return Measure(row_bytes, len(row_bytes) - nulls, content_hash)


def token_ids(column: pa.ChunkedArray) -> list[Ints | None]:
    """Return int64 [tokens] for each row; None for null and for a list that contains a null."""
    found: list[Ints | None] = []
    for chunk in column.chunks:
        values = _signed(chunk.flatten())
        missing = values.is_null().to_numpy(zero_copy_only=False)
        ids = values.fill_null(0).to_numpy(zero_copy_only=False)
        stop = 0
        for length in pc.list_value_length(chunk).to_pylist():
            start, stop = stop, stop + (length or 0)
            found.append(None if length is None or missing[start:stop].any() else ids[start:stop])
    return found


def table(file: str) -> pa.Table:
    """Map an Arrow file's rows into memory. Raises: ShardError if it is not one."""
    try:
        return pa.ipc.open_stream(pa.memory_map(file)).read_all()  # maps the columns and reads none of them
    except (OSError, pa.ArrowInvalid) as error:
        raise ShardError(f"{file}: cannot be read as an Arrow stream ({error}); make the data set again") from None


def _column(path: str) -> tuple[pa.Table, str]:
    """Return a column's table and its name. Raises: ShardError as `measure`."""
    rows, column = table(files.file_of(path)), files.column_of(path)
    if column not in rows.column_names:
        raise ShardError(
            f"{files.file_of(path)}: has no column {column!r}; its columns are {', '.join(rows.column_names)}: set "
            "text_key, or input_ids_key for token ids, to one of them"
        )
    kind = rows.schema.field(column).type
    if not is_text(kind) and not (_is_list(kind) and pa.types.is_integer(kind.value_type)):
        raise ShardError(f"{files.file_of(path)}: column {column!r} holds {kind}, neither texts nor lists of token ids")
    return rows, column


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column of a type holds texts."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def lengths_and_bytes(texts: pa.Array) -> tuple[Ints, bytes]:
    """Return int64 [rows], the bytes of each text with -1 for null, and all their bytes. Args: texts: large_binary."""
    if not len(texts):
        return np.zeros(0, np.int64), b""
    # From the buffers, since `to_numpy` imports pandas, which would take each worker 50 MB and a third of a second
    validity, offsets, data = texts.buffers()
    rows = slice(texts.offset, texts.offset + len(texts))
    bounds = np.frombuffer(offsets, "<i8")[rows.start : rows.stop + 1]
    lengths = np.diff(bounds)
    if validity is not None:
        lengths[np.unpackbits(np.frombuffer(validity, np.uint8), bitorder="little")[rows] == 0] = -1
    return lengths, b"" if data is None else memoryview(data)[int(bounds[0]) : int(bounds[-1])].tobytes()


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _signed(ids: pa.Array) -> pa.Array:
    """Convert token ids of any integer type to int64, which has room for a -1."""
    return ids.cast(pa.int64())


def _lengths_and_values(chunk: pa.Array) -> tuple[Ints, bytes]:
    """Return int64 [rows], the bytes or token ids of each with -1 for null, and the concatenated values."""
    if is_text(chunk.type):
        return lengths_and_bytes(chunk.cast(pa.large_binary()))
    lengths = pc.list_value_length(chunk).fill_null(-1).to_numpy(zero_copy_only=False).astype("<i8")
    return lengths, _signed(chunk.flatten()).fill_null(-1).to_numpy(zero_copy_only=False).astype("<i8").tobytes()
