"""Text -> token ids with a tokenizer of any kind, exactly as its file says.

window, evaluation and generation -> tokenizer -> kinds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import xxhash

from shards.arrays import Ints
from shards.config import DataConfig, RankEncoding
from shards.errors import ConfigError
from shards.tokenize.kinds import Kind, open_kind
from shards.tokenize.split_points import SPACE

_MAX_UINT16_VOCABULARY = 1 << 16


class Tokenizer:
    """A tokenizer's file, and the tokens it adds at a document's ends."""

    def __init__(
        self,
        path: Path | str,
        bos: bool = True,
        eos: bool = True,
        bos_token: str | None = None,
        eos_token: str | None = None,
        rank_encoding: RankEncoding | None = None,
    ) -> None:
        """Load a model.

        Args:
            path: path of a SentencePiece model, a tokenizer.json or a rank file of tiktoken.
            bos, eos: begin and end each document with BOS and EOS.
            bos_token, eos_token: pieces to use as BOS and EOS; None = those that the file names.
            rank_encoding: what a rank file is made like; None = the file is a published one.
        Raises: ConfigError if the file is missing or no tokenizer, or lacks a requested BOS or EOS.
        """
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(
                f"data.tokenizer={path}: cannot be read: {error.strerror}; name a SentencePiece .model file, a "
                "tokenizer.json or a rank file of tiktoken"
            ) from None
        self.path = Path(path)
        self.content_hash: str = xxhash.xxh3_128_hexdigest(content)
        self._kind: Kind = open_kind(self.path, content, rank_encoding)
        self.vocab_size = self._kind.vocab_size
        self.libraries = self._kind.libraries  # versions that a run must keep
        self.unk_id = self._kind.unk_id
        self.bos_id = self._id_of("bos", bos_token, self._kind.bos_id)
        self.eos_id = self._id_of("eos", eos_token, self._kind.eos_id)
        missing = [key for key, wanted in (("bos", bos), ("eos", eos)) if wanted and getattr(self, f"{key}_id") < 0]
        if missing:  # told at once: who has mended one should not meet the other
            raise ConfigError(
                "\n".join(
                    f"data.{key}=true, but the tokenizer {self.path} has no {key.upper()}; set data.{key}: false, or "
                    f"name one of its tokens in data.{key}_token"
                    for key in missing
                )
            )
        # Whether documents begin with BOS and end with EOS, and with which if the config says it
        self.marks = (bos_token if bos and bos_token else bos, eos_token if eos and eos_token else eos)
        self._prefix = [self.bos_id] if bos else []
        self._suffix = [self.eos_id] if eos else []
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= _MAX_UINT16_VOCABULARY else np.int32)
        self._kind.prepare(self._prefix, self._suffix, self.dtype)
        self.obstacle = self._kind.obstacle  # the reason why documents are encoded slowly; None = they are not

    @classmethod
    def of(cls, data: DataConfig) -> Self:
        """Open the tokenizer that a data config names. Raises: ConfigError as the class does."""
        return cls(data.tokenizer, data.bos, data.eos, data.bos_token, data.eos_token, data.rank_encoding)

    def _id_of(self, key: str, named: str | None, found: int) -> int:
        """Return the id of BOS or EOS, -1 if there is none. Raises: ConfigError if the named one is not there."""
        if named is None:
            return found
        index = self._kind.index(named)
        if index is None:
            raise ConfigError(
                f"data.{key}_token={named!r}: the tokenizer {self.path} has no such token; name one that it has"
            )
        return index

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without BOS and EOS."""
        ids, _ = self.encode_documents([text])
        return ids[len(self._prefix) : len(ids) - len(self._suffix)].tolist()

    def encode_document(self, text: str) -> npt.NDArray[np.int32]:
        """Return a document's ids, with BOS and EOS as configured: int32 [tokens]."""
        return np.array([*self._prefix, *self.encode(text), *self._suffix], np.int32)

    @property
    def beginning(self) -> list[int]:
        """Return the ids at a document's beginning: BOS, or none, as configured."""
        return list(self._prefix)

    @property
    def ending(self) -> list[int]:
        """Return the ids at a document's end: EOS, or none, as configured."""
        return list(self._suffix)

    def encode_beginnings(self, texts: Sequence[str]) -> list[npt.NDArray[np.integer]]:
        """Return the ids of each text as of the beginning of a document: with BOS as configured, without EOS."""
        ids, lengths = self.encode_documents(texts)
        return [part[: len(part) - len(self._suffix)] for part in np.split(ids, np.cumsum(lengths)[:-1])]

    def encode_following(self, texts: Sequence[str]) -> list[npt.NDArray[np.integer]]:
        """Return the ids of each text as of one that follows another: without what a model puts before a document.

        A SentencePiece model, for one, usually puts a space before a text; one that follows begins with a space only if
        it says so. The text before it plays no part, so its own ids stay the same.
        """
        return [ids.astype(self.dtype) for ids in self._kind.encode_following(texts)]

    def encode_documents(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.integer], Ints]:
        """Return the ids of all documents in one array, uint16 if the vocabulary fits, and the length of each."""
        return self._kind.encode_documents(texts)

    def index(self, piece: str) -> int | None:
        """Return the id of a piece of the vocabulary, such as a special token; None if there is no such piece."""
        return self._kind.index(piece)

    def piece(self, index: int) -> str:
        """Return the piece of a token id, as the model's vocabulary spells it; empty if the id has none."""
        return self._kind.piece(index)

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        """Return the text of token ids; control tokens such as BOS have none."""
        return self._kind.decode([int(i) for i in ids])

    def library_json(self) -> dict[str, Any] | None:
        """Return the content of a tokenizer.json that gives the same ids; None for a SentencePiece model."""
        return self._kind.library_json()

    def difference(self, text: str, ids: npt.NDArray[np.integer]) -> tuple[str, str] | None:
        """Compare a document with what its ids decode to; return both from the first difference on, or None if equal.

        The text is compared as the model's own normalizer leaves it, without spaces at its ends, which a model may add
        or leave out.

        Args:
            ids: ids without UNK, with BOS and EOS as configured or, if another program made them, without.
        """
        prefix, suffix = self._prefix, self._suffix
        begin = len(prefix) * (ids[: len(prefix)].tolist() == prefix)
        end = len(ids) - len(suffix) * (ids[max(begin, len(ids) - len(suffix)) :].tolist() == suffix)
        body = ids[begin:end]
        expected, found = (_plain(spelled) for spelled in (self._kind.normalize(text), self.decode(body)))
        if expected == found:
            return None
        pairs = enumerate(zip(expected, found, strict=False))
        start = next((i for i, (ours, theirs) in pairs if ours != theirs), min(len(expected), len(found)))
        return expected[start:], found[start:]


def describe(libraries: Mapping[str, str]) -> str:
    """Name libraries and their versions, for messages."""
    return " and ".join(f"{name} {version}" for name, version in sorted(libraries.items())) or "SentencePiece"


def _plain(spelled: str) -> str:
    return spelled.replace(SPACE, " ").strip(" ")
