"""Byte-level BPE many times faster than the `tokenizers` library, with its ids. library_model -> fast_bpe -> joined.

The ids are those of the library; gigatoken computes them where it is known to agree. It is asked only for vocabularies
whose every part is of a form that was compared (`_obstacle`), and never for texts with a character on which the two may
differ: one that Unicode has not assigned, which each library takes for what its own version of Unicode says, or one of
a run of characters of one category at whose ends the two were found to differ when the model was opened. Then a fixed
sample of hostile texts must have equal ids; if it has not, the library encodes everything.

gigatoken cannot set every digit apart, as SmolLM2 does. There the digits are given to it as added tokens, which are set
apart from the text around them just so. Other numbers, such as "²", are shown to it as the digit 0, whose id is then
replaced by those that the library has for the number alone: what is set apart depends on nothing that stands beside it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import json
import random
import string
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import tokenizers

from shards.arrays import Ints
from shards.tokenize.joined import encode_each
from shards.tokenize.rank_file import CL100K, LLAMA3, O200K, byte_symbols

# Bytes by which gigatoken's caches, which have no limit, may grow before it is loaded anew, between two calls
MAX_GROWTH = 256 << 20
_CODES = 0x110000
_QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_UNSPLIT = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_DIGITS = {"type": "Digits", "individual_digits": True}
_SPLITS = [
    [_LEVEL],  # GPT-2, GPT-NeoX, OLMo
    [_DIGITS, _LEVEL],  # SmolLM2
    *(
        [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, _UNSPLIT]
        for pattern in (LLAMA3, _QWEN2, CL100K, O200K)  # Llama 3, OLMo 2; Qwen 2; cl100k_base; o200k_base
    ),
]
# gigatoken knows patterns by their spelling
_RESPELLED = {
    CL100K: r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s+"
}
_ODD = [
    " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "\r", "\0", "\x04", "\x1c", "\x85", "\xa0", "\u2028", "\u3000",
    "\ufeff", "a", "the", " The", "'s", "'S", "'ll", "'\u017f", "don't", "_", "--", "==", "1", "12", "123456", "\u00bd",
    "\u00b2", "\u0663", "e\u0301", "\u0301", "\ufb01", "\u65e5\u672c", "\u1100\u1161", "\uac01", "\u212b",
    "=\u0338", "\u037e", "\U0001f642", "\U0001f469\u200d\U0001f4bb", "\U0001d4b3", "\ue000", "\ufffd",
    "\u200b", "K\u0323\u0307",
]  # fmt: skip
_SAMPLED = 500  # hostile texts
_PLAIN, _NUMBER, _UNSURE = 0, 1, 2  # how a character is encoded: by gigatoken, as a digit, by the library


Ids = npt.NDArray[np.integer]


class NotExact(Exception):
    """The reason why a vocabulary is left to the `tokenizers` library."""


class FastBPE:
    """An encoder with the ids of the library for one vocabulary.

    Attributes:
        libraries: versions of what computes ids, by name.
    """

    def __init__(self, content: dict[str, Any], library: tokenizers.Tokenizer) -> None:
        """Compare gigatoken with the library.

        Args:
            content: what the vocabulary's tokenizer.json holds.
            library: the same, opened, which takes the names of special tokens in texts for text.
        Raises: NotExact if gigatoken is missing or would not give the library's ids.
        """
        if reason := _obstacle(content):
            raise NotExact(reason)
        try:
            import gigatoken
        except ImportError:
            raise NotExact("gigatoken is not installed: pip install 'headrace[fast]'") from None
        self._open, self._library = gigatoken.Tokenizer.from_json, library
        self.libraries = {"gigatoken": importlib.metadata.version("gigatoken")}
        self._size = max(library.get_vocab(with_added_tokens=True).values()) + 1
        self._json = json.dumps(_adapted(content, self._size))
        self._process = psutil.Process()
        try:
            self._load()
        except Exception as error:  # it raises nothing more specific
            raise NotExact(f"gigatoken cannot read it: {str(error).splitlines()[0]}") from None
        self._kinds = np.full(_CODES, _PLAIN, np.uint8)  # of characters
        self._numbers: dict[int, Ids] = {}  # ids of a number, by its code
        vocabulary = content["model"]["vocab"]
        self._digit_ids = [vocabulary[digit] for digit in string.digits if digit in vocabulary]
        self._compare(content)

    def encode_documents(
        self, texts: Sequence[str], prefix: Sequence[int], suffix: Sequence[int], dtype: npt.DTypeLike
    ) -> tuple[Ids, Ints]:
        """Return the ids of all documents in one array, and the length of each, as `joined.encode_each` does."""
        before = self._process.memory_info().rss
        found = encode_each(texts, self._encode, prefix, suffix, dtype)
        self._growth += max(self._process.memory_info().rss - before, 0)
        if self._growth > MAX_GROWTH:
            self._load()
        return found

    def _encode(self, text: str) -> Ids:
        ids: Ids | None
        if text.isascii():
            ids = self._fast_ids(text)
        else:
            codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
            kinds = self._kinds.take(codes)
            kind = kinds.max()
            ids = self._fast_ids(text) if kind == _PLAIN else None
            if kind == _NUMBER:
                ids = self._number_ids(codes, kinds == _NUMBER)
        return library_ids(self._library, text) if ids is None else ids

    def _fast_ids(self, text: str) -> Ids | None:
        ids: Ids = self._fast.encode(text)
        # An id from there on is a byte for which the vocabulary has no token, and which the library passes over
        return None if len(ids) and ids.max() >= self._size else ids

    def _number_ids(self, codes: npt.NDArray[np.uint32], numbers: npt.NDArray[np.bool_]) -> Ids | None:
        """Return the ids of a text whose numbers are set apart; None if a digit is a part of some added token.

        Args:
            codes: the text's characters, uint32.
            numbers: which of them are numbers other than the digits of ASCII.
        """
        shown = np.where(numbers, np.uint32(ord("0")), codes)
        ids = self._fast_ids(shown.tobytes().decode("utf-32-le"))
        if ids is None:
            return None
        digits = numbers[(shown >= ord("0")) & (shown <= ord("9"))]
        places = np.flatnonzero(np.isin(ids, self._digit_ids))
        # The id of a digit arises from a digit alone: with as many of them as digits, they are those, in their order
        if len(places) != len(digits):
            return None
        first, *others = np.split(ids, places[digits])
        parts = [first]
        for code, after in zip(codes[numbers].tolist(), others, strict=True):
            if code not in self._numbers:
                self._numbers[code] = library_ids(self._library, chr(code))
            parts += (self._numbers[code], after[1:])
        return np.concatenate(parts)

    def _load(self) -> None:
        self._fast, self._growth = self._open(self._json), 0

    def _compare(self, content: dict[str, Any]) -> None:
        """Find the characters on which the two differ. Raises: NotExact if they differ on anything else."""
        runs = [run for run in _runs() if run[0] != "Cs"]  # a lone surrogate stands in no text
        if _sets_digits_apart(content):
            for category, first, last in runs:
                if category in ("Nd", "Nl", "No") and first > 0x7F:
                    self._kinds[first : last + 1] = _NUMBER if content.get("normalizer") is None else _UNSURE
        # Every start waits for this. Many runs are a single character; unassigned ones are unsure whatever is found.
        codes = sorted({code for category, *ends in runs if category != "Cn" for code in ends})
        texts = ["a{0}'s{0} {0}1{0}\n x{0}{0}".format(chr(code)) for code in codes]
        agreed = dict(zip(codes, self._agree(texts), strict=True))
        for category, first, last in runs:
            if category == "Cn" or not (agreed[first] and agreed[last]):
                self._kinds[first : last + 1] = _UNSURE
        if self._kinds[:0x80].any():
            raise NotExact("gigatoken splits texts in ASCII otherwise than the tokenizers library")
        texts = list(_hostile([token["content"] for token in content.get("added_tokens", [])]))
        for text, same in zip(texts, self._agree(texts), strict=True):
            if not same:
                raise NotExact(f"gigatoken {self.libraries['gigatoken']} gives other ids for {text!a}")

    def _agree(self, texts: list[str]) -> list[bool]:
        """Return for each text whether its ids are the library's."""
        encoded = self._library.encode_batch_fast(texts, add_special_tokens=False)
        return [self._encode(text).tolist() == one.ids for text, one in zip(texts, encoded, strict=True)]


