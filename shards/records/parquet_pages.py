"""Where the pages of a Parquet column begin, and the file that holds only those from one on. parquet_pages -> parquet.

pyarrow decodes a row group's column from its first page. A `Tail` is the file with another footer behind it, which says
that the column begins at a later page: the dictionary, if there is one, and the pages from there on, as they stand in
the file. Pages are found in the column's offset index, or by walking from header to header, which skips their contents.
Footers and headers are structs of Thrift's compact protocol; they are taken apart only as far as fields are replaced,
and everything else is copied.

Source: the Apache Parquet format, `parquet.thrift`; Thrift, "Compact protocol encoding".
"""

from __future__ import annotations

import contextlib
import io
import itertools
from bisect import bisect_right
from typing import BinaryIO, NamedTuple

_MAGIC = b"PAR1"
_I32, _I64, _LIST, _STRUCT = 5, 6, 9, 12  # types of the compact protocol
_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = 0, 2, 3  # types of pages
_HEADER_BYTES = (1 << 9, 1 << 16, 1 << 22)  # of a page, tried in turn; texts in its statistics may make it long

UNREADABLE = (
    IndexError,
    KeyError,
    ValueError,
    OverflowError,
    RecursionError,
)  # what structs raise that are not as expected here


class Field(NamedTuple):
    """A field of a struct, not taken apart."""

    type: int
    raw: bytes


Struct = dict[int, Field]  # by number


class Chunk(NamedTuple):
    """The pages of a column in a row group."""

    column: int  # number in the row group
    dictionary: tuple[int, int]  # offset and size of the dictionary's page; of size 0 if there is none
    offsets: list[int]  # of the data pages
    rows: list[int]  # number in the group of the first row of each data page
    end: int  # offset behind the last page

    def page_of(self, row: int) -> int:
        """Return the number of the page that holds a row of the group."""
        return bisect_right(self.rows, row) - 1


class Pages:
    """What is known of a file's pages, which its readers share."""

    def __init__(self, walk: bool = True) -> None:
        """Begin without knowing any. Args: walk: go through a column's headers where the file has no index of them."""
        self._walk = walk
        self._footer: Footer | None = None
        self._chunks: dict[tuple[int, int], Chunk | None] = {}  # by row group and column

    def chunk(self, file: BinaryIO, group: int, column: int, is_flat: bool) -> Chunk | None:
        """Find the pages of a column, as `Footer.chunk`; None also if they cannot be read."""
        if (group, column) not in self._chunks:
            found = None
            with contextlib.suppress(*UNREADABLE):
                self._footer = self._footer or Footer(file)
                found = self._footer.chunk(file, group, column, is_flat, self._walk)
            self._chunks[group, column] = found
        return self._chunks[group, column]

    def tail(self, file: BinaryIO, group: int, chunk: Chunk, page: int) -> Tail:
        """Return a file that begins with a page of a chunk, as `Footer.tail`."""
        assert self._footer is not None
        return self._footer.tail(file, group, chunk, page)


