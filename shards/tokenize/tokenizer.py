"""Text -> token ids with a SentencePiece model, exactly as the model says.

window, evaluation and generation -> tokenizer -> word_encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece
import xxhash
from sentencepiece import sentencepiece_model_pb2

from shards.arrays import Ints
from shards.errors import ConfigError
from shards.tokenize.long_words import LongWords
from shards.tokenize.split_points import SPACE, Cuts
from shards.tokenize.word_encoder import WordEncoder

_MAX_UINT16_VOCABULARY = 1 << 16


class Tokenizer:
    """A SentencePiece model, and the tokens it adds at a document's ends."""

    def __init__(self, path: Path | str, bos: bool = True, eos: bool = True) -> None:
        """Load a model.

        Args:
            path: path of the .model file.
            bos, eos: begin and end each document with the model's BOS and EOS.
        Raises: ConfigError if the file is missing or no SentencePiece model, or lacks a requested BOS or EOS.
        """
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(
                f"data.tokenizer={path}: cannot be read: {error.strerror}; name a SentencePiece .model file"
            ) from None
        self.path = Path(path)
        self.marks = (bos, eos)  # whether documents begin with BOS and end with EOS
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError:
            raise ConfigError(f"data.tokenizer={path}: not a SentencePiece model") from None
        self.content_hash: str = xxhash.xxh3_128_hexdigest(model)
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.unk_id: int = self._processor.unk_id()
        for key, wanted, found in (("bos", bos, self.bos_id), ("eos", eos, self.eos_id)):
            if wanted and found < 0:
                raise ConfigError(
                    f"data.{key}=true, but the tokenizer {path} has no {key.upper()}; set data.{key}: false"
                )
        self._prefix = [self.bos_id] if bos else []
        self._suffix = [self.eos_id] if eos else []
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= _MAX_UINT16_VOCABULARY else np.int32)
        self._prepare_words(sentencepiece_model_pb2.ModelProto.FromString(model))

    def _prepare_words(self, model: sentencepiece_model_pb2.ModelProto) -> None:
        """Decide how documents are encoded: word by word if that is exact, else whole."""
        self._cuts = Cuts(model)
        # The reason why documents are encoded whole, several times slower; None = they are not
        self.obstacle = self._cuts.obstacle
        normalizer = model.normalizer_spec
        # An identity normalizer is replaced by code here; any other is called.
        self._normalizes: bool = bool(normalizer.precompiled_charsmap) or normalizer.remove_extra_whitespaces
        self._normalizes |= model.trainer_spec.treat_whitespace_as_suffix
        self._space = " " if normalizer.add_dummy_prefix else ""
        self._words: WordEncoder | None = None
        if self.obstacle is None:
            normalizer.precompiled_charsmap = b""
            normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = False
            verbatim = sentencepiece.SentencePieceProcessor()
            verbatim.LoadFromSerializedProto(model.SerializeToString())
            long_words = LongWords(verbatim, self._cuts, model, self.dtype)
            self._words = WordEncoder(verbatim, self._cuts, long_words, self._prefix, self._suffix, self.dtype)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without BOS and EOS."""
        ids, _ = self.encode_documents([text])
        return ids[len(self._prefix) : len(ids) - len(self._suffix)].tolist()

    def encode_document(self, text: str) -> npt.NDArray[np.int32]:
        """Return a document's ids, with BOS and EOS as configured: int32 [tokens]."""
        return np.array([*self._prefix, *self.encode(text), *self._suffix], np.int32)

    def encode_documents(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.integer], Ints]:
        """Return the ids of all documents in one array, uint16 if the vocabulary fits, and the length of each."""
        if self._words is not None:
            return self._words.encode([self._spell(text).encode() for text in texts])
        prefix, suffix = np.array(self._prefix, self.dtype), np.array(self._suffix, self.dtype)
        parts = [np.zeros(0, self.dtype)]
        for text in texts:
            parts += (prefix, self._processor.EncodeAsNumpy(text).astype(self.dtype), suffix)
        ends = np.cumsum([0, *map(len, parts[1:])])[::3]
        return np.concatenate(parts), np.diff(ends)

    def _spell(self, text: str) -> str:
        """Normalize a text and spell it as `Cuts.spell` does."""
        if self._normalizes:
            return self._cuts.spell(self._processor.Normalize(text))
        return self._cuts.spell(self._space + text) if text else ""

    def piece(self, index: int) -> str:
        """Return the piece of a token id, as the model's vocabulary spells it."""
        piece: str = self._processor.IdToPiece(index)
        return piece

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        """Return the text of token ids; control tokens such as BOS have none."""
        text: str = self._processor.DecodeIds([int(i) for i in ids])
        return text

    def difference(self, text: str, ids: npt.NDArray[np.integer]) -> tuple[str, str] | None:
        """Compare a document with what its ids decode to; return both from the first difference on, or None if equal.

        The text is compared as the model's own normalizer leaves it, without spaces at its ends, which a model may add
        or leave out.

        Args:
            ids: ids without UNK, with BOS and EOS as configured.
        """
        body = ids[len(self._prefix) : len(ids) - len(self._suffix)]
        expected, found = (_plain(spelled) for spelled in (self._processor.Normalize(text), self.decode(body)))
        if expected == found:
            return None
        pairs = enumerate(zip(expected, found, strict=False))
        start = next((i for i, (ours, theirs) in pairs if ours != theirs), min(len(expected), len(found)))
        return expected[start:], found[start:]


def _plain(spelled: str) -> str:
    return spelled.replace(SPACE, " ").strip(" ")
