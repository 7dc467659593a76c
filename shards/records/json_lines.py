"""Raw bytes -> documents: a shard's records, parsed and judged. formats -> json_lines -> window, evaluation.

A record is the text between two line feeds, and no other separators (JSON text may contain U+2028 and the like). Only
its bytes and the keys of its content decide whether a record is blank, bad or a document: not what else is read of it,
nor by whom. A document is valid UTF-8 throughout, and a JSON object nested at most MAX_DEPTH deep with a string under
the text's key, or with what the source's form asks for (`forms.py`). NaN and Infinity are allowed as numbers, and a
number may have any length.
"""

from __future__ import annotations

import contextlib
import json
import typing
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from shards import formats
from shards.arrays import Ints
from shards.config import DEFAULT_MAX_DECODER_WINDOW, MIB, SourceConfig
from shards.errors import ShardError
from shards.records.forms import Form, Part, form_of
from shards.storage import files
from shards.storage.block_cache import BlockCache

_BOM = b"\xef\xbb\xbf"
BLOCK_BYTES = MIB
MAX_DEPTH = 256  # nesting of arrays and objects; far below what the parsers' own stacks can take
ADVICE = "fix the line, or set data.on_bad_record: skip"
_MAX_INT_DIGITS = 640  # Python converts this many under any settings; a longer number becomes a float

_RAW_VALUES = msgspec.json.Decoder(dict[str, msgspec.Raw])


class Document(NamedTuple):
    """A record that is valid and kept."""

    text: str
    source: str  # the source's name, or the sub-source that the record names
    shard: str  # path
    line: int  # line of the record in the unpacked shard, counted from 1
    id: str | None  # the record's own id, if it has one
    parts: list[Part] | None = None  # what the text is joined of, if the source's documents have a form


class BadRecord(NamedTuple):
    """A record that is not blank and holds no text, or one whose text is kept out of training."""

    line: int  # counted from 1
    reason: str
    contaminated: bool = False  # its text is also an evaluation suite's


class Records(NamedTuple):
    """The contents of consecutive lines, without blank ones. texts, lines, sub_sources and ids have equal lengths."""

    texts: list[str]
    lines: list[int]  # counted from 1
    sub_sources: list[str | None]
    ids: list[str | None]
    bad: list[BadRecord]
    token_ids: list[Ints] | None = None  # one array each, if the source has ids instead of texts, which are then empty
    parts: list[list[Part]] | None = None  # what each text is joined of, if the source's documents have a form

    def only(self, numbers: Sequence[int], dropped: Sequence[BadRecord] = ()) -> Records:
        """Return some of the documents, by their positions. Args: dropped: records to add to the bad ones."""
        token_ids, parts = self.token_ids, self.parts
        return Records(
            texts=[self.texts[i] for i in numbers],
            lines=[self.lines[i] for i in numbers],
            sub_sources=[self.sub_sources[i] for i in numbers],
            ids=[self.ids[i] for i in numbers],
            bad=[*self.bad, *dropped],
            token_ids=None if token_ids is None else [token_ids[i] for i in numbers],
            parts=None if parts is None else [parts[i] for i in numbers],
        )


class Stretch(NamedTuple):
    """Records of a shard that follow those before, of which some may have been passed over."""

    records: Records
    end: int  # number of the record after them, counted from 0


class _Place:
    """Where a value lies in a record: under a key or, with dots, inside objects unless there is a key of that name."""

    def __init__(self, key: str, role: str, fields: dict[str, str]) -> None:
        """Add the keys that lead to it to the fields that a parser builds. Args: role: names the fields."""
        self.key = key
        first, *self.inner = key.split(".")
        self._field = fields.setdefault(key, role)
        self._holder = fields.setdefault(first, f"{role}_holder") if self.inner else ""

    def of_struct(self, record: object) -> object:
        """Return its value in a record with those fields, msgspec.UNSET if it has none."""
        value = getattr(record, self._field)
        if value is msgspec.UNSET and self.inner:
            return _value_under(getattr(record, self._holder), self.inner)
        return value

    def of_object(self, record: dict[str, object]) -> object:
        """Return its value in any JSON object, msgspec.UNSET if it has none."""
        value = record.get(self.key, msgspec.UNSET)
        if value is msgspec.UNSET and self.inner:
            return _value_under(record, self.key.split("."))
        return value


