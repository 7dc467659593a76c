"""Check that a tokenizer can spell the texts it is given. {start, evaluation} -> tokenizer_check -> {tokenizer, texts}.

A vocabulary that spells differently from the text (such as the pieces of a byte-level tokenizer in a SentencePiece
file) encodes without an error: every space becomes UNK, and the figures of training or evaluation look like any others.
So texts are decoded again, and ids without meaning are counted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from shards.config import DEFAULT_MAX_DECODER_WINDOW, DataConfig, SourceConfig
from shards.errors import ConfigError, ShardError
from shards.preparation import shard_paths
from shards.records.texts import read_documents, sample_of, spread
from shards.suites.suite import Suite
from shards.tokenize.tokenizer import Tokenizer

MAX_UNKNOWN_SHARE = 0.01  # maximum share of UNK among the ids of a source or suite
_SAMPLED_CHARACTERS = 1 << 15  # per shard, in whole documents unless they are longer
_DECODED_CHARACTERS = 1 << 15  # per part, in whole documents; UNK is counted in every document added
_SHOWN_CHARACTERS = 30

_logger = logging.getLogger(__name__)


class Soundness:
    """The findings about the texts of one source or suite.

    Args:
        name: name of the source or suite, for messages.
    """

    def __init__(self, tokenizer: Tokenizer, name: str) -> None:
        self._tokenizer, self._name = tokenizer, name
        self._counts: dict[str, tuple[int, int]] = {}  # by part: number of ids, and of UNK among them
        self._decoded: dict[str, int] = {}  # by part: number of characters
        self._changed: tuple[str, str] | None = None  # a text, and what it decodes to
        self._unknown: str | None = None  # a text that contains UNK

    def add(self, part: str, text: str, ids: npt.NDArray[np.integer]) -> None:
        """Add a document.

        Args:
            part: the part it belongs to, such as a domain of the suite or a shard of the source.
            ids: ids of the text, with BOS and EOS as configured.
        """
        if self.count(part, text, ids):
            return
        if self._changed is None and self._decoded.get(part, 0) < _DECODED_CHARACTERS:
            self._decoded[part] = self._decoded.get(part, 0) + len(text)
            self._changed = self._tokenizer.difference(text, ids)

    def count(self, part: str, text: str, ids: npt.NDArray[np.integer]) -> int:
        """Add a text that is no whole document, of which only UNK is counted; return how many there are."""
        found = int(np.count_nonzero(ids == self._tokenizer.unk_id))
        total, unknown = self._counts.get(part, (0, 0))
        self._counts[part] = total + len(ids), unknown + found
        if found:
            self._unknown = self._unknown or text
        return found

    def check(self) -> None:
        """Check the findings. Raises: ConfigError if it cannot spell the texts; parts of them get a warning."""
        named = f"the tokenizer {self._tokenizer.path}"
        if self._changed is not None:
            text, again = (found[:_SHOWN_CHARACTERS] for found in self._changed)
            raise ConfigError(
                f"{named} does not give back the text of {self._name}: {text!r} becomes {again!r}"
                " when it is encoded and decoded; name the tokenizer meant for this text"
            )
        if self._unknown is None:
            return
        total, unknown = (sum(counts) for counts in zip(*self._counts.values(), strict=True))
        example = self._unknown[:_SHOWN_CHARACTERS]
        if unknown >= MAX_UNKNOWN_SHARE * total:
            raise ConfigError(
                f"{named} cannot spell the text of {self._name}: {unknown / total:.1%} of its ids are UNK (as in"
                f" {example!r}); name the tokenizer meant for this text. A file that only names the pieces"
                " of another program's tokenizer is for sources of token ids (input_ids_key), not for text"
            )
        for part, (total, unknown) in self._counts.items():
            if unknown >= MAX_UNKNOWN_SHARE * total:
                share = 100 * unknown / total
                _logger.warning("%s has no tokens for %.1f %% of %s in %s", named, share, part, self._name)


def check_sources(config: DataConfig, tokenizer: Tokenizer) -> None:
    """Try a tokenizer on the beginning of a few shards of each source of text. Call it on one rank.

    Damage to a shard is left for its indexing to report.
    Raises: ConfigError if the tokenizer cannot spell the text; ShardError if a source has no shards, or none of them
    has its text_key.
    """
    for source in config.sources:
        found = Soundness(tokenizer, f"source {source.name!r}")
        sample = sample_of(config, source, shard_paths(source))
        for path in sample if source.input_ids_key is None else ():
            for text in _beginning(path, source, config.max_decoder_window):
                found.add(path, text, tokenizer.encode_documents([text])[0])
        found.check()


def check_suite(suite: Suite, tokenizer: Tokenizer) -> None:
    """Try a tokenizer on the beginning of a few shards of each source of a suite. Raises: ConfigError."""
    found = Soundness(tokenizer, f"suite {suite.name!r}")
    for part in suite.parts:
        source = part.as_training_source()
        for path in spread(part.shards):
            for text in _beginning(path, source):
                found.add(source.name, text, tokenizer.encode_documents([text])[0])
    found.check()


def _beginning(shard: str, source: SourceConfig, max_decoder_window: int = DEFAULT_MAX_DECODER_WINDOW) -> Iterator[str]:
    """Yield the first texts of a shard."""
    left = _SAMPLED_CHARACTERS
    try:
        for document in read_documents(shard, source, "skip", max_decoder_window):
            yield document.text[:left]
            left -= len(document.text)
            if left <= 0:
                return
    except ShardError:
        return
