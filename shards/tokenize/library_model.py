"""Text -> token ids as the `tokenizers` library does it. kinds -> library_model -> {fast_bpe, joined}.

What stands in a text is text: a special token's name, such as "<|endoftext|>", is split and encoded like any other
characters, as SentencePiece does with control tokens. Tokens that a file adds without calling them special, such as
GPT-NeoX's runs of spaces, are a part of its vocabulary and are found in texts.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from shards.arrays import Ints
from shards.errors import ConfigError
from shards.tokenize.fast_bpe import FastBPE, NotExact, library_ids
from shards.tokenize.joined import encode_each


class LibraryModel:
    """A model in the terms of the library; the attributes are those of `kinds.Kind`."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        """Load a model.

        Args:
            path: path of the file, for messages.
            content: what a tokenizer.json holds.
        Raises: ConfigError if the library does not accept it, or it encodes at random.
        """
        model = content.get("model")
        if not isinstance(model, dict):
            raise ConfigError(
                f"data.tokenizer={path}: JSON, but no tokenizer.json of the tokenizers library: it has no model; name"
                " the file that holds the vocabulary"
            )
        if model.get("dropout"):
            raise ConfigError(
                f"data.tokenizer={path}: model.dropout={model['dropout']} encodes a text differently each time; set it"
                " to null in the file"
            )
        try:
            self._library = _opened(content)
        except Exception as error:  # the library raises nothing more specific
            raise ConfigError(
                f"data.tokenizer={path}: the tokenizers library {tokenizers.__version__} cannot read it: {error}; put a"
                " whole tokenizer.json there"
            ) from None
        self._content = content
        self.vocab_size = max(self._library.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not self.vocab_size:
            raise ConfigError(f"data.tokenizer={path}: its vocabulary is empty; name the file that holds it")
        self.bos_id, self.eos_id = self._ends()
        unknown = model.get("unk_token")
        found = self._library.token_to_id(unknown) if isinstance(unknown, str) else model.get("unk_id")
        self.unk_id: int = -1 if found is None else int(found)
        self.obstacle: str | None = None
        self._fast: FastBPE | None = None
        self.libraries: dict[str, str] = {"tokenizers": tokenizers.__version__}
        try:
            self._fast = FastBPE(content, self._library)
            self.libraries |= self._fast.libraries
        except NotExact as reason:
            self.obstacle = str(reason)

    def _ends(self) -> tuple[int, int]:
        """Return the ids that the file's post-processor puts before and after a text, -1 where it is not just one."""
        marked = self._library.encode("a", add_special_tokens=True)
        added = marked.special_tokens_mask
        before = list(itertools.takewhile(bool, added))
        after = list(itertools.takewhile(bool, reversed(added)))
        return marked.ids[0] if len(before) == 1 else -1, marked.ids[-1] if len(after) == 1 else -1

    def prepare(self, prefix: Sequence[int], suffix: Sequence[int], dtype: npt.DTypeLike) -> None:
        """Set the ids before and after each document, and the dtype of ids."""
        self._prefix, self._suffix, self._dtype = list(prefix), list(suffix), np.dtype(dtype)

    def encode_documents(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.integer], Ints]:
        """Return the ids of all documents in one array, and the length of each."""
        if self._fast:
            return self._fast.encode_documents(texts, self._prefix, self._suffix, self._dtype)
        return encode_each(texts, self._encode, self._prefix, self._suffix, self._dtype)

    def encode_following(self, texts: Sequence[str]) -> list[npt.NDArray[np.integer]]:
        """Return the ids of each text alone, without what the file puts before a document."""
        return [library_ids(self._following, text) for text in texts]

    @functools.cached_property
    def _following(self) -> tokenizers.Tokenizer:
        """The library's model for texts that follow others."""
        content = _without_beginning(self._content)
        return self._library if content == self._content else _opened(content)

    def _encode(self, text: str) -> npt.NDArray[np.integer]:
        return library_ids(self._library, text)

    def piece(self, index: int) -> str:
        """Return the piece of a token id, as the vocabulary spells it; empty if the id has none."""
        return self._library.id_to_token(index) or ""

    def index(self, piece: str) -> int | None:
        """Return the id of a piece; None if there is no such piece."""
        found: int | None = self._library.token_to_id(piece)
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; special tokens have none."""
        text: str = self._library.decode(ids, skip_special_tokens=True)
        return text

    def normalize(self, text: str) -> str:
        """Return a text as the file's normalizer leaves it."""
        normalizer = self._library.normalizer
        return normalizer.normalize_str(text) if normalizer else text

    def library_json(self) -> dict[str, Any]:
        """Return the content of a tokenizer.json that gives the same ids."""
        return self._content


def _opened(content: dict[str, Any]) -> tokenizers.Tokenizer:
    """Open what a tokenizer.json holds, for whole texts. Raises: Exception if the library does not accept it."""
    library = tokenizers.Tokenizer.from_str(json.dumps(content))
    library.encode_special_tokens = True  # the name of a special token in a text is text
    library.no_truncation()
    library.no_padding()
    return library


def _without_beginning(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a tokenizer.json that puts nothing before a text."""
    return {**content, **{part: _plain(content.get(part)) for part in ("normalizer", "pre_tokenizer")}}


def _plain(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a normalizer or pre-tokenizer that puts nothing before a text; None if it did nothing else."""
    if part is None or part["type"] == "Prepend":
        return None
    changed = dict(part)
    for name in ("normalizers", "pretokenizers"):  # of a Sequence
        if name in part:
            changed[name] = [plain for inner in part[name] if (plain := _plain(inner)) is not None]
    if "add_prefix_space" in part:
        changed["add_prefix_space"] = False
    if "prepend_scheme" in part:
        changed["prepend_scheme"] = "never"
    return changed
