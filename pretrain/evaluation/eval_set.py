"""A suite, selected, tokenized and packed: what every evaluation of a run scores. suite -> EvalSet -> scoring.

Every document is scored independently; a long one is cut into windows of seq_len targets that overlap by one token,
which is a window's last target and the next one's only context. So every token after a document's first is a target
exactly once, and how a document is cut depends neither on the documents beside it nor on ranks.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from pretrain.evaluation.contexts import bounds_of
from pretrain.evaluation.needles import NeedlesConfig, load_needles
from pretrain.evaluation.rows import Hidden, Row, RowPacker, Tokens
from pretrain.evaluation.scores import UNKNOWN_BYTES, DocumentScores, Totals, label_of, source_line
from pretrain.evaluation.tasks import TaskConfig, TaskSet, load_tasks
from pretrain.run.eval_figure import AVERAGES
from shards import Config, ConfigError, ShardError, Tokenizer
from shards.hashing import key_of
from shards.suites.suite import Suite, SuiteDocument, find, training_shards
from shards.tokenize.parts import encode_parts, spelled
from shards.tokenizer_check import Soundness

_logger = logging.getLogger(__name__)


class EvaluationConfig(Config):
    """The evaluations during a run: before the first step, at regular steps, and after the last."""

    every: int | None = Field(None, ge=1)  # optimizer steps; None: only before the first step and after the last
    suite: Path | None = None  # a folder or a YAML file, see shards/suites/suite.py; None: no text by domain
    split: str = "val"  # which documents of the suite's sources to score
    max_documents: int | None = Field(None, ge=1)  # per domain; None: all
    max_tokens: int | None = Field(None, ge=1)  # per domain, in whole documents; None: all
    subset_seed: int = Field(0, ge=0)  # selects the documents and instances, if not all are scored
    tasks: tuple[TaskConfig, ...] = ()  # multiple-choice and completion tasks to score
    needles: NeedlesConfig | None = None  # texts that hide a number and ask for it, by length and depth; None: none
    batch_size: int | None = Field(None, ge=1)  # rows a rank scores at once; None: as in training
    prompt: str = "The "  # a finished run prints a continuation of it

    @property
    def is_empty(self) -> bool:
        """Return whether there is nothing to score."""
        return self.suite is None and not self.tasks and self.needles is None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if taken := {task.called for task in self.tasks} & set(self.needles.names if self.needles else ()):
            raise ValueError(f"tasks: {min(taken)} is the name of figures of needles; give the task another")
        return self

    def due(self, step: int) -> bool:
        return self.every is not None and step % self.every == 0


@dataclass(frozen=True)
class EvalSet:
    """A suite as one dp rank holds it: the rank's rows, and the totals of all documents.

    Attributes:
        label: its label in evals.jsonl.
        seq_len: predicted tokens per row.
        domains: sorted by name; `sources` has each one's source.
        document_domain: [documents], index of its domain.
        document_key: uint64 [documents], a hash of its text or token ids.
        document_bytes: [documents], UTF-8 bytes of its text, or of its responses if only they are scored; UNKNOWN_BYTES
            if it is token ids alone.
        targets: [documents], predicted tokens.
        rows: every dp_size-th row, starting from this rank's first.
        num_rows: number of rows of all ranks.
        times: how many times as long as the run's rows these are.
    """

    label: str
    seq_len: int
    domains: tuple[str, ...]
    sources: tuple[str, ...]
    document_domain: npt.NDArray[np.int32]
    document_key: npt.NDArray[np.uint64]
    document_bytes: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    rows: list[Row]
    num_rows: int
    times: int = 1

    def knows_bytes(self, line: str) -> bool:
        """Return whether the bytes are known of all documents of a domain, a source or an average."""
        known = np.bincount(self.document_domain, self.document_bytes == UNKNOWN_BYTES, len(self.domains)) == 0
        return all(
            is_known
            for domain, source, is_known in zip(self.domains, self.sources, known.tolist(), strict=True)
            if line in (domain, source_line(source), *AVERAGES)
        )

    @property
    def group(self) -> npt.NDArray[np.int32]:
        """Return the domain of each document, [documents], over which losses are added up by context."""
        return self.document_domain

    def scores_of(self, totals: Totals) -> DocumentScores:
        """Return the scores of its documents."""
        sums = totals.items
        return DocumentScores(
            suite=self.label,
            domains=self.domains,
            sources=self.sources,
            domain=self.document_domain,
            key=self.document_key,
            nll=sums[:, 0],
            tokens=self.targets,
            correct=sums[:, 2].astype(np.int64),
            text_bytes=self.document_bytes,
            context_sums=totals.contexts,
            context_bounds=bounds_of(self.seq_len),
        )


def find_suite(config: EvaluationConfig) -> Suite | None:
    """Find the config's suite; return None if it names none. Raises ConfigError if it does not exist."""
    return find(config.suite, config.split) if config.suite else None


