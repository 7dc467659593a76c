"""The bundled tokenizer is what its command makes, and it gives every text back."""

from __future__ import annotations

from pathlib import Path

import sentencepiece

from launch.train_tokenizer import train
from shards import files, read_documents

SAMPLE = Path(__file__).parents[1] / "shards" / "sample"
BUNDLED = sentencepiece.SentencePieceProcessor(model_file=str(SAMPLE / "tokenizer-4k.model"))


def pieces(processor: sentencepiece.SentencePieceProcessor) -> list[str]:
    return [processor.id_to_piece(i) for i in range(processor.vocab_size())]


def test_the_bundled_tokenizer_is_what_its_command_makes() -> None:
    model = train(files.expand((f"{SAMPLE}/train/*",), "sample"), 4096, 0.998)
    assert pieces(sentencepiece.SentencePieceProcessor(model_proto=model)) == pieces(BUNDLED)


def test_every_text_of_the_sample_comes_back() -> None:
    for shard in sorted(SAMPLE.glob("eval/*/*.zst")):
        for document in read_documents(shard):
            assert BUNDLED.decode(BUNDLED.encode(document.text)) == document.text
    hard = "  two  spaces\n\n\ttab \u2028 123 naïve 漢字 \U0001f600 end "
    assert BUNDLED.decode(BUNDLED.encode(hard)) == hard