class Footer:
    """The metadata of a file."""

    def __init__(self, file: BinaryIO) -> None:
        """Read it. Raises: any of UNREADABLE."""
        self.file_size = file.seek(0, io.SEEK_END)
        file.seek(self.file_size - 8)
        size = int.from_bytes(file.read(4), "little")
        file.seek(self.file_size - 8 - size)
        self._fields, _ = _struct(file.read(size), 0)

    def chunk(self, file: BinaryIO, group: int, column: int, is_flat: bool, walk: bool) -> Chunk | None:
        """Find the pages of a column.

        Args:
            is_flat: the column has one value a row, so that values count rows.
            walk: go through the headers if there is no index.
        Returns: None if it is not known where rows begin.
        Raises: any of UNREADABLE.
        """
        rows, fields, meta = self._column(group, column)
        start = _number(meta[9])
        if 11 in meta and _number(meta[11]):  # else some writers count the dictionary as the first data page
            start = min(start, _number(meta[11]))
        end = start + _number(meta[7])
        if 4 in fields and 5 in fields:
            file.seek(_number(fields[4]))
            index, _ = _struct(file.read(min(_number(fields[5]), self.file_size)), 0)
            pages = [_inner(page) for page in _elements(index[1])]
            offsets, firsts = ([_number(page[number]) for page in pages] for number in (1, 3))
            return Chunk(column, (start, offsets[0] - start), offsets, firsts, end)
        return _walked(file, column, start, end, rows, is_flat) if walk else None

    def tail(self, file: BinaryIO, group: int, chunk: Chunk, page: int) -> Tail:
        """Return the file whose only row group has a column's rows from a page on. Raises: any of UNREADABLE."""
        rows, fields, meta = self._column(group, chunk.column)
        (dictionary, dictionary_size), offset = chunk.dictionary, chunk.offsets[page]
        place = self.file_size if dictionary_size else offset
        left = rows - chunk.rows[page]
        changed = meta | {7: _integer(dictionary_size + chunk.end - offset), 9: _integer(place + dictionary_size)}
        if dictionary_size:
            changed[11] = _integer(place)
        else:
            changed.pop(11, None)
        if _number(meta[5]) == rows:  # a list's values are counted by the pages themselves
            changed[5] = _integer(left)
        bare = {number: field for number, field in fields.items() if number < 4}  # without the indexes of its pages
        columns = _elements(self._group(group)[1])
        columns[chunk.column] = _written(bare | {3: Field(_STRUCT, _written(changed))})
        new = self._group(group) | {1: _list(columns), 3: _integer(left)}
        footer = _written(self._fields | {3: _integer(left), 4: _list([_written(new)])})
        parts = [(dictionary, dictionary_size), (offset, chunk.end - offset)] if dictionary_size else []
        return Tail(file, self.file_size, parts, footer + len(footer).to_bytes(4, "little") + _MAGIC)

    def _group(self, group: int) -> Struct:
        return _inner(_elements(self._fields[4])[group])

    def _column(self, group: int, column: int) -> tuple[int, Struct, Struct]:
        """Return (rows of a group, the fields of a column in it, those of its metadata)."""
        of_group = self._group(group)
        fields = _inner(_elements(of_group[1])[column])
        return _number(of_group[3]), fields, _inner(fields[3].raw)


class Tail(io.RawIOBase):
    """A file, behind its end some ranges of it once more, and a footer."""

    def __init__(self, file: BinaryIO, file_size: int, ranges: list[tuple[int, int]], footer: bytes) -> None:
        """Args: ranges: (offset, size) of each in the file."""
        self._file, self._footer = file, footer
        self._parts = [(0, file_size), *ranges]
        self._position = 0
        self._size = sum(size for _, size in self._parts)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size + len(self._footer)}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int = -1, /) -> bytes:
        """Read across all parts."""
        stop = self._size + len(self._footer)
        stop = stop if size < 0 else min(self._position + size, stop)
        found, begin = [], 0
        for offset, length in self._parts:
            if begin <= self._position < min(begin + length, stop):
                self._file.seek(offset + self._position - begin)
                found.append(self._file.read(min(begin + length, stop) - self._position))
                self._position += len(found[-1])
            begin += length
        if self._size <= self._position < stop:
            found.append(self._footer[self._position - self._size : stop - self._size])
            self._position = stop
        return b"".join(found)


def _walked(file: BinaryIO, column: int, start: int, end: int, num_rows: int, is_flat: bool) -> Chunk | None:
    """Find the pages of a column by their headers, from the first to the last."""
    found = Chunk(column, (start, 0), [], [], end)
    offset, row = start, 0
    while row < num_rows and offset < end:
        header, size = _page_header(file, offset)
        kind, size = _number(header[1]), size + _number(header[3])
        if size <= 0:
            raise ValueError(f"a page of {size} bytes")
        if kind == _DICTIONARY_PAGE:
            found = found._replace(dictionary=(offset, size))
        elif kind == _DATA_PAGE and not is_flat:
            return None
        elif kind in (_DATA_PAGE, _DATA_PAGE_V2):
            found.offsets.append(offset)
            found.rows.append(row)
            row += _number(_inner(header[5].raw)[1] if kind == _DATA_PAGE else _inner(header[8].raw)[3])
        offset += size
    return found if row == num_rows else None


