"""Train a SentencePiece BPE tokenizer on shards. This is how the bundled sample's was made.

    headrace train-tokenizer 'shards/sample/train/*' --vocab-size 4096 --out shards/sample/tokenizer-4k.model

It has byte fallback, split digits, identity normalization and no leading space, so decoding restores every text.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import sentencepiece

from shards import ConfigError, read_documents
from shards.storage import files
from shards.storage.atomic import write_atomically

# SentencePiece learns from sentences and skips long ones; stretches of this length split few pairs of words.
_SENTENCE_CHARACTERS = 2000


def sentences(shards: Sequence[str], on_bad_record: Literal["fail", "skip"] = "fail") -> Iterator[str]:
    """Yield the documents of all shards in stretches that SentencePiece does not skip."""
    advice = "correct the line, or pass --on-bad-record skip"
    for shard in shards:
        for document in read_documents(shard, on_bad_record=on_bad_record, advice=advice):
            for start in range(0, len(document.text), _SENTENCE_CHARACTERS):
                yield document.text[start : start + _SENTENCE_CHARACTERS]


class _ErrorKeeper:
    """An iterator over texts that keeps the error it ends with, since SentencePiece passes on only its message."""

    def __init__(self, texts: Iterator[str]) -> None:
        self._texts = texts
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self._texts
        except Exception as error:
            self.error = error


def train(texts: Iterator[str], vocab_size: int, character_coverage: float) -> bytes:
    """Return the model file of a BPE tokenizer with BOS 1, EOS 2, UNK 0 and no padding token.

    Raises ConfigError if SentencePiece cannot make such a model from these texts, and any error of reading them.
    """
    model = io.BytesIO()
    kept = _ErrorKeeper(texts)
    try:
        _train(iter(kept), model, vocab_size, character_coverage)
    except RuntimeError as error:
        if kept.error is None:
            reason = str(error).rpartition("]")[2].strip() or "there is no text"
            raise ConfigError(f"--vocab-size {vocab_size}: SentencePiece makes no such model: {reason}") from None
    if kept.error is not None:
        raise kept.error
    return model.getvalue()


def _train(texts: Iterator[str], model: io.BytesIO, vocab_size: int, character_coverage: float) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts,
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=character_coverage,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        max_sentence_length=4 * _SENTENCE_CHARACTERS,  # in bytes; a character has up to four
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", nargs="+", metavar="PATTERN", help="files or globs, in quotes")
    parser.add_argument("--vocab-size", type=int, required=True, help="number of tokens")
    parser.add_argument(
        "--character-coverage",
        type=float,
        default=0.998,
        help="share of the text to cover; other characters become bytes",
    )
    parser.add_argument("--out", type=Path, required=True, help="the .model file")
    parser.add_argument("--on-bad-record", choices=("fail", "skip"), default="fail", help="as data.on_bad_record")


def run(arguments: argparse.Namespace) -> int:
    """Train the tokenizer and write its file. Raises HeadraceError if the shards or the arguments do not allow it."""
    if not arguments.out.parent.is_dir():  # checked now, not after an hour of training
        raise ConfigError(f"--out {arguments.out}: there is no folder {arguments.out.parent}; create it first")
    shards = files.expand(tuple(arguments.shards), "PATTERN")
    texts = sentences(shards, arguments.on_bad_record)
    model = train(texts, arguments.vocab_size, arguments.character_coverage)
    write_atomically(arguments.out, model)
    print(f"{arguments.out}: {arguments.vocab_size} tokens, learned from {len(shards)} shards")
    return 0
