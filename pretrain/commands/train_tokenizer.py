"""Train a tokenizer on a sample of the text of shards.

    headrace train-tokenizer 'shards/sample/train/*' --vocab-size 4096 --out shards/sample/tokenizer-4k.model

is how the bundled sample's was made. Kinds:

    sentencepiece   a SentencePiece BPE model with byte fallback, split digits, no normalization and no leading space
    byte-level      a tokenizer.json: BPE over bytes, of words that are split by Llama 3's pattern

Decoding restores every text. Of more than --max-bytes of text a sample is taken, stretch by stretch, by a hash of the
text: the same texts make the same tokenizer, byte for byte, on any machine. The shards are read once, from beginning to
end; no more than the sample is held in memory.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import track

from pretrain.commands.arguments import at_least
from shards import ConfigError, SourceConfig
from shards.config import DEFAULT_TEXT_KEY
from shards.storage import files
from shards.storage.atomic import write_atomically
from shards.tokenize.training import train_byte_level, train_sentencepiece
from shards.tokenize.training_sample import MAX_STRETCH_BYTES, TrainingSample

_COVERAGE = 0.998
_MAX_BYTES = 1 << 28


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", nargs="+", metavar="PATTERN", help="files or globs, in quotes")
    parser.add_argument("--kind", choices=("sentencepiece", "byte-level"), default="sentencepiece")
    parser.add_argument("--vocab-size", type=at_least(1), required=True, help="number of tokens")
    parser.add_argument(
        "--max-bytes",
        type=at_least(1),
        default=_MAX_BYTES,
        help=f"size of the sample, in UTF-8; default: {_MAX_BYTES:,}",
    )
    parser.add_argument(
        "--character-coverage",
        type=float,
        help=f"of sentencepiece: share of the text to cover, other characters become bytes; default: {_COVERAGE}",
    )
    parser.add_argument("--out", type=Path, required=True, help="the .model or .json file")
    parser.add_argument(
        "--text-key", default=DEFAULT_TEXT_KEY, help="as a source's text_key, dotted for one in an object"
    )
    parser.add_argument("--on-bad-record", choices=("fail", "skip"), default="fail", help="as data.on_bad_record")


def take_sample(arguments: argparse.Namespace) -> TrainingSample:
    """Read all shards. Raises HeadraceError if there are none, or they cannot be read or hold no text."""
    shards = files.with_columns(files.expand(tuple(arguments.shards), "PATTERN"), arguments.text_key)
    source = SourceConfig.parse({"name": "PATTERN", "paths": shards, "text_key": arguments.text_key})
    sample = TrainingSample(arguments.max_bytes)
    console = Console(stderr=True)
    for shard in track(shards, "reading", console=console, transient=True, disable=not sys.stderr.isatty()):
        sample.add_shard(shard, source, arguments.on_bad_record)
    if not sample.num_bytes:
        bad = f": {sample.num_bad} bad records, the first at {sample.first_bad}" if sample.num_bad else ""
        raise ConfigError(f"there is no text to learn from in {files.listed(shards)}{bad}")
    return sample


def run(arguments: argparse.Namespace) -> int:
    """Train the tokenizer and write its file. Raises HeadraceError if the shards or the arguments do not allow it."""
    try:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)  # now, not after an hour of training
    except OSError as error:
        raise ConfigError(f"--out {arguments.out}: its folder cannot be made: {error.strerror}") from None
    if arguments.kind == "byte-level" and arguments.character_coverage is not None:
        raise ConfigError("--character-coverage is of --kind sentencepiece; byte-level tokens cover every character")
    if arguments.max_bytes < MAX_STRETCH_BYTES:
        raise ConfigError(f"--max-bytes {arguments.max_bytes} is too small a sample; set it to {_MAX_BYTES} or so")
    sample = take_sample(arguments)
    learned = f"{sample.num_bytes:,} of {sample.read_bytes:,} bytes of text in {sample.num_documents:,} documents"
    if arguments.kind == "byte-level":
        content = train_byte_level(sample.drain(), arguments.vocab_size)
    else:
        content = train_sentencepiece(sample.drain(), arguments.vocab_size, arguments.character_coverage or _COVERAGE)
    write_atomically(arguments.out, content)
    print(f"{arguments.out}: {arguments.vocab_size} tokens, learned from {learned}")
    if sample.num_bad:
        print(f"{sample.num_bad} bad records were passed over, the first at {sample.first_bad}")
    return 0
