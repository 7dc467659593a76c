"""A trained tokenizer is what its command makes anywhere, of whatever shards hold the same texts, and exact."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece
import tokenizers

from pretrain.commands import dispatch
from shards import Tokenizer, read_documents

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "shards" / "sample"
BUNDLED = sentencepiece.SentencePieceProcessor(model_file=str(SAMPLE / "tokenizer-4k.model"))
HARD = "  two  spaces\n\n\ttab \u2028 123 naïve 漢字 \U0001f600 e\u0301 I'LL \x00 <|end_of_text|></s> end "


def pieces(processor: sentencepiece.SentencePieceProcessor) -> list[str]:
    return [processor.id_to_piece(i) for i in range(processor.vocab_size())]


def run(*arguments: str | Path) -> int:
    return dispatch.run("train-tokenizer", [str(argument) for argument in arguments])


def write_lines(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_the_command_reproduces_the_bundled_tokenizer(tmp_path: Path) -> None:
    assert run(f"{SAMPLE}/train/*", "--vocab-size", "4096", "--out", tmp_path / "t.model") == 0
    found = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    assert pieces(found) == pieces(BUNDLED)


def test_every_text_of_the_sample_survives_a_round_trip() -> None:
    for shard in sorted(SAMPLE.glob("eval/*/*.zst")):
        for document in read_documents(shard):
            assert BUNDLED.decode(BUNDLED.encode(document.text)) == document.text
    assert BUNDLED.decode(BUNDLED.encode(HARD)) == HARD


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [document.text for document in read_documents(SAMPLE / "eval" / "wiki" / "val.jsonl.zst")]


@pytest.mark.parametrize(("kind", "name"), [("byte-level", "t.json"), ("sentencepiece", "t.model")])
def test_the_same_texts_make_the_same_file_wherever_they_stand(
    kind: str,
    name: str,
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Cut the texts into other shards, of other formats and in another order, and train with other threads."""
    write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    half = len(texts) // 2
    body = "".join(json.dumps({"content": {"text": text}}) + "\n" for text in texts[half:])
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(body.encode()))
    rows = pa.array([{"text": text} for text in texts[:half]])
    pq.write_table(pa.table({"content": rows}), tmp_path / "b.parquet", row_group_size=7)
    options = ("--kind", kind, "--vocab-size", "400", "--max-bytes", "60000", "--out")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert run(tmp_path / "a.jsonl", *options, tmp_path / name) == 0
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    capsys.readouterr()
    other, parts = tmp_path / f"other-{name}", (tmp_path / "a.json.gz", tmp_path / "*.parquet")
    assert run(*parts, "--text-key", "content.text", *options, other) == 0
    size = sum(len(text.encode()) for text in texts)
    assert f"of {size:,} bytes of text in {len(texts):,} documents" in capsys.readouterr().out
    assert other.read_bytes() == (tmp_path / name).read_bytes()


def test_a_byte_level_tokenizer_is_exact_by_the_fast_way_too(texts: list[str], tmp_path: Path) -> None:
    shard = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    assert run(shard, "--kind", "byte-level", "--vocab-size", "1000", "--out", tmp_path / "t.json") == 0
    ours, peer = Tokenizer(tmp_path / "t.json"), tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    peer.encode_special_tokens = True
    assert (ours.obstacle, ours.vocab_size, ours.bos_id, ours.eos_id) == (None, 1000, 0, 1)
    for text in [HARD, "", *texts[:20]]:
        ids = ours.encode_document(text).tolist()
        assert ids == [0, *peer.encode(text, add_special_tokens=False).ids, 1]
        assert ours.decode(ids) == text


def test_a_bad_record_is_named_and_can_be_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard, out = tmp_path / "a.jsonl", tmp_path / "t.model"
    good: list[dict[str, object]] = [{"text": f"a few words {i}, and more of them"} for i in range(50)]
    write_lines(shard, [*good[:7], {"text": None}, *good[7:], {"txt": "x"}])
    command = (shard, "--vocab-size", "290", "--out", out)
    where = f"{shard}, line 8: 'text' is null, not a string"
    assert run(*command) == 2
    assert capsys.readouterr().err == f"error: {where}; correct the record, or pass --on-bad-record skip\n"
    assert not out.exists()
    assert run(*command, "--on-bad-record", "skip") == 0
    assert capsys.readouterr().out.splitlines()[1] == f"2 bad records were passed over, the first at {where}"
    skipped = out.read_bytes()
    write_lines(shard, good)
    assert run(*command) == 0
    assert out.read_bytes() == skipped
    assert run(*command, "--text-key", "content.text", "--on-bad-record", "skip") == 2
    error = capsys.readouterr().err
    assert "there is no text to learn from" in error
    assert "50 bad records, the first at" in error
    assert "has no key 'content.text'; its keys are 'text'" in error


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("abc def", "--vocab-size 1000", "set it to a value <="),
        ("abc def", "--vocab-size 5", "smaller than required_chars"),
        ("", "--vocab-size 300", "there is no text"),
        ("abc def", "--vocab-size 300 --out README.md/t.model", "its folder cannot be made: File exists"),
        ("abc def", "--vocab-size 300 --max-bytes 10", "too small a sample"),
        ("abc def", "--vocab-size 300 --text-key a/b", 'text_key: "a/b" is wrong'),
        ("abc def", "--vocab-size 300 --kind byte-level", "set it to a value <= 263"),
        ("abc def", "--vocab-size 257 --kind byte-level", "set it to 258 or more"),
        ("abc def", "--vocab-size 300 --kind byte-level --character-coverage 1", "is of --kind sentencepiece"),
    ],
)
def test_arguments_that_make_no_model_are_reported_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, options: str, expected: str
) -> None:
    shard = write_lines(tmp_path / "a.jsonl", [{"text": text}])
    assert run(shard, "--out", tmp_path / "t.model", *options.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
