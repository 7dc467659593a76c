"""A rank file, as tiktoken reads, in the terms of the `tokenizers` library. kinds -> rank_file.

Each line is a token's bytes in base64 and its rank, which is its id and says how early it is merged. The file names
neither the pattern by which texts are split first nor special tokens; those are here, of Llama 3.

tiktoken merges the neighbours whose joined bytes have the lowest rank, the leftmost among equals. The library merges by
a list of pairs instead: all pairs of tokens that join to a token, in the order of its rank. A word that is a token is
never merged at all (`ignore_merges`), in both.
"""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path
from typing import Any

from shards.errors import ConfigError

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
_NUM_SPECIAL = 256
# Those of Llama 3.1 and later, whose file and ids are those of Llama 3, which calls more of them reserved
_NAMED = (
    BOS, EOS, "<|reserved_special_token_0|>", "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>",
    "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
)  # fmt: skip
_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?(\n|$)")
# Number of ranks in files that are split by another pattern
_OTHERS = {50256: "gpt2 or r50k_base", 50280: "p50k_base", 100256: "cl100k_base", 199998: "o200k_base"}


def is_rank_file(content: bytes) -> bool:
    """Return whether a file's first line is one of a rank file."""
    return _LINE.match(content) is not None


def library_json(path: Path, content: bytes) -> dict[str, Any]:
    """Return the content of the tokenizer.json that gives the ids of a rank file.

    Args:
        path: path of the file, for messages.
    Raises: ConfigError if the file is damaged, or belongs to another pattern than Llama 3's.
    """
    ranks = _ranks(path, content)
    if len(ranks) in _OTHERS:
        raise ConfigError(
            f"data.tokenizer={path}: has the {len(ranks)} ranks of {_OTHERS[len(ranks)]}, but a rank file is read as "
            "Llama 3's, which splits texts by another pattern; name a tokenizer.json of that vocabulary instead"
        )
    symbols = byte_symbols()
    spell = {token: "".join(symbols[byte] for byte in token) for token in ranks}
    special = [*_NAMED, *(f"<|reserved_special_token_{i}|>" for i in range(2, _NUM_SPECIAL - len(_NAMED) + 2))]
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": len(ranks) + i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
            for i, name in enumerate(special)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": BOS, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": EOS, "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {
                name: {"id": name, "ids": [len(ranks) + i], "tokens": [name]} for i, name in enumerate((BOS, EOS))
            },
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {spell[token]: rank for token, rank in ranks.items()},
            "merges": [[spell[left], spell[right]] for left, right in _merges(ranks)],
        },
    }  # fmt: skip


def byte_symbols() -> list[str]:
    """Return the character that stands for each byte in byte-level vocabularies, GPT-2's alphabet."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in own]
    return [chr(byte if byte in own else 256 + others.index(byte)) for byte in range(256)]


def _ranks(path: Path, content: bytes) -> dict[bytes, int]:
    """Return the rank of each token. Raises: ConfigError naming the first bad line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            token, rank = line.split()
            decoded, place = base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error):
            raise ConfigError(
                f"data.tokenizer={path}, line {number}: {line[:40]!r} is not a token in base64 and its rank; put the "
                "whole rank file there"
            ) from None
        if place != len(ranks) or decoded in ranks:
            raise ConfigError(
                f"data.tokenizer={path}, line {number}: rank {place} and token {decoded!r}, where a new token of rank "
                f"{len(ranks)} belongs; ranks must count from 0, and tokens differ"
            )
        ranks[decoded] = place
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ConfigError(
            f"data.tokenizer={path}: has no token for the byte {missing[0]:#04x}, so it cannot spell every text; put "
            "the whole rank file there"
        )
    return ranks


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    found = [
        (rank, ranks[token[:cut]], ranks[token[cut:]], token[:cut], token[cut:])
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    return [(left, right) for *_, left, right in sorted(found)]