def _page_header(file: BinaryIO, offset: int) -> tuple[Struct, int]:
    """Return the header of the page at an offset, and its size."""
    for size in _HEADER_BYTES:
        file.seek(offset)
        data = file.read(size)
        try:
            return _struct(data, 0)
        except IndexError:
            if len(data) < size:
                break
    raise ValueError(f"no page at {offset}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return an unsigned number and where it ends."""
    value = shift = 0
    while data[at] & 0x80:
        value |= (data[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
    return value | data[at] << shift, at + 1


def _end(data: bytes, at: int, kind: int) -> int:
    """Return where a value ends."""
    if kind in (1, 2):  # a field that is true or false has no value besides its type
        return at
    if kind == 3:
        return at + 1
    if kind in (4, _I32, _I64):
        return _varint(data, at)[1]
    if kind == 7:
        return at + 8
    if kind == 8:
        size, at = _varint(data, at)
        if at + size > len(data):
            raise IndexError("a text that is cut off")
        return at + size
    if kind in (_LIST, 10):
        return _list_bounds(data, at)[-1]
    if kind == _STRUCT:
        return _struct(data, at)[1]
    raise ValueError(f"a field of the type {kind}")  # no struct of Parquet has a map


def _list_bounds(data: bytes, at: int) -> list[int]:
    """Return where each element of a list begins, and where the last ends."""
    count, kind = data[at] >> 4, data[at] & 0xF
    at += 1
    if count == 15:
        count, at = _varint(data, at)
    if count > len(data):
        raise IndexError("a list that is cut off")
    bounds = [at]
    for _ in range(count):
        bounds.append(bounds[-1] + 1 if kind in (1, 2) else _end(data, bounds[-1], kind))
    return bounds


def _struct(data: bytes, at: int) -> tuple[Struct, int]:
    """Divide a struct into its fields; return them and where it ends. Raises: IndexError if it is cut off."""
    fields: Struct = {}
    number = 0
    while data[at]:
        step, kind = data[at] >> 4, data[at] & 0xF
        at += 1
        if step:
            number += step
        else:
            zigzag, at = _varint(data, at)
            number = (zigzag >> 1) ^ -(zigzag & 1)
        end = _end(data, at, kind)
        fields[number] = Field(kind, data[at:end])
        at = end
    return fields, at + 1


def _inner(raw: bytes) -> Struct:
    return _struct(raw, 0)[0]


def _elements(field: Field) -> list[bytes]:
    bounds = _list_bounds(field.raw, 0)
    return [field.raw[begin:end] for begin, end in itertools.pairwise(bounds)]


def _number(field: Field) -> int:
    zigzag, _ = _varint(field.raw, 0)
    return (zigzag >> 1) ^ -(zigzag & 1)


def _unsigned(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def _integer(value: int) -> Field:
    """Make a field of a number of at least 0."""
    return Field(_I64, _unsigned(value << 1))


def _list(structs: list[bytes]) -> Field:
    return Field(_LIST, bytes([0xF0 | _STRUCT]) + _unsigned(len(structs)) + b"".join(structs))


def _written(fields: Struct) -> bytes:
    """Put a struct together."""
    parts, before = [], 0
    for number, field in sorted(fields.items()):
        step = number - before
        head = bytes([step << 4 | field.type]) if step < 16 else bytes([field.type]) + _unsigned(number << 1)
        parts += [head, field.raw]
        before = number
    return b"".join([*parts, b"\0"])
