"""Small tokenizer.json and rank files, trained here, each as the vocabularies of models in use are made."""

from __future__ import annotations

import base64
import functools
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from shards import read_documents
from tests.shards.corpora import SAMPLE

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPLITS = {
    "neox": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm2": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama3": [
        pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "qwen2": [
        pre_tokenizers.Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}
END = "<|endoftext|>"
TEMPLATE = {"single": "<|begin|> $A <|endoftext|>", "special_tokens": [("<|begin|>", 1), (END, 0)]}


def texts() -> list[str]:
    found = [document.text for path in sorted(SAMPLE.glob("*.gz")) for document in read_documents(path)]
    return [*found[::20], "日本語の文章。", "한국어 문장", "Всё смешалось в доме", "½ ﬁn 日本 語"]


@functools.cache  # several files train the same ones
def trained(kind: str) -> str:
    """Train a vocabulary of 1,500 byte-level tokens, special ones first, which begins and ends documents.

    Returns:
        The text of its tokenizer.json.
    """
    made = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    if kind in ("neox", "qwen2"):
        made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[kind]) if len(SPLITS[kind]) > 1 else SPLITS[kind][0]
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=[END, "<|begin|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts(), trainer)
    made.post_processor = processors.TemplateProcessing(**TEMPLATE)
    if kind == "neox":
        made.add_tokens([AddedToken(" " * size, normalized=True) for size in range(24, 1, -1)])
        made.add_tokens([AddedToken("|||IP|||", normalized=False)])
    return str(made.to_str())


def write_json(folder: Path, kind: str) -> Path:
    """Write the vocabulary as a tokenizer.json; that of "smollm2" has no token for the byte 4, as the real one."""
    content = json.loads(trained(kind))
    if kind == "smollm2":
        vocabulary = content["model"]["vocab"]
        del vocabulary["\u0104"]
        last = max(vocabulary, key=vocabulary.__getitem__)
        content["model"]["merges"].pop()
        del vocabulary[last]
    return write(folder / f"{kind}.json", content)


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content))
    return path


def token_bytes(symbols: str) -> bytes:
    """Return the bytes that a token of a byte-level vocabulary stands for, as its decoder gives them."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = iter(range(256, 512))
    byte_of = {chr(byte if byte in kept else next(moved)): byte for byte in range(256)}
    return bytes(byte_of[symbol] for symbol in symbols)


def ranks() -> list[bytes]:
    """Return the tokens of the vocabulary "llama3" without its special ones, in the order of their ranks."""
    vocabulary = Tokenizer.from_str(trained("llama3")).get_vocab()
    ordered = sorted(vocabulary, key=vocabulary.__getitem__)
    return [token_bytes(piece) for piece in ordered if piece not in (END, "<|begin|>")]


def write_ranks(path: Path, tokens: list[bytes]) -> Path:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return path