def load_parts(
    suite: Suite | None,
    config: EvaluationConfig,
    tokenizer: Tokenizer,
    seq_len: int,
    precision: str,
    dp_rank: int,
    dp_size: int,
) -> list[EvalSet | TaskSet]:
    """Load a rank's part of all that a config scores: the suite, if there is one, the tasks, and the needles.

    The other arguments and the errors are those of `load_suite`, `load_tasks` and `load_needles`.

    Args:
        suite: what `find_suite` returned.
    """
    how = (tokenizer, seq_len, precision, dp_rank, dp_size)
    tasks = load_tasks(config.tasks, config.subset_seed, *how)
    of_suite = [load_suite(suite, config, *how)] if suite else []
    return [*of_suite, *tasks, *load_needles(config.needles, *how)]


def load_suite(
    suite: Suite,
    config: EvaluationConfig,
    tokenizer: Tokenizer,
    seq_len: int,
    precision: str,
    dp_rank: int = 0,
    dp_size: int = 1,
) -> EvalSet:
    """Read, tokenize and pack the config's suite.

    A rank keeps 2 bytes per token of its own rows (4 for a vocabulary above 65,536) and some 30 bytes per document.

    Args:
        precision: precision of the forward pass, for the label.
    Raises:
        ConfigError: if one of its sources or domains has nothing to score, or the tokenizer cannot spell its texts.
        ShardError: if one of its files is damaged, or holds token ids that the tokenizer does not have.
    """
    packer = RowPacker(seq_len, dp_rank, dp_size)
    known: dict[str, str] = {}  # domain -> source
    domains: list[str] = []
    keys: list[int] = []
    sizes: list[int] = []
    targets: list[int] = []
    soundness = Soundness(tokenizer, f"suite {suite.name!r}")
    for document, (tokens, given, hidden) in _chosen(suite, tokenizer, config):
        if document.text is not None:
            parts = document.parts
            soundness.add(document.domain, document.text if parts is None else spelled(tokenizer, parts), tokens)
        known.setdefault(document.domain, document.source)
        packer.add(len(domains), tokens, given, hidden)
        domains.append(document.domain)
        keys.append(document.key)
        sizes.append(_num_bytes(document, tokenizer))
        targets.append(max(len(tokens) - given, 0) if hidden is None else int((~hidden[given:]).sum()))
    packer.pack()
    soundness.check()
    names = tuple(sorted(known))
    number_of = {name: number for number, name in enumerate(names)}
    document_domain = np.array([number_of[name] for name in domains], np.int32)
    document_targets = np.array(targets, np.int64)
    split = "" if config.split == type(config).model_fields["split"].default else f".{config.split}"
    bounds = {"docs": config.max_documents, "tokens": config.max_tokens, "seed": config.subset_seed}
    content = sorted(f"{domain}\t{key:016x}" for domain, key in zip(domains, keys, strict=True))
    _check_not_empty(suite, known, set(document_domain[document_targets > 0].tolist()), names)
    return EvalSet(
        label=label_of(suite.name + split, bounds, seq_len, precision, tokenizer, content),
        seq_len=seq_len,
        domains=names,
        sources=tuple(known[name] for name in names),
        document_domain=document_domain,
        document_key=np.array(keys, np.uint64),
        document_bytes=np.array(sizes, np.int64),
        targets=document_targets,
        rows=packer.rows,
        num_rows=packer.num_rows,
    )


def _check_not_empty(suite: Suite, known: dict[str, str], scored: set[int], domains: tuple[str, ...]) -> None:
    """Reject domains without a target, whose perplexity would be 1. Raises ConfigError."""
    silent = sorted({part.source.name for part in suite.parts} - set(known.values()))
    silent += [domain for number, domain in enumerate(domains) if number not in scored]
    if silent:
        raise ConfigError(
            f"the suite {suite.name}: there is nothing to predict in {', '.join(silent[:5])}; leave out the empty "
            "ones, or widen take and hash_range where they have any"
        )