class RecordParser:
    """A parser of records by the keys that a source names."""

    def __init__(
        self,
        text_key: str = "text",
        id_key: str = "id",
        source_from: str | None = None,
        strict: bool = True,
        form: Form | None = None,
    ) -> None:
        """Prepare a parser for these keys.

        Args:
            text_key, id_key, source_from: as in a SourceConfig; all may be dotted.
            form: what a document is made of, instead of the text under text_key.
            strict: judge records by this module's rule. False is the rule of runs begun before it: fields that are not
                read are not checked for UTF-8, and the parsers limit depth and digits.
        """
        self._strict, self._form = strict, form
        # Only these keys are built, once each; the parser skips everything else in a record.
        fields: dict[str, str] = {}
        self._contents = [
            _Place(key, f"content_{i}", fields) for i, key in enumerate(form.keys if form else [text_key])
        ]
        self._id = _Place(id_key, "id", fields)
        self._sub_source = _Place(source_from, "source", fields) if source_from else None
        self._decoder: msgspec.json.Decoder[typing.Any] | None = None
        # The fast parser compares keys with the line's bytes, so it cannot look for one that JSON must escape.
        if all(json.dumps(key, ensure_ascii=False) == f'"{key}"' for key in fields):
            # A text that is no string, or not there, ends the parser sooner than it would be found out here
            needed = ["content_0"] if form is None and not self._contents[0].inner else []
            kinds: list[typing.Any] = [(field, str) for field in needed]
            kinds += [(field, object, msgspec.UNSET) for field in fields.values() if field not in needed]
            names = {field: key for key, field in fields.items()}
            kind: typing.Any = msgspec.defstruct("Record", kinds, rename=names, gc=False)
            self._decoder = msgspec.json.Decoder(kind)

    def parse(self, raw: bytes, first_line: int) -> Records:
        """Parse whole lines; the last may lack its line feed.

        Args:
            raw: bytes of the lines.
            first_line: number of the first line, counted from 1.
        """
        records = Records([], [], [], [], [], parts=[] if self._form else None)
        for line, record in enumerate(raw.split(b"\n"), first_line):
            if line == 1:
                record = record.removeprefix(_BOM)
            try:
                if self._strict:
                    _check(record)
                content, identity, sub_source = self._parse_fast(record) or self._parse_exactly(record)
            except ValueError as error:
                if record.strip():
                    records.bad.append(BadRecord(line, str(error)))
                continue
            if isinstance(content, str):
                records.texts.append(content)
            elif records.parts is not None:
                records.texts.append("".join(part.text for part in content))
                records.parts.append(content)
            records.lines.append(line)
            records.sub_sources.append(name_of(sub_source))
            known = identity is not None and identity is not msgspec.UNSET
            records.ids.append(_without_surrogates(str(identity)) if known else None)
        return records

    def _parse_fast(self, record: bytes) -> tuple[str | list[Part], object, object] | None:
        """Return (text or parts, id, sub-source); None if only the exact parser can judge the record.

        Once `_check` has passed a record, the exact parser accepts whatever this one does; it is only slower.
        """
        if self._decoder is None or not record:
            return None
        try:
            found = self._decoder.decode(record)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        content: typing.Any = self._contents[0].of_struct(found)
        if self._form:
            try:
                content = self._form.parts([_present(place.of_struct(found)) for place in self._contents])
            except ValueError:
                return None
        elif not isinstance(content, str):
            return None
        return content, self._id.of_struct(found), self._sub_source.of_struct(found) if self._sub_source else None

    def _parse_exactly(self, record: bytes) -> tuple[str | list[Part], object, object]:
        """Parse any record, including NaN in a metadata field and escaped lone surrogates, both of which JSON allows.

        A lone surrogate becomes U+FFFD, since no tokenizer accepts it. Raises: ValueError with the reason.
        """
        try:
            found = json.loads(record.decode(), parse_int=_integer if self._strict else None)
        except UnicodeDecodeError as error:
            raise ValueError(_not_utf8(error)) from None
        except (ValueError, RecursionError) as error:
            if self._strict and isinstance(error, RecursionError):
                raise  # the stack is nearly full, which says nothing about a record that `_check` has passed
            raise ValueError(f"not JSON: {error}") from None
        if not isinstance(found, dict):
            raise ValueError(f"a JSON {type(found).__name__}, not an object")
        values = [place.of_object(found) for place in self._contents]
        for place, value in zip(self._contents, values, strict=True):
            if value is msgspec.UNSET:
                keys = _keys_of(found) if place.inner else list(found)
                raise ValueError(f"has no key {place.key!r}; its keys are {', '.join(map(repr, keys[:10]))}")
        sub_source = self._sub_source.of_object(found) if self._sub_source else None
        others = self._id.of_object(found), sub_source
        if self._form:
            return [part._replace(text=_without_surrogates(part.text)) for part in self._form.parts(values)], *others
        if not isinstance(values[0], str):
            raise ValueError(f"{self._contents[0].key!r} is {json.dumps(values[0])[:40]}, not a string")
        return _without_surrogates(values[0]), *others


