"""What a record is: its bytes alone decide, whatever else is read of it, by whichever parser, on whatever stack."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import Document, SourceConfig, read_documents
from shards.records.json_lines import MAX_DEPTH, RecordParser, Records
from tests.examples import examples
from tests.shards.corpora import record, words, write_shard

NUMBERS = [b"9" * 700, b"9" * 5000, b"-" + b"1" * 100_000, b"1e999", b"NaN", b"-Infinity", b"1." + b"3" * 9000]
ODD_VALUES = [
    *NUMBERS,
    b'"caf\xe9"',
    b'{"caf\xe9": 1}',
    b'"\xed\xa0\x80"',
    b'"\\ud800"',
    b'"\\u00zz"',
    b"[1,]",
    b"01",
    *(b"[" * depth + b"]" * depth for depth in (MAX_DEPTH - 3, MAX_DEPTH - 1, MAX_DEPTH, 900, 990, 5000)),
    *(b'{"a":' * depth + b"0" + b"}" * depth for depth in (MAX_DEPTH - 1, MAX_DEPTH, 950)),
    b"[" * MAX_DEPTH + b"]" * (MAX_DEPTH - 1),
    b"[" + b"[]," * 2000 + b"[]]",
    json.dumps('"[{' * 3000 + "\\" * 301).encode(),
]
KEYS: list[dict[str, str]] = [
    {},
    {"id_key": "meta"},
    {"source_from": "meta"},
    {"source_from": "meta.set.name", "id_key": "other"},
    {"source_from": "meta.set", "id_key": "meta.set.name"},
    {"id_key": 'a "quoted" key'},  # the fast parser cannot look for such a key
]


def reference(line: bytes) -> str | None:
    """Find the text of a record by the rule in shards/records/json_lines.py, without a recursive parser."""
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return None
    depth = deepest = 0
    for token in re.findall(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', text, re.DOTALL):
        depth += (token in "[{") - (token in "]}")
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        return None
    try:
        found = json.loads(text, parse_int=float)
    except ValueError:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("text"), str):
        return None
    return found["text"].encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def judged(records: Records) -> tuple[dict[int, str], list[int]]:
    return dict(zip(records.lines, records.texts, strict=True)), [bad.line for bad in records.bad]


def deeper(frames: int, function: Callable[[], Records]) -> Records:
    return deeper(frames - 1, function) if frames else function()


@pytest.mark.parametrize("keys", KEYS, ids=str)
@pytest.mark.parametrize("template", [b'{"meta": %s, "text": "x"}', b'{"text": "y", "meta": {"set": {"name": %s}}}'])
def test_texts_are_the_same_whichever_other_keys_are_read(keys: dict[str, str], template: bytes) -> None:
    lines = [template % value for value in ODD_VALUES]
    expected = {line: text for line, text in enumerate(map(reference, lines), 1) if text is not None}
    assert 8 < len(expected) < len(lines) - 8
    parser = RecordParser(**keys)
    for frames in (0, 300, 550):
        texts, bad = judged(deeper(frames, lambda: parser.parse(b"\n".join(lines), 1)))
        assert texts == expected
        assert sorted([*texts, *bad]) == list(range(1, len(lines) + 1))


LINES = [
    b'{"id": "a", "meta": {"k": [1, 2.5e3, null, true], "s": "\\u00e9x\\n"}, "text": "hi \\ud83d\\ude00", "z": -0.1}',
    '{"text": "naïve 漢字", "n": {"a": {"b": [[], {}]}}, "q": "\\\\\\""}'.encode(),
]
EDITS = st.lists(
    st.tuples(st.integers(0, 200), st.integers(0, 1), st.binary(max_size=1) | st.sampled_from(list("{}[],:0'\"\\u"))),
    max_size=4,
)


@settings(max_examples=examples(600))
@given(line=st.sampled_from(LINES), edits=EDITS)
def test_both_parsers_judge_broken_lines_alike(line: bytes, edits: list[tuple[int, int, bytes | str]]) -> None:
    for place, removed, added in edits:
        added = added if isinstance(added, bytes) else added.encode()
        line = line[:place] + added + line[place + removed :]
    if b"\n" in line:
        return
    expected = [] if (text := reference(line)) is None else [text]
    for keys in KEYS:
        assert RecordParser(**keys).parse(line, 2).texts == expected


def test_runs_begun_under_the_old_rule_keep_it() -> None:
    """Leave fields that are not read unchecked; a deep record is bad where the parser's stack ends."""
    values = (b'"caf\xe9"', b"9" * 5000, b"[" * 300 + b"]" * 300, b"1,")
    lines = [b'{"text": "x", "meta": %s}' % value for value in values]
    for keys, expected in ((KEYS[0], [1, 2, 3]), (KEYS[2], [3])):
        assert RecordParser(**keys, strict=False).parse(b"\n".join(lines), 1).lines == expected
    assert RecordParser().parse(b"\n".join(lines), 1).lines == [2]