def _num_bytes(document: SuiteDocument, tokenizer: Tokenizer) -> int:
    """Count the UTF-8 bytes of what is scored of a document; UNKNOWN_BYTES if its text is not there."""
    text = document.text
    if document.parts is not None:
        text = spelled(tokenizer, document.parts, document.only_responses)
    return UNKNOWN_BYTES if text is None else len(text.encode())


class _Encoded(NamedTuple):
    """A document's tokens; `given` and `hidden` are those of `windows_of`."""

    tokens: Tokens
    given: int = 1
    hidden: Hidden | None = None


def _encoded(document: SuiteDocument, tokenizer: Tokenizer) -> _Encoded:
    if (ids := document.token_ids) is not None:
        if len(wrong := ids[(ids < 0) | (ids >= tokenizer.vocab_size)]):
            raise ShardError(
                f"{document.place}: token id {wrong[0]}, but the tokenizer {tokenizer.path} has {tokenizer.vocab_size} "
                "tokens; name the one that the ids were made with"
            )
        return _Encoded(ids.astype(tokenizer.dtype))
    if document.parts is None:
        assert document.text is not None
        return _Encoded(tokenizer.encode_documents([document.text])[0])
    tokens, _, prompts = encode_parts(tokenizer, [document.parts])
    if not document.only_responses:
        return _Encoded(tokens)
    hidden = np.zeros(len(tokens), np.bool_)
    for start, stop in zip(prompts.starts.tolist(), prompts.stops.tolist(), strict=True):
        hidden[start:stop] = True
    return _Encoded(tokens, max(1, int(np.argmin(hidden))) if len(hidden) else 1, hidden)


def _chosen(suite: Suite, tokenizer: Tokenizer, config: EvaluationConfig) -> Iterator[tuple[SuiteDocument, _Encoded]]:
    """Yield the documents to evaluate, with their tokens, in the suite's order."""
    if config.max_documents is None and config.max_tokens is None:
        for document in suite.documents():
            yield document, _encoded(document, tokenizer)
        return
    subsets: dict[str, _Subset] = {}
    for number, document in enumerate(suite.documents()):
        subset = subsets.setdefault(document.domain, _Subset(config))
        if subset.wants(place := (key_of("subset", config.subset_seed, document.key), number)):
            subset.add(place, document, _encoded(document, tokenizer))
    kept = sorted(
        ((number, document, found) for subset in subsets.values() for number, document, found in subset.kept()),
        key=lambda one: one[0],
    )
    for _, document, found in kept:
        yield document, found


def warn_of_training_shards(suite: Suite | None, fingerprint: Mapping[str, object]) -> None:
    """Warn of suite files that are trained on, judged by their contents: their loss is meaningless.

    Args:
        fingerprint: the fingerprint of the run's data, from a loader.
    """
    for found in training_shards(suite, fingerprint) if suite else ():
        _logger.warning("the evaluation suite contains training data: %s; its loss will look too good", found)


class _Subset:
    """One domain's documents in a bounded suite: the longest run of documents, ordered by hash, within the bounds.

    It is independent of the documents' order, and part of every larger subset. The first is kept however long it is.
    """

    def __init__(self, config: EvaluationConfig) -> None:
        self._max_documents = config.max_documents
        self._max_tokens = config.max_tokens
        # The document with the last hash is on top of the heap and is dropped first.
        self._heap: list[tuple[int, int, SuiteDocument, _Encoded]] = []
        self._tokens = 0
        self._end: tuple[int, int] | None = None  # (hash, number) from which on no document fits

    def wants(self, place: tuple[int, int]) -> bool:
        return self._end is None or place < self._end

    def add(self, place: tuple[int, int], document: SuiteDocument, encoded: _Encoded) -> None:
        heapq.heappush(self._heap, (-place[0], -place[1], document, encoded))
        self._tokens += len(encoded.tokens)
        while len(self._heap) > 1 and self._too_much():
            value, number, _, dropped = heapq.heappop(self._heap)
            self._tokens -= len(dropped.tokens)
            self._end = (-value, -number)

    def _too_much(self) -> bool:
        return (self._max_documents is not None and len(self._heap) > self._max_documents) or (
            self._max_tokens is not None and self._tokens > self._max_tokens
        )

    def kept(self) -> Iterator[tuple[int, SuiteDocument, _Encoded]]:
        for _, number, document, encoded in self._heap:
            yield -number, document, encoded
