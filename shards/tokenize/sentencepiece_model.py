"""Text -> token ids as a SentencePiece model says. kinds -> sentencepiece_model -> {word_encoder, joined}."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from shards.arrays import Ints
from shards.errors import ConfigError
from shards.tokenize.joined import encode_each
from shards.tokenize.long_words import LongWords
from shards.tokenize.split_points import Cuts
from shards.tokenize.word_encoder import WordEncoder


class _Analysis(NamedTuple):
    """The properties of a model file, which never change."""

    cuts: Cuts
    normalizes: bool  # an identity normalizer is replaced by code here; any other is called
    space: str  # what the model puts before a text
    long_words: LongWords | None  # None = no text may be cut


@functools.lru_cache(maxsize=4)  # it takes twenty times as long as to load the model, and a process opens few, often
def _analysis(content: bytes, dtype: np.dtype[Any]) -> _Analysis:
    """Find where a model's texts can be cut, and open the model a second time, as one that does not normalize."""
    model = sentencepiece_model_pb2.ModelProto.FromString(content)
    cuts, normalizer = Cuts(model), model.normalizer_spec
    normalizes = bool(normalizer.precompiled_charsmap) or normalizer.remove_extra_whitespaces
    normalizes |= model.trainer_spec.treat_whitespace_as_suffix
    space = " " if normalizer.add_dummy_prefix else ""
    if cuts.obstacle is not None:
        return _Analysis(cuts, normalizes, space, None)
    normalizer.precompiled_charsmap = b""
    normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = False
    verbatim = sentencepiece.SentencePieceProcessor()
    verbatim.LoadFromSerializedProto(model.SerializeToString())
    return _Analysis(cuts, normalizes, space, LongWords(verbatim, cuts, model, dtype))


class SentencePieceModel:
    """A SentencePiece model; the attributes are those of `kinds.Kind`."""

    def __init__(self, path: Path, content: bytes) -> None:
        """Load a model. Raises: ConfigError if the content is no SentencePiece model."""
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(content)
        except RuntimeError:
            raise ConfigError(
                f"data.tokenizer={path}: not a SentencePiece model, nor a tokenizer.json or a rank file of tiktoken"
            ) from None
        self._content = content
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.unk_id: int = self._processor.unk_id()
        self.obstacle: str | None = None
        self.libraries: dict[str, str] = {}  # runs of this kind have always been known by their file alone

    def prepare(self, prefix: Sequence[int], suffix: Sequence[int], dtype: npt.DTypeLike) -> None:
        """Decide how documents are encoded: word by word if that is exact, else whole."""
        self._prefix, self._suffix, self._dtype = list(prefix), list(suffix), np.dtype(dtype)
        found = _analysis(self._content, self._dtype)
        self._cuts, self._normalizes, self._space = found.cuts, found.normalizes, found.space
        self.obstacle = self._cuts.obstacle
        self._words: WordEncoder | None = None
        if found.long_words:
            verbatim = found.long_words.processor
            self._words = WordEncoder(verbatim, self._cuts, found.long_words, self._prefix, self._suffix, dtype)

    def encode_documents(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.integer], Ints]:
        """Return the ids of all documents in one array, and the length of each."""
        if self._words is not None:
            return self._words.encode([self._spell(text).encode() for text in texts])
        return encode_each(texts, self._processor.EncodeAsNumpy, self._prefix, self._suffix, self._dtype)

    def encode_following(self, texts: Sequence[str]) -> list[npt.NDArray[np.integer]]:
        """Return the ids of each text alone, without the space that the model may put before a document.

        A model that squeezes spaces would drop the one with which a text begins, too: there the space that it puts
        before a document stands for it.
        """
        squeezes = sentencepiece_model_pb2.ModelProto.FromString(self._content).normalizer_spec.remove_extra_whitespaces
        plain = self._with_prefix(False)
        spaced = self._with_prefix(True) if squeezes else plain
        return [(spaced if text.startswith(" ") else plain).EncodeAsNumpy(text) for text in texts]

    def _with_prefix(self, has_prefix: bool) -> sentencepiece.SentencePieceProcessor:
        """Return the model with or without a space before a text."""
        model = sentencepiece_model_pb2.ModelProto.FromString(self._content)
        model.normalizer_spec.add_dummy_prefix = has_prefix
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(model.SerializeToString())
        return processor

    def _spell(self, text: str) -> str:
        """Normalize a text and spell it as `Cuts.spell` does."""
        if self._normalizes:
            return self._cuts.spell(self.normalize(text))
        return self._cuts.spell(self._space + text) if text else ""

    def piece(self, index: int) -> str:
        """Return the piece of a token id, as the model's vocabulary spells it."""
        piece: str = self._processor.IdToPiece(index)
        return piece

    def index(self, piece: str) -> int | None:
        """Return the id of a piece; None if there is no such piece."""
        found: int = self._processor.PieceToId(piece)
        return found if self.piece(found) == piece else None

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; control tokens such as BOS have none."""
        text: str = self._processor.DecodeIds(ids)
        return text

    def normalize(self, text: str) -> str:
        """Return a text as the model's own normalizer leaves it."""
        normalized: str = self._processor.Normalize(text)
        return normalized

    def library_json(self) -> None:
        """Return None: the file is written as it is, since not every model has an equal in the library's terms."""
