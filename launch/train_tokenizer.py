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

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import sentencepiece

from shards import HeadraceError, files, read_documents
from shards.durable import write_atomically

# SentencePiece learns from sentences and passes over long ones; pieces of this many characters lose few word pairs
_SENTENCE_CHARACTERS = 2000


def sentences(shards: Sequence[str]) -> Iterator[str]:
    """The documents of all shards, cut into stretches that SentencePiece takes."""
    for shard in shards:
        for document in read_documents(shard):
            for start in range(0, len(document.text), _SENTENCE_CHARACTERS):
                yield document.text[start : start + _SENTENCE_CHARACTERS]


def train(shards: Sequence[str], vocab_size: int, character_coverage: float) -> bytes:
    """The model file of a BPE tokenizer with BOS 1, EOS 2, UNK 0 and no padding piece."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(shards),
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
    return model.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", metavar="PATTERN", help="files or globs, in quotes")
    parser.add_argument("--vocab-size", type=int, required=True, help="pieces")
    parser.add_argument("--character-coverage", type=float, default=0.998, help="of the text; the rest falls to bytes")
    parser.add_argument("--out", type=Path, required=True, help="the .model file")
    arguments = parser.parse_args()
    try:
        shards = files.expand(tuple(arguments.shards), "PATTERN")
        model = train(shards, arguments.vocab_size, arguments.character_coverage)
    except HeadraceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_atomically(arguments.out, model)
    print(f"{arguments.out}: {arguments.vocab_size} pieces, learned from {len(shards)} shards")
    return 0


if __name__ == "__main__":
    sys.exit(main())