def test_keys_that_json_escapes_are_found(tmp_path: Path) -> None:
    keys = ['a "b"', "back\\slash", "tab\there", "naïve", ""]
    for text_key, id_key in itertools.pairwise(keys):
        path = write_shard(tmp_path / "a.jsonl", record("", **{text_key: "t", id_key: 7}))
        source = SourceConfig.model_construct(name="s", text_key=text_key, id_key=id_key, source_from=None)
        assert list(read_documents(path, source)) == [Document("t", "s", str(path), 1, "7")]


def test_names_that_no_file_could_hold_are_replaced(tmp_path: Path) -> None:
    """Replace a lone surrogate in an id or a sub-source, at which writers would fail: metrics, provenance, workers."""
    path = write_shard(tmp_path / "a.jsonl", b'{"text": "x", "id": "\\ud800", "set": "a\\udc00"}\n')
    source = SourceConfig(name="s", paths=(str(path),), source_from="set")
    (document,) = read_documents(path, source)
    assert (document.id, document.source) == ("\ufffd", "a\ufffd")


def test_a_long_record_of_brackets_is_parsed() -> None:
    text = words(1, 100) + "[{" * 500_000
    assert RecordParser().parse(record(text), 1).texts == [text]


@pytest.mark.parametrize("others", [{}, {"id_key": "content.text"}, {"source_from": "content.site"}])
def test_a_dotted_key_finds_a_text_inside(others: dict[str, str]) -> None:
    lines = {
        b'{"content": {"site": "s", "text": "in"}, "id": 1}': "in",
        b'{"content.text": "out", "content": {"text": "in", "site": "s"}}': "out",  # as before dots had a meaning
        b'{"content": {"text": "\\ud800x"}}': "\ufffdx",
        b'{"content": {"text": "in", "n": NaN}}': "in",
        b'{"content.text": null, "content": {"text": "in"}}': "'content.text' is null, not a string",
        b'{"content": {"text": null}}': "'content.text' is null, not a string",
        b'{"content": "in"}': "has no key 'content.text'; its keys are 'content'",
        b'{"content": {"body": "x"}, "id": 1}': "has no key 'content.text'; its keys are 'content.body', 'id'",
    }
    parser = RecordParser("content.text", **others)
    for line, expected in lines.items():
        found = parser.parse(line, 1)
        assert [*found.texts, *(bad.reason for bad in found.bad)] == [expected], line
        assert found.sub_sources in ([], ["s"], [None])


def test_dotted_keys_of_ids_and_sub_sources_find_values_inside() -> None:
    lines = {
        b'{"text": "x", "meta": {"id": 7, "set": "s"}}': ("7", "s"),
        b'{"text": "x", "meta.id": 8, "meta.set": "out", "meta": {"id": 7, "set": "s"}}': ("8", "out"),
        b'{"text": "x", "meta.id": null, "meta": {"id": 7, "set": "s", "n": NaN}}': (None, "s"),
        b'{"text": "x", "meta": {"id": {"a": 1}, "set": 3}}': ("{'a': 1}", None),
        b'{"text": "x", "meta": "id"}': (None, None),
        b'{"text": "x", "id": 1, "set": "s"}': (None, None),
    }
    parser = RecordParser(id_key="meta.id", source_from="meta.set")
    for line, expected in lines.items():
        found = parser.parse(line, 1)
        assert (found.ids, found.sub_sources) == ([expected[0]], [expected[1]]), line