def _present(value: object) -> object:
    """Return a value of a record. Raises: ValueError if the record does not have it."""
    if value is msgspec.UNSET:
        raise ValueError("a key is missing")
    return value


def name_of(sub_source: object) -> str | None:
    """Return the name that a record gives its sub-source; None if it is missing, empty or no string."""
    return _without_surrogates(sub_source) if isinstance(sub_source, str) and sub_source else None


def _value_under(value: object, keys: list[str]) -> object:
    """Return the value under keys, one inside the other; msgspec.UNSET if one is missing."""
    for key in keys:
        value = value.get(key, msgspec.UNSET) if isinstance(value, dict) else msgspec.UNSET
    return value


def _keys_of(found: dict[str, object]) -> list[str]:
    """List the keys of an object and, dotted, those of objects in it."""
    return [
        name
        for key, value in found.items()
        for name in ([f"{key}.{inner}" for inner in value] if isinstance(value, dict) else [key])
    ]


def parser_for(source: SourceConfig | None, strict: bool = True) -> RecordParser:
    """Make the parser that a source asks for; None = keys of the Pile and Dolma. `strict` is as for the class."""
    if source is None:
        return RecordParser(strict=strict)
    return RecordParser(source.text_key, source.id_key, source.source_from, strict, form_of(source))


def _check(record: bytes) -> None:
    """Check what the fast parser ignores in fields that are not read. Raises: ValueError with the reason."""
    if not record.isascii():
        try:
            record.decode()
        except UnicodeDecodeError as error:
            raise ValueError(_not_utf8(error)) from None
    if len(record) > 2 * MAX_DEPTH and _num_openings(record) > MAX_DEPTH and _is_too_deep(record):
        raise ValueError(f"JSON that nests more than {MAX_DEPTH} deep")


def _num_openings(data: bytes) -> int:
    return data.count(b"{") + data.count(b"[")


def _is_too_deep(record: bytes) -> bool:
    """Return whether arrays and objects nest more than MAX_DEPTH deep; without valid JSON, as far as a parser gets."""
    try:
        values = [bytes(value) for value in _RAW_VALUES.decode(record).values()]
    except (msgspec.MsgspecError, RecursionError):
        values = []
    # Most brackets are inside texts: if the rest are few, the closer look, ten times slower, is unnecessary
    if _num_openings(record) - sum(_num_openings(value) for value in values if value[:1] == b'"') <= MAX_DEPTH:
        return False
    outside = b"".join(record.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2])  # outside all strings
    data = np.frombuffer(outside, np.uint8) | 0x20  # turns [ and ] into { and }, and no other byte into them
    brackets = data[(data == ord("{")) | (data == ord("}"))]
    return int(np.cumsum(np.where(brackets == ord("{"), 1, -1)).max(initial=0)) > MAX_DEPTH


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 at byte {error.start} of the line"