def library_ids(library: tokenizers.Tokenizer, text: str) -> Ids:
    """Return the ids of a text as the library gives them, in this thread: a batch of several would take all cores."""
    (encoded,) = library.encode_batch_fast([text], add_special_tokens=False)
    return np.array(encoded.ids, np.int64)


def _obstacle(content: dict[str, Any]) -> str | None:
    """Return what of a vocabulary is of a form in which gigatoken was not compared; None if nothing is."""
    model, split = content["model"], content.get("pre_tokenizer")
    if model.get("type") != "BPE":
        return f"it is a {model.get('type')} model, not BPE"
    if model.get("byte_fallback") or model.get("unk_token") is not None:
        return "its BPE is not of the bytes of texts"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "its pieces carry marks of where in a word they stand"
    if content.get("normalizer") not in (None, {"type": "NFC"}):
        return "it normalizes texts otherwise than by NFC"
    parts = split.get("pretokenizers", [split]) if isinstance(split, dict) else []
    if [{key: value for key, value in part.items() if key != "trim_offsets"} for part in parts] not in _SPLITS:
        return "it splits texts by a pattern in which gigatoken was not compared"
    if any(token.get(key) for token in _kept(content) for key in ("lstrip", "rstrip", "single_word")):
        return "it adds tokens that depend on what stands beside them"
    return None


