"""Trains a SentencePiece BPE tokenizer on shards. The one of the bundled sample was made by:

    python launch/train_tokenizer.py 'shards/sample/train/*' --vocab-size 4096 --out shards/sample/tokenizer-4k.model

Byte fallback, split digits, identity normalization, no leading space: decoding gives back every text as it was.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import sentencepiece

from shards import ConfigError, HeadraceError, read_documents
from shards.storage import files
from shards.storage.atomic import write_atomically

# SentencePiece learns from sentences and passes over long ones; pieces of this many characters lose few word pairs
_SENTENCE_CHARACTERS = 2000


def sentences(shards: Sequence[str], on_bad_record: Literal["fail", "skip"] = "fail") -> Iterator[str]:
    """The documents of all shards, cut into stretches that SentencePiece takes."""
    advice = "mend the line, or pass --on-bad-record skip"
    for shard in shards:
        for document in read_documents(shard, on_bad_record=on_bad_record, advice=advice):
            for start in range(0, len(document.text), _SENTENCE_CHARACTERS):
                yield document.text[start : start + _SENTENCE_CHARACTERS]


class _Held:
    """An iterator of texts that keeps the error it ends with, of which SentencePiece would leave only the words."""

    def __init__(self, texts: Iterator[str]) -> None:
        self._texts = texts
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self._texts
        except Exception as error:
            self.error = error


def train(texts: Iterator[str], vocab_size: int, character_coverage: float) -> bytes:
    """The model file of a BPE tokenizer with BOS 1, EOS 2, UNK 0 and no padding piece.

    Raises: ConfigError where SentencePiece cannot make such a model of these texts; what reading the texts raises.
    """
    model = io.BytesIO()
    held = _Held(texts)
    try:
        _train(iter(held), model, vocab_size, character_coverage)
    except RuntimeError as error:
        if held.error is None:
            reason = str(error).rpartition("]")[2].strip() or "there is no text"
            raise ConfigError(f"--vocab-size {vocab_size}: SentencePiece makes no such model: {reason}") from None
    if held.error is not None:
        raise held.error
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
        max_sentence_length=4 * _SENTENCE_CHARACTERS,  # in bytes, of which a character has up to four
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", metavar="PATTERN", help="files or globs, in quotes")
    parser.add_argument("--vocab-size", type=int, required=True, help="pieces")
    parser.add_argument("--character-coverage", type=float, default=0.998, help="of the text; the rest falls to bytes")
    parser.add_argument("--out", type=Path, required=True, help="the .model file")
    parser.add_argument("--on-bad-record", choices=("fail", "skip"), default="fail", help="as data.on_bad_record")
    arguments = parser.parse_args()
    try:
        if not arguments.out.parent.is_dir():  # not said after an hour of training
            raise ConfigError(f"--out {arguments.out}: there is no folder {arguments.out.parent}; make it first")
        shards = files.expand(tuple(arguments.shards), "PATTERN")
        texts = sentences(shards, arguments.on_bad_record)
        model = train(texts, arguments.vocab_size, arguments.character_coverage)
    except HeadraceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_atomically(arguments.out, model)
    print(f"{arguments.out}: {arguments.vocab_size} pieces, learned from {len(shards)} shards")
    return 0


if __name__ == "__main__":
    sys.exit(main())
