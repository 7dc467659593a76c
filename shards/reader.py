"""Raw bytes -> documents: a shard's records, parsed and judged. formats -> reader -> window, evaluation.

A record is what stands between two line feeds (and nothing else: JSON text may hold U+2028 and the like). Whether a
record is blank, bad or a document is decided by its bytes alone.
"""

import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

import msgspec

from shards import files, formats
from shards.config import DEFAULT_MAX_DECODER_WINDOW, MIB, SourceConfig
from shards.errors import ShardError
from shards.plan import Ints

BOM = b"\xef\xbb\xbf"
BLOCK_BYTES = MIB


class Document(NamedTuple):
    """A record that is valid and kept."""

    text: str
    source: str  # the source's name, or the sub-source that the record names
    shard: str  # path
    line: int  # of the record in the unpacked shard, counted from 1
    id: str | None  # what the record calls itself, where it does


class BadRecord(NamedTuple):
    """A record that is not blank and holds no text, or one whose text is kept out of the training."""

    line: int  # counted from 1
    reason: str
    contaminated: bool = False  # its text is also an evaluation suite's


class Records(NamedTuple):
    """What consecutive lines hold, blank ones left out. texts, lines, sub_sources and ids have equal lengths."""

    texts: list[str]
    lines: list[int]  # counted from 1
    sub_sources: list[str | None]
    ids: list[str | None]
    bad: list[BadRecord]
    token_ids: list[Ints] | None = None  # of each, where the source has them instead of texts, which are empty then


class RecordParser:
    """Parses records by the keys that a source names."""

    def __init__(self, text_key: str = "text", id_key: str = "id", source_from: str | None = None) -> None:
        """Args: the keys of a SourceConfig; `source_from` may be dotted."""
        self._text_key, self._id_key = text_key, id_key
        self._sub_source = source_from.split(".") if source_from else []
        # Only these keys are built, each once; everything else in a record is passed over by the parser.
        fields = {text_key: "text"}
        self._id_field = fields.setdefault(id_key, "id")
        self._outer_field = fields.setdefault(self._sub_source[0], "outer") if self._sub_source else None
        optional: list[tuple[str, typing.Any, typing.Any]] = [
            (field, object, None) for field in fields.values() if field != "text"
        ]
        names = {field: key for key, field in fields.items()}
        kind: typing.Any = msgspec.defstruct("Record", [("text", str), *optional], rename=names, gc=False)
        self._decoder = msgspec.json.Decoder(kind)

    @classmethod
    def of(cls, source: SourceConfig | None) -> Self:
        """The parser that a source asks for; None = Pile and Dolma keys."""
        return cls(source.text_key, source.id_key, source.source_from) if source else cls()

    def parse(self, raw: bytes, first_line: int) -> Records:
        """Parses whole lines; the last may lack its line feed.

        Args:
            raw: bytes of the lines.
            first_line: number of the first of them, counted from 1.
        """
        records = Records([], [], [], [], [])
        for line, record in enumerate(raw.split(b"\n"), first_line):
            if line == 1:
                record = record.removeprefix(BOM)
            try:
                found = self._decoder.decode(record)
                text, identity = found.text, getattr(found, self._id_field)
                outer = getattr(found, self._outer_field) if self._outer_field else None
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                if not record.strip():
                    continue
                try:
                    text, identity, outer = self._parse_leniently(record)
                except ValueError as error:
                    records.bad.append(BadRecord(line, str(error)))
                    continue
            records.texts.append(text)
            records.lines.append(line)
            records.sub_sources.append(self.sub_source(outer))
            records.ids.append(None if identity is None else str(identity))
        return records

    def _parse_leniently(self, record: bytes) -> tuple[str, object, object]:
        """Parses what the fast parser refuses: NaN in a metadata field, and escaped lone surrogates, which JSON allows.

        A lone surrogate becomes U+FFFD, since no tokenizer can take it. Raises: ValueError with the reason.
        """
        try:
            found = json.loads(record.decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 at byte {error.start} of the line") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON: {error}") from None
        if not isinstance(found, dict):
            raise ValueError(f"a JSON {type(found).__name__}, not an object")
        if self._text_key not in found:
            raise ValueError(f"has no key {self._text_key!r}; its keys are {', '.join(map(repr, list(found)[:10]))}")
        text = found[self._text_key]
        if not isinstance(text, str):
            raise ValueError(f"{self._text_key!r} is {json.dumps(text)[:40]}, not a string")
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        outer = found.get(self._sub_source[0]) if self._sub_source else None
        return text, found.get(self._id_key), outer

    def sub_source(self, value: object) -> str | None:
        """The sub-source's name under the dotted key, given the value of its first part; an empty one is none."""
        if not self._sub_source:
            return None
        for part in self._sub_source[1:]:
            value = value.get(part) if isinstance(value, dict) else None
        return value if isinstance(value, str) and value else None


def read_documents(
    path: str | Path,
    source: SourceConfig | None = None,
    on_bad_record: typing.Literal["fail", "skip"] = "fail",
    max_decoder_window: int = DEFAULT_MAX_DECODER_WINDOW,
) -> Iterator[Document]:
    """Yields a shard's documents in order, from its beginning.

    Args:
        path: of one shard, in any of the compressions.
        source: which keys to read, and the name the documents carry; None = Pile and Dolma keys, and the
            shard's name without its suffixes.
        on_bad_record: a bad record ends the reading with an error, or is left out.
        max_decoder_window: bytes.
    Raises: ShardError if the shard is missing, damaged, cut short, or (with "fail") holds a bad record.
    """
    path = str(path)
    name = source.name if source else Path(path).name.split(".")[0]
    parser = RecordParser.of(source)
    files.stat(path)
    with files.open_shard(path) as file:
        peeked = formats.Peeked(file, formats.MAX_HEADER_BYTES)
        chunks = formats.decode(peeked, formats.detect(peeked.head, path), path, max_decoder_window)
        line = 1
        for block in _whole_lines(chunks):
            records = parser.parse(block, line)
            line += block.count(b"\n")
            bad = iter(records.bad if on_bad_record == "fail" else ())
            first_bad = next(bad, None)
            for text, number, sub_source, identity in zip(
                records.texts, records.lines, records.sub_sources, records.ids, strict=True
            ):
                if first_bad and first_bad.line < number:
                    break
                yield Document(text, sub_source or name, path, number, identity)
            if first_bad:
                raise bad_record_error(path, first_bad)


def bad_record_error(path: str, bad: BadRecord) -> ShardError:
    """The error for a bad record that may not be skipped."""
    return ShardError(f"{path}, line {bad.line}: {bad.reason}; mend the line, or set data.on_bad_record: skip")


def _whole_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Joins chunks into blocks that end with a line feed; the last block may lack it."""
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
