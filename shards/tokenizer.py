"""Text -> token ids with a SentencePiece model, exactly as the model says.

window, evaluation and generation -> tokenizer.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece
import xxhash

from shards.cuts import Cuts
from shards.errors import ConfigError
from shards.plan import Ints

MAX_UINT16_VOCABULARY = 1 << 16
MAX_PART = 1 << 15  # characters encoded in one call: larger ones take more memory, and more time each


class Tokenizer:
    """A SentencePiece model, and how it marks a document's ends."""

    def __init__(self, path: Path | str, bos: bool = True, eos: bool = True) -> None:
        """
        Args:
            path: of the .model file.
            bos, eos: begin and end each document with the model's BOS and EOS.
        Raises: ConfigError if the file is missing or no SentencePiece model, or lacks a BOS or EOS that is asked for.
        """
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(
                f"data.tokenizer={path}: cannot be read: {error.strerror}; name a SentencePiece .model file"
            ) from None
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError:
            raise ConfigError(f"data.tokenizer={path}: not a SentencePiece model") from None
        self._cuts = Cuts(model)
        self.content_hash: str = xxhash.xxh3_128_hexdigest(model)
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        for key, wanted, found in (("bos", bos, self.bos_id), ("eos", eos, self.eos_id)):
            if wanted and found < 0:
                raise ConfigError(
                    f"data.{key}=true, but the tokenizer {path} has no {key.upper()}; set data.{key}: false"
                )
        self._prefix = [self.bos_id] if bos else []
        self._suffix = [self.eos_id] if eos else []
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= MAX_UINT16_VOCABULARY else np.int32)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS and EOS."""
        ids: list[int] = self._processor.EncodeAsIds(text)
        return ids

    def encode_document(self, text: str) -> npt.NDArray[np.int32]:
        """int32 [tokens]: a document's ids, with BOS and EOS as configured."""
        return np.array([*self._prefix, *self.encode(text), *self._suffix], np.int32)

    def encode_documents(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.integer], Ints]:
        """(ids, lengths): ids of all documents in one array, uint16 where the vocabulary fits; tokens of each."""
        parts: list[npt.NDArray[np.integer]] = []
        lengths = np.empty(len(texts), np.int64)
        prefix, suffix = np.array(self._prefix, self.dtype), np.array(self._suffix, self.dtype)
        for i, text in enumerate(texts):
            ids = self._encode_compact(text)
            lengths[i] = len(prefix) + len(ids) + len(suffix)
            parts += (prefix, ids, suffix)
        return (np.concatenate(parts) if parts else np.zeros(0, self.dtype)), lengths

    def _encode_compact(self, text: str) -> npt.NDArray[np.integer]:
        """As `encode`, in an array; a long text part by part where that is exact, so that it takes little memory."""
        if len(text) <= MAX_PART or not self._cuts.exact:
            return np.array(self.encode(text), self.dtype)
        return np.concatenate([np.array(self.encode(part), self.dtype) for part in self._cuts.parts(text, MAX_PART)])

    def piece(self, index: int) -> str:
        """What a token id stands for, as the model's vocabulary spells it."""
        piece: str = self._processor.IdToPiece(index)
        return piece

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        """The text of token ids; control tokens such as BOS have none."""
        text: str = self._processor.DecodeIds([int(i) for i in ids])
        return text
