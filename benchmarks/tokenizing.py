"""Measure how fast each kind of tokenizer encodes, beside the libraries, and that ids are equal.

    pip install 'headrace[fast]' tiktoken
    python benchmarks/tokenizing.py 'corpus/*.zst' 'corpus/*.gz' --tokenizer NEOX.json --tokenizer LLAMA3.model

One process, one thread; MB/s of text in UTF-8 by the time of the CPU, which other work on the machine does not change
much. Ours is measured on all texts once, from empty caches (first) and once more (again); the libraries, whose rate
hardly changes, on every Nth document, whose ids are compared. tiktoken reads rank files only, of
which those are read that Meta and OpenAI published.
"""

from __future__ import annotations

import argparse
import base64
import glob
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # read when the library encodes its first batch

import numpy as np
import sentencepiece
import tokenizers

from shards import Tokenizer, read_documents
from shards.tokenize.rank_file import LLAMA3, encoding_of, is_rank_file
from shards.tokenize.tokenizer import describe

MB = 1e6
LIBRARIES = ("SentencePiece", "tokenizers", "tiktoken")
BATCH = 100  # documents, about those of a window


def rate(encode: Callable[[list[str]], object], texts: Sequence[str]) -> float:
    """Return the MB/s of encoding texts, in batches."""
    spent = 0.0
    for i in range(0, len(texts), BATCH):
        batch = list(texts[i : i + BATCH])
        begun = time.process_time()
        encode(batch)
        spent += time.process_time() - begun
    return sum(len(text.encode()) for text in texts) / MB / spent


def peers(path: Path, ours: Tokenizer) -> dict[str, Callable[[str], list[int]]]:
    """Return what encodes a text as the file says, by the library's name."""
    content = ours.library_json()
    if content is None:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        return {"SentencePiece": processor.encode}
    library = tokenizers.Tokenizer.from_str(json.dumps(content))
    library.encode_special_tokens = True
    found = {"tokenizers": lambda text: library.encode_batch_fast([text], add_special_tokens=False)[0].ids}
    return found | ({"tiktoken": tiktoken_encoding(path)} if is_rank_file(path.read_bytes()) else {})


def tiktoken_encoding(path: Path) -> Callable[[str], list[int]]:
    """Return what encodes by a published rank file, split by the pattern that tiktoken itself has for it."""
    import tiktoken
    from tiktoken_ext import openai_public

    content = path.read_bytes()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in content.splitlines())}
    name = encoding_of(path, content, None)
    pattern = LLAMA3  # Meta's own code hands it to tiktoken
    if name in openai_public.ENCODING_CONSTRUCTORS:
        with mock.patch.object(openai_public, "load_tiktoken_bpe"):  # which would download the ranks
            pattern = openai_public.ENCODING_CONSTRUCTORS[name]()["pat_str"]
    return tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}).encode_ordinary


def computed_by(ours: Tokenizer) -> str:
    """Return what computes ids, or why they are computed slowly."""
    return ours.obstacle or describe(ours.libraries)


def measure(path: Path, texts: list[str], libraries: Sequence[str], every: int) -> None:
    """Print one row for a file. Raises: AssertionError if an id differs."""
    begun = time.process_time()
    ours = Tokenizer(path, bos=False, eos=False)
    opened = time.process_time() - begun
    first, again = (rate(ours.encode_documents, texts) for _ in range(2))
    sample = texts[::every]
    found = {name: one for name, one in peers(path, ours).items() if name in (libraries or LIBRARIES)}
    rates = {name: rate(lambda batch, one=one: [one(text) for text in batch], sample) for name, one in found.items()}
    for text in sample:
        ids = ours.encode(text)
        assert all(np.array_equal(ids, one(text)) for one in found.values()), ascii(text[:200])
    beside = ", ".join(f"{name} {value:.2f} ({first / value:.0f}x)" for name, value in rates.items())
    print(f"| {path.name} | {opened:.1f} | {first:.1f} | {again:.1f} | {beside} | {computed_by(ours)} |", flush=True)


def prove(path: Path, texts: list[str], libraries: Sequence[str]) -> int:
    """Print a row of what is equal for a file. Return the number of documents with other ids than some library's."""
    ours = Tokenizer(path, bos=False, eos=False)
    found = {name: one for name, one in peers(path, ours).items() if name in (libraries or LIBRARIES)}
    tokens, different = 0, dict.fromkeys(found, 0)
    for i in range(0, len(texts), BATCH):
        ids, lengths = ours.encode_documents(texts[i : i + BATCH])
        tokens += len(ids)
        for text, part in zip(texts[i : i + BATCH], np.split(ids, np.cumsum(lengths)[:-1]), strict=True):
            for name, encode in found.items():
                if not np.array_equal(part, encode(text)):
                    different[name] += 1
                    print(f"{path.name}, {name}: {text[:200]!a}", file=sys.stderr)
    compared = ", ".join(f"{count} from {name}" for name, count in different.items())
    print(f"| {path.name} | {len(texts):,} | {tokens:,} | {compared} | {computed_by(ours)} |", flush=True)
    return sum(different.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", help="patterns of shards, whose texts are read into memory")
    parser.add_argument("--tokenizer", type=Path, action="append", required=True)
    parser.add_argument("--library", choices=LIBRARIES, action="append", default=[], help="only this one; default: all")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--every", type=int, default=10, help="the libraries encode one document in this many")
    how.add_argument("--prove", action="store_true", help="compare the ids of all documents instead of timing")
    arguments = parser.parse_args()
    paths = [path for pattern in arguments.shards for path in sorted(glob.glob(pattern))]
    texts = [document.text for path in paths for document in read_documents(Path(path))]
    print(f"{len(texts):,} documents, {sum(len(text.encode()) for text in texts) / MB:.1f} MB\n")
    if arguments.prove:
        print("| file | documents | tokens | documents with other ids | computed by |")
        print("| --- | ---: | ---: | --- | --- |")
        sys.exit(sum(prove(path, texts, arguments.library) for path in arguments.tokenizer) > 0)
    print("| file | open, s | ours, first | ours, again | libraries | computed by |")
    print("| --- | ---: | ---: | ---: | --- | --- |")
    for path in arguments.tokenizer:
        measure(path, texts, arguments.library, arguments.every)


if __name__ == "__main__":
    main()
