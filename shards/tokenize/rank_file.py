"""A rank file, as tiktoken reads, in the terms of the `tokenizers` library. kinds -> rank_file.

Each line is a token's bytes in base64 and its rank, which is its id and says how early it is merged. The file names
neither the pattern by which texts are split first nor special tokens. An `Encoding` has them: that of a published file
is known by the file's hash, any other file must be said to be made like one of these.

tiktoken merges the neighbours whose joined bytes have the lowest rank, the leftmost among equals. The library merges by
a list of pairs instead: all pairs of tokens that join to a token, in the order of its rank. A word that is a token is
never merged at all (`ignore_merges`), in both.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from pathlib import Path
from typing import Any, NamedTuple

from shards.config import RankEncoding
from shards.errors import ConfigError

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# Blanks that end a text are one word, even where a line ends within them
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+\z|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BOS, EOS, END_OF_TEXT = "<|begin_of_text|>", "<|end_of_text|>", "<|endoftext|>"


class Encoding(NamedTuple):
    """What a rank file does not say."""

    sha256: str  # of the published file
    pattern: str | None  # by which texts are split; None = GPT-2's, which the library has
    special: dict[str, int]  # name of a special token -> its id less the number of ranks
    bos: str | None
    eos: str


def _llama3_special() -> dict[str, int]:
    """Return the names of Llama 3.1 and later; Llama 3, with the same file and ids, calls more of them reserved."""
    named = [
        BOS, EOS, "<|reserved_special_token_0|>", "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>",
        "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
    ]  # fmt: skip
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(2, 256 - len(named) + 2)]
    return {name: i for i, name in enumerate([*named, *reserved])}


ENCODINGS: dict[RankEncoding, Encoding] = {
    "llama3": Encoding(
        "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55", LLAMA3, _llama3_special(), BOS, EOS
    ),
    "r50k_base": Encoding(  # GPT-2, GPT-3
        "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930", None, {END_OF_TEXT: 0}, None, END_OF_TEXT
    ),
    "cl100k_base": Encoding(  # GPT-4
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        CL100K,
        {END_OF_TEXT: 1, "<|fim_prefix|>": 2, "<|fim_middle|>": 3, "<|fim_suffix|>": 4, "<|endofprompt|>": 20},
        None,
        END_OF_TEXT,
    ),
    "o200k_base": Encoding(  # GPT-4o
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        O200K,
        {END_OF_TEXT: 1, "<|endofprompt|>": 20},
        None,
        END_OF_TEXT,
    ),
}
_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?(\n|$)")


def is_rank_file(content: bytes) -> bool:
    """Return whether a file's first line is one of a rank file."""
    return _LINE.match(content) is not None


def encoding_of(path: Path, content: bytes, named: RankEncoding | None) -> RankEncoding:
    """Return the encoding that a rank file is of.

    Args:
        path: path of the file, for messages.
        named: the one that the config names, if any.
    Raises: ConfigError if none is named and the file is none of the published ones, or it is that of another encoding.
    """
    found = hashlib.sha256(content).hexdigest()
    published = next((name for name, encoding in ENCODINGS.items() if encoding.sha256 == found), None)
    if published and named and named != published:
        raise ConfigError(
            f"data.rank_encoding={named}: {path} is the published file of {published}; set it to that, or leave it out"
        )
    if not (published or named):
        raise ConfigError(
            f"data.tokenizer={path}: a rank file that is none of the published ones, and such a file does not say how"
            f" texts are split; set data.rank_encoding to what it was made like, one of {', '.join(ENCODINGS)}, or name"
            " a tokenizer.json of that vocabulary"
        )
    return published or named  # type: ignore[return-value]


def library_json(path: Path, content: bytes, name: RankEncoding) -> dict[str, Any]:
    """Return the content of the tokenizer.json that gives the ids of a rank file of an encoding.

    Args:
        path: path of the file, for messages.
    Raises: ConfigError if the file is damaged.
    """
    encoding, ranks = ENCODINGS[name], _ranks(path, content)
    symbols = byte_symbols()
    spell = {token: "".join(symbols[byte] for byte in token) for token in ranks}
    special = {token: len(ranks) + offset for token, offset in encoding.special.items()}
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": encoding.pattern is None,
    }
    split = {"type": "Split", "pattern": {"Regex": encoding.pattern}, "behavior": "Isolated", "invert": False}
    ends = [token for token in (encoding.bos, encoding.eos) if token]
    document: list[dict[str, Any]] = [{"SpecialToken": {"id": token, "type_id": 0}} for token in ends]
    document.insert(len(ends) - 1, {"Sequence": {"id": "A", "type_id": 0}})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
            for token, index in special.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]} if encoding.pattern else level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": document,
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {token: {"id": token, "ids": [special[token]], "tokens": [token]} for token in ends},
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
