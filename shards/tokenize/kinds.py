"""Which kind of tokenizer a file holds, by its content. tokenizer -> kinds -> {sentencepiece_model, library_model}.

a SentencePiece model       as trained by `train-tokenizer`; LLaMA, Mistral
tokenizer.json              of the `tokenizers` library: GPT-NeoX, OLMo, SmolLM2
a rank file                 one token a line, in base64, with its rank, as tiktoken reads; Llama 3, GPT-4
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from shards.arrays import Ints
from shards.config import RankEncoding
from shards.errors import ConfigError
from shards.tokenize.library_model import LibraryModel
from shards.tokenize.rank_file import encoding_of, is_rank_file, library_json
from shards.tokenize.sentencepiece_model import SentencePieceModel


class Kind(Protocol):
    """What a `Tokenizer` asks of a model of any kind.

    Attributes:
        vocab_size: one more than the largest id.
        bos_id, eos_id, unk_id: as the file says; -1 = it names none.
        obstacle: the reason why documents are encoded slowly; None = they are not. Known once `prepare` was called.
        libraries: versions of the libraries that decide ids and that a run must therefore keep, by name.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    unk_id: int
    obstacle: str | None
    libraries: dict[str, str]

    def prepare(self, prefix: Sequence[int], suffix: Sequence[int], dtype: npt.DTypeLike) -> None:
        """Set the ids before and after each document, and the dtype of ids, before the first call of the others."""

    def encode_documents(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.integer], Ints]:
        """Return the ids of all documents in one array, and the length of each."""

    def encode_following(self, texts: Sequence[str]) -> list[npt.NDArray[np.integer]]:
        """Return the ids of each text alone, as of one that follows another: nothing is put before it."""

    def piece(self, index: int) -> str:
        """Return the piece of an id, as the vocabulary spells it; empty if the id has none."""

    def index(self, piece: str) -> int | None:
        """Return the id of a piece; None if there is no such piece."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""

    def normalize(self, text: str) -> str:
        """Return a text as the model's own normalizer leaves it."""

    def library_json(self) -> dict[str, Any] | None:
        """Return the content of a tokenizer.json that gives the same ids; None for a SentencePiece model."""


def open_kind(path: Path, content: bytes, rank_encoding: RankEncoding | None = None) -> Kind:
    """Open a tokenizer of any kind.

    Args:
        path: path of the file, for messages.
        content: the file's bytes, by which its kind is recognized.
        rank_encoding: what a rank file is made like; None = the file is a published one.
    Raises: ConfigError if the file is of no kind, or damaged, or not as `rank_encoding` says.
    """
    if is_rank_file(content):
        return LibraryModel(path, library_json(path, content, encoding_of(path, content, rank_encoding)))
    if rank_encoding:
        raise ConfigError(
            f"data.rank_encoding={rank_encoding}: {path} is no rank file, and says itself how texts are split; leave"
            " the key out"
        )
    if content.lstrip()[:1] == b"{":
        try:
            parsed = json.loads(content)
        except ValueError as error:
            raise ConfigError(
                f"data.tokenizer={path}: damaged: it begins as JSON, but {error}; put a whole tokenizer.json there"
            ) from None
        return LibraryModel(path, parsed)
    return SentencePieceModel(path, content)