def _integer(digits: str) -> int | float:
    """Convert a number, to the nearest float if it is too long for an int: no record is bad because of its digits."""
    return int(digits) if len(digits) <= _MAX_INT_DIGITS else float(digits)


def _without_surrogates(text: str) -> str:
    """Replace each lone surrogate, which neither UTF-8 nor a tokenizer can represent, by U+FFFD."""
    return text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def read_records(
    path: str,
    source: SourceConfig | None = None,
    max_decoder_window: int = DEFAULT_MAX_DECODER_WINDOW,
    first: int = 0,
    stop: int | None = None,
) -> Iterator[Stretch]:
    """Yield a shard's records in order, a block at a time, from its beginning to where the last of them is reached.

    Args:
        source: the keys to read; None = those of the Pile and Dolma.
        max_decoder_window: in bytes.
        first, stop: numbers of the first record to parse, and of the first that is not; None = all to the end.
    Raises: ShardError if the shard is missing, damaged or truncated.
    """
    parser = parser_for(source)
    files.stat(path)
    number = 0
    for block in _blocks(path, max_decoder_window):
        count = block.count(b"\n") + (not block.endswith(b"\n"))
        a, b = (min(max(bound - number, 0), count) for bound in (first, number + count if stop is None else stop))
        wanted = block if (a, b) == (0, count) else b"\n".join(block.split(b"\n")[a:b])
        yield Stretch(parser.parse(wanted, number + a + 1), number + count)
        number += count
        if stop is not None and number >= stop:
            return


def read_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file of JSON lines that are not blank, each with its number, counted from 1.

    Raises: ShardError if the file is missing, damaged or truncated.
    """
    files.stat(path)
    number = 0
    for block in _blocks(path, DEFAULT_MAX_DECODER_WINDOW):
        for line in block.removesuffix(b"\n").split(b"\n"):
            number += 1
            if line.strip():
                yield number, line


def first_bad_record(
    path: str, source: SourceConfig, max_decoder_window: int, strict: bool, cache: BlockCache | None
) -> BadRecord | None:
    """Return a shard's first record if none in its first block holds a text; None if one does.

    Damage to the shard itself is left for its indexing to report.
    """
    with contextlib.suppress(ShardError), contextlib.closing(_blocks(path, max_decoder_window, cache)) as blocks:
        for block in blocks:
            records = parser_for(source, strict).parse(block, 1)
            return records.bad[0] if records.bad and not records.lines else None
    return None


def bad_record_error(path: str, bad: BadRecord, advice: str = ADVICE) -> ShardError:
    """Make the error for a bad record that may not be skipped."""
    return ShardError(f"{path}, line {bad.line}: {bad.reason}; {advice}")


def _blocks(path: str, max_decoder_window: int, cache: BlockCache | None = None) -> Generator[bytes]:
    """Yield a shard's raw bytes in blocks of whole lines. Raises: ShardError if it is missing, damaged or truncated."""
    with files.open_shard(path, cache=cache) as file:
        peeked = formats.Peeked(file, formats.MAX_HEADER_BYTES)
        chunks = formats.decode(peeked, formats.detect(peeked.head, path), path, max_decoder_window)
        yield from _whole_lines(chunks)


def _whole_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Join chunks into blocks that end with a line feed, which the last block may lack."""
    parts: list[bytes] = []
    size = 0
    for chunk in chunks:
        parts.append(chunk)
        size += len(chunk)
        if size < BLOCK_BYTES or b"\n" not in chunk:
            continue
        block = b"".join(parts)
        end = block.rfind(b"\n") + 1
        yield block[:end]
        parts = [block[end:]]
        size = len(parts[0])
    if rest := b"".join(parts):
        yield rest
