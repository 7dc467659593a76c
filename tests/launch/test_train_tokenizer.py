"""The bundled tokenizer is what its command makes, and restores every text."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece

from pretrain.commands import dispatch
from pretrain.commands.train_tokenizer import sentences, train
from shards import read_documents
from shards.storage import files

SAMPLE = Path(__file__).parents[2] / "shards" / "sample"
BUNDLED = sentencepiece.SentencePieceProcessor(model_file=str(SAMPLE / "tokenizer-4k.model"))


def pieces(processor: sentencepiece.SentencePieceProcessor) -> list[str]:
    return [processor.id_to_piece(i) for i in range(processor.vocab_size())]


def test_the_command_reproduces_the_bundled_tokenizer() -> None:
    model = train(sentences(files.expand((f"{SAMPLE}/train/*",), "sample")), 4096, 0.998)
    assert pieces(sentencepiece.SentencePieceProcessor(model_proto=model)) == pieces(BUNDLED)


def test_every_text_of_the_sample_survives_a_round_trip() -> None:
    for shard in sorted(SAMPLE.glob("eval/*/*.zst")):
        for document in read_documents(shard):
            assert BUNDLED.decode(BUNDLED.encode(document.text)) == document.text
    hard = "  two  spaces\n\n\ttab \u2028 123 naïve 漢字 \U0001f600 end "
    assert BUNDLED.decode(BUNDLED.encode(hard)) == hard


def run(*arguments: str | Path) -> int:
    return dispatch.run("train-tokenizer", [str(argument) for argument in arguments])


def test_a_bad_record_is_named_and_can_be_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = tmp_path / "a.jsonl"
    lines = [b'{"text": "a few words %d, and more of them"}\n' % i for i in range(50)]
    shard.write_bytes(b"".join([*lines[:7], b'{"text": null}\n', *lines[7:]]))
    command = (shard, "--vocab-size", "290", "--out", tmp_path / "t.model")
    assert run(*command) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: {shard}, line 8: 'text' is null, not a string; correct the line, or pass --on-bad-record skip"
    ]
    assert not (tmp_path / "t.model").exists()
    assert run(*command, "--on-bad-record", "skip") == 0
    shard.write_bytes(b"".join(lines))
    assert pieces(sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))) == pieces(
        sentencepiece.SentencePieceProcessor(model_proto=train(sentences([str(shard)]), 290, 0.998))
    )


@pytest.mark.parametrize(
    ("text", "size", "out", "expected"),
    [
        ("abc def", 1000, "t.model", "set it to a value <="),
        ("abc def", 5, "t.model", "smaller than required_chars"),
        ("", 300, "t.model", "there is no text"),
        ("abc def", 300, "nowhere/t.model", "there is no folder"),
    ],
)
def test_arguments_that_make_no_model_are_reported_in_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str,
    size: int,
    out: str,
    expected: str,
) -> None:
    shard = tmp_path / "a.jsonl"
    shard.write_text(f'{{"text": "{text}"}}\n')
    assert run(shard, "--vocab-size", str(size), "--out", tmp_path / out) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