def _kept(content: dict[str, Any]) -> list[dict[str, Any]]:
    return [token for token in content.get("added_tokens", []) if not token.get("special")]


def _adapted(content: dict[str, Any], size: int) -> dict[str, Any]:
    """Return a vocabulary as gigatoken is to read it: special tokens are no tokens in a text, and every byte has one.

    Args:
        size: number of ids; bytes without a token get ids from there on.
    """
    vocabulary = content["model"]["vocab"]
    missing = [symbol for symbol in byte_symbols() if symbol not in vocabulary]
    filled = vocabulary | {symbol: size + i for i, symbol in enumerate(missing)}
    found = {**content, "added_tokens": _kept(content), "post_processor": None}
    found["model"] = {**content["model"], "vocab": filled}
    if _sets_digits_apart(content):
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
        found["added_tokens"] += [{"id": filled[digit], "content": digit, **plain} for digit in string.digits]
        found["pre_tokenizer"] = content["pre_tokenizer"]["pretokenizers"][1]
    split, *others = content["pre_tokenizer"].get("pretokenizers", [{}])
    pattern = split.get("pattern", {}).get("Regex")
    if pattern in _RESPELLED:
        respelled = {**split, "pattern": {"Regex": _RESPELLED[pattern]}}
        found["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [respelled, *others]}
    return found


def _sets_digits_apart(content: dict[str, Any]) -> bool:
    return content["pre_tokenizer"].get("pretokenizers", [{}])[0] == _DIGITS


@functools.cache
def _runs() -> list[tuple[str, int, int]]:
    """Return the category, first and last code of each run of characters of one category."""
    names = "".join(map(unicodedata.category, map(chr, range(_CODES)))).encode()  # two letters each
    firsts = [0, *(1 + np.flatnonzero(np.diff(np.frombuffer(names, "<u2")))).tolist(), _CODES]
    return [(names[2 * a : 2 * a + 2].decode(), a, b - 1) for a, b in itertools.pairwise(firsts)]


def _hostile(added: list[str]) -> Iterator[str]:
    """Yield texts of what splits differently, the same ones at every start.

    Args:
        added: names of the vocabulary's added tokens.
    """
    draw = random.Random(0)
    yield from ("", *_ODD, *added)
    for _ in range(_SAMPLED):
        parts = [draw.choice(added if added and draw.random() < 0.1 else _ODD) for _ in range(draw.randrange(2, 40))]
        yield "".join(parts)
