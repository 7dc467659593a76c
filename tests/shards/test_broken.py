"""Every kind of bad input: what is read anyway, what is skipped on request, what is an error."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from shards import Document, Loader, ShardError, SourceConfig, Tokenizer, merge_states, read_documents
from shards.records import texts
from shards.tokenizer_check import check_sources
from shards.windows.window import WindowMaker
from tests.shards.corpora import TOKENIZER, config, record, words, write_shard

GOOD = [record(words(i, 12)) for i in range(40)]

BAD = {
    b'{"text": "cut off': "not JSON",
    b'{"id": "x"}': "has no key 'text'; its keys are 'id'",
    b'{"text": null}': "'text' is null, not a string",
    b'{"text": 7}': "'text' is 7, not a string",
    b'["text"]': "a JSON list, not an object",
    b'{"text": "\xff\xfe"}': "not UTF-8 at byte 10",
    b'{"text": "raw \x01 control"}': "not JSON",
    b"\x00\x00\x00": "not JSON",
    b'{"a":' * 5000: "JSON that nests more than 256 deep",
}
GOOD_TEXTS = {
    b'{"text": "lone \\ud800 high"}': "lone \ufffd high",
    b'{"text": "lone \\udc00 low \\ud83d\\ude00"}': "lone \ufffd low \U0001f600",
    b'{"text": "nul \\u0000 inside"}': "nul \0 inside",
    '{"text": "line \u2028 separators \u0085 \u2029"}'.encode(): "line \u2028 separators \u0085 \u2029",
    b'{"text": "crlf"}\r': "crlf",
    b' \t{"text": "space around"} ': "space around",
    b'{"text": "NaN elsewhere", "meta": {"score": NaN}}': "NaN elsewhere",
    b'{"text": ""}': "",
    b'{"text": "twice", "text": "last wins"}': "last wins",
}


@pytest.mark.parametrize("line", BAD, ids=lambda line: repr(line[:24]))
def test_a_bad_record_is_named_or_skipped(tmp_path: Path, line: bytes) -> None:
    path = write_shard(tmp_path / "a.jsonl.gz", GOOD[0] + line + b"\n" + GOOD[1])
    with pytest.raises(ShardError) as caught:
        list(read_documents(path))
    assert f"{path}, line 2: {BAD[line]}" in str(caught.value)
    assert "on_bad_record='skip'" in str(caught.value)
    assert [document.line for document in read_documents(path, on_bad_record="skip")] == [1, 3]


@pytest.mark.parametrize("line", GOOD_TEXTS, ids=lambda line: repr(line[:24]))
def test_odd_but_valid_records_are_documents(tmp_path: Path, line: bytes) -> None:
    path = write_shard(tmp_path / "a.jsonl", b"\n" + line + b"\n\n" + GOOD[1])
    first, second = read_documents(path)
    assert (first.text, first.line, second.line) == (GOOD_TEXTS[line], 2, 4)
    ids = Tokenizer(TOKENIZER).encode_document(first.text)
    assert ids[0] == 1
    assert ids[-1] == 2


def test_a_byte_order_mark_and_a_missing_last_line_feed_are_accepted(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.jsonl.zst", b"\xef\xbb\xbf" + GOOD[0] + GOOD[1].rstrip())
    assert [document.line for document in read_documents(path)] == [1, 2]
    with Loader(config([{"name": "a", "paths": [str(path)], "max_epochs": 1}], lanes=1), 1) as loader:
        assert {origin.line for batch in loader for origin in batch.origins()} == {1, 2}


def test_keys_and_sub_sources_follow_the_config(tmp_path: Path) -> None:
    lines = [{"body": "x", "key": 7, "meta": {"set": "deep"}}, {"body": "y", "meta": None}, {"body": "z"}]
    path = write_shard(tmp_path / "a.jsonl", b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    source = SourceConfig(name="s", paths=(str(path),), text_key="body", id_key="key", source_from="meta.set")
    assert list(read_documents(path, source)) == [
        Document("x", "deep", str(path), 1, "7"),
        Document("y", "s", str(path), 2, None),
        Document("z", "s", str(path), 3, None),
    ]


def test_one_key_may_serve_as_text_id_and_sub_source(tmp_path: Path) -> None:
    path = write_shard(
        tmp_path / "a.jsonl", b'{"text": "x", "id": "i"}\n{"text": "y", "id": {"set": "deep"}, "n": NaN}\n'
    )
    for text_key, id_key, source_from, expected in (
        ("text", "text", "text", [("x", "x", "x"), ("y", "y", "y")]),
        ("text", "id", "id", [("x", "i", "i"), ("y", "s", "{'set': 'deep'}")]),
        ("text", "id", "id.set", [("x", "s", "i"), ("y", "deep", "{'set': 'deep'}")]),
        ("text", "id", "text.set", [("x", "s", "i"), ("y", "s", "{'set': 'deep'}")]),
    ):
        source = SourceConfig(name="s", paths=(str(path),), text_key=text_key, id_key=id_key, source_from=source_from)
        found = [(document.text, document.source, document.id) for document in read_documents(path, source)]
        assert found == expected


def test_an_empty_sub_source_is_ignored(tmp_path: Path) -> None:
    lines = [record("one", meta={"set": ""}), record("two"), record("three", meta={"set": "deep"})]
    path = write_shard(tmp_path / "a.jsonl", b"".join(lines))
    source = {"name": "s", "paths": [str(path)], "source_from": "meta.set", "max_epochs": 1}
    assert [document.source for document in read_documents(path, SourceConfig.model_validate(source))] == [
        "s",
        "s",
        "deep",
    ]
    with Loader(config([source], lanes=1), 1) as loader:
        assert set(next(loader).source_tokens) == {"s", "s/deep"}


def broken_corpus(folder: Path) -> Path:
    """Write bad lines of every kind among good ones, spread over the shard."""
    lines = list(GOOD)
    for i, line in enumerate(BAD):
        lines.insert(4 * i + 2, line + b"\n")
    return write_shard(folder / "broken.jsonl.zst", b"".join(lines))


def test_skipped_records_are_counted_when_they_are_consumed(tmp_path: Path) -> None:
    path = broken_corpus(tmp_path)
    listed = [{"name": "a", "paths": [str(path)], "max_epochs": 1}]
    data = config(listed, lanes=2, on_bad_record="skip", window_bytes=600)
    with Loader(data, 2) as loader:
        batches = list(loader)
    skipped = [record for batch in batches for record in batch.skipped]
    assert {record.line for record in skipped} <= {4 * i + 3 for i in range(len(BAD))}
    assert len(skipped) == len({record.line for record in skipped}) > 3
    counts = itertools.accumulate(len(batch.skipped) for batch in batches)
    assert [batch.skipped_so_far for batch in batches] == list(counts)
    # Two ranks that resume halfway skip the same records and count them alike.
    half = len(batches) // 2
    parts = [Loader(data, 2, 0, rank, 2) for rank in range(2)]
    for part in parts:
        part.load_state_dict(batches[half - 1].state)
    rest = [record for step in range(half, len(batches)) for part in parts for record in part.next_batch().skipped]
    assert rest == [record for batch in batches[half:] for record in batch.skipped]
    assert merge_states([part.state_dict() for part in parts]) == batches[-1].state


def test_too_many_bad_records_end_the_run(tmp_path: Path) -> None:
    path = broken_corpus(tmp_path)
    listed = [{"name": "a", "paths": [str(path)]}]
    with (
        Loader(config(listed, lanes=1, on_bad_record="skip", max_bad_records=3), 1) as loader,
        pytest.raises(
            ShardError, match=r"bad records on rank 0, more than data\.max_bad_records=3; the last: .*broken"
        ),
    ):
        list(itertools.islice(loader, 100))
    with (
        Loader(config(listed, lanes=1, num_workers=1), 1) as loader,
        pytest.raises(ShardError, match=r"broken\.jsonl\.zst, line \d+: "),
    ):
        list(itertools.islice(loader, 100))


def test_a_source_of_only_bad_records_does_not_run_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "sample_of", lambda *_: [])  # it would notice at once
    path = write_shard(tmp_path / "a.jsonl", b"{}\n" * 500)
    with (
        Loader(config([{"name": "a", "paths": [str(path)]}], lanes=2, on_bad_record="skip"), 2) as loader,
        pytest.raises(ShardError, match="a whole pass over it gives no row"),
    ):
        next(loader)


@pytest.mark.parametrize("on_bad_record", ["fail", "skip"])
@pytest.mark.parametrize("suffix", [".jsonl.zst", ".json.gz", ".jsonl"])
def test_a_wrong_text_key_stops_the_start(tmp_path: Path, suffix: str, on_bad_record: str) -> None:
    """Stop before any evaluation and before shards are read for indexing, at their first records."""
    lines = [{"body": words(i, 5)} for i in range(50)]
    raw = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    write_shard(tmp_path / f"a{suffix}", b"\n" + raw)
    write_shard(tmp_path / f"b{suffix}", raw.replace(b"{", b'{"text": null, '))
    data = config([{"name": "s", "paths": [f"{tmp_path}/*"]}], lanes=2, on_bad_record=on_bad_record)
    expected = (
        r"source 's': none of the first records .*line 2: has no key 'text'; its keys are 'body'; set .* text_key"
    )
    with pytest.raises(ShardError, match=expected):
        check_sources(data, Tokenizer(TOKENIZER))
    assert not list(tmp_path.glob("*.index.json"))
    with pytest.raises(ShardError, match=expected):
        Loader(data, 2)
    right = {"name": "s", "paths": [f"{tmp_path}/*"], "text_key": "body"}
    with Loader(config([right], lanes=2, on_bad_record=on_bad_record), 2) as loader:
        next(loader)


def test_one_shard_with_texts_is_enough_to_start(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.jsonl", b'{"body": "x"}\n' * 5)
    write_shard(tmp_path / "b.jsonl", b"".join(GOOD))
    with Loader(config([{"name": "s", "paths": [f"{tmp_path}/*"]}], lanes=1, on_bad_record="skip"), 1) as loader:
        assert {origin.shard for origin in next(loader).origins()} == {str(tmp_path / "b.jsonl")}


def test_a_source_that_turns_bad_is_reported_after_a_limited_number_of_segments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "sample_of", lambda *_: [])  # as if the first records were good
    path = write_shard(tmp_path / "a.jsonl", b'{"body": "no text here"}\n' * 5_000)
    taken: list[int] = []
    make = WindowMaker.make
    monkeypatch.setattr(WindowMaker, "make", lambda maker, task: taken.append(task.key) or make(maker, task))
    data = config([{"name": "a", "paths": [str(path)]}], lanes=16, on_bad_record="skip")
    with (
        Loader(data, 16) as loader,
        pytest.raises(ShardError, match=r"64 consecutive parts of it give no row.*has no key 'text'.*'body'.*text_key"),
    ):
        next(loader)
    assert len(taken) < 64 * 5  # windows; a part is a lane's share of an epoch here, a sixteenth of 63 windows


def test_segments_without_rows_are_skipped_if_others_have_some(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.jsonl", b"{}\n" * 1500 + record("the only one") + b"{}\n" * 1500)
    data = config([{"name": "a", "paths": [str(path)]}], lanes=2, on_bad_record="skip")
    with Loader(data, 2) as loader:
        assert {origin.line for batch in itertools.islice(loader, 5) for origin in batch.origins()} == {1501}


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".json.gz"])
def test_a_truncated_shard_stops_the_start(tmp_path: Path, suffix: str) -> None:
    path = write_shard(tmp_path / f"a{suffix}", b"".join(GOOD * 50))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ShardError, match=rf"a{suffix}.*truncated"):
        Loader(config([{"name": "a", "paths": [str(path)]}]), 8)
    with pytest.raises(ShardError, match="truncated"):
        list(read_documents(path))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_changes_during_the_run_is_an_error(tmp_path: Path, num_workers: int) -> None:
    path = write_shard(tmp_path / "a.jsonl", b"".join(GOOD * 50))
    data = config([{"name": "a", "paths": [str(path)]}], lanes=2, num_workers=num_workers, window_bytes=600)
    with Loader(data, 2) as loader:
        next(loader)
        write_shard(tmp_path / "b.jsonl", b"".join(GOOD[::-1] * 50)).replace(path)
        with pytest.raises(ShardError, match=r"a\.jsonl: changed after it was indexed"):
            list(itertools.islice(loader, 2000))
