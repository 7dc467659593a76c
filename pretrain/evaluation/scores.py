"""The results of an evaluation: sums per document, figures per domain, averages.

scoring -> scores -> {evals.jsonl, compare}.

The sums per document are kept beside evals.jsonl, since comparing two models needs them to tell what is chance.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from pretrain.evaluation.contexts import Floats, figures_of, mean_of
from pretrain.run.eval_figure import AVERAGED, AVERAGES, is_of_task, perplexity
from pretrain.run.run_folder import RunFolder
from pretrain.run.step_log import step_of
from shards import CheckpointError, Tokenizer
from shards.storage.atomic import write_atomically

Sums = npt.NDArray[np.float64]  # [items, 3]: each text's nll in nats, targets, and those that were most likely

_SOURCE = "source:"  # prefix of a source's name in place of a domain's
UNKNOWN_BYTES = -1  # of a document whose text is unknown
_LABEL_DIGITS = 8  # digits of the hash of what is scored, in a label


class Totals(NamedTuple):
    """The sums of a part of an evaluation, over all ranks.

    Attributes:
        items: [items, 3], each text's nll in nats, targets, and those that were most likely.
        contexts: [groups, buckets, 2], nll in nats and targets of each group of texts, by context.
    """

    items: Sums
    contexts: Floats


@dataclass(frozen=True)
class Score:
    """Sums over the targets of some documents.

    Attributes:
        nll: negative log-likelihood, in nats.
        tokens: number of targets, including end-of-document tokens.
        correct: number of targets that were the most likely token.
        text_bytes: UTF-8 bytes of the texts; None = unknown, since some of them are token ids alone.
    """

    nll: float
    tokens: int
    correct: int
    text_bytes: int | None

    @property
    def nll_per_token(self) -> float:
        return self.nll / max(self.tokens, 1)

    @property
    def bits_per_byte(self) -> float | None:
        """Loss in bits per byte of text: independent of the tokenizer, since the bytes are the same for all."""
        return None if self.text_bytes is None else self.nll / math.log(2) / max(self.text_bytes, 1)

    @property
    def accuracy(self) -> float:
        return self.correct / max(self.tokens, 1)


def total(scores: Iterable[Score]) -> Score:
    """Add up the sums of several scores."""
    listed = list(scores)
    sizes = [score.text_bytes for score in listed if score.text_bytes is not None]
    return Score(
        nll=math.fsum(score.nll for score in listed),
        tokens=sum(score.tokens for score in listed),
        correct=sum(score.correct for score in listed),
        text_bytes=sum(sizes) if len(sizes) == len(listed) else None,
    )


@dataclass(frozen=True)
class DocumentScores:
    """The sums of every document of a suite.

    Attributes:
        suite: its label.
        domains, sources: each domain's name, and its source's name.
        domain: int32 [documents], index into `domains`.
        key: uint64 [documents], a hash of the text or the token ids: equal for the same document in every run.
        nll, tokens, correct, text_bytes: [documents], as in `Score`; bytes are UNKNOWN_BYTES where there is no text.
        context_sums: [domains, buckets, 2], nll in nats and targets by context; no bucket if an older version saved it.
        context_bounds: [buckets], the most tokens of context in each.
    """

    suite: str
    domains: tuple[str, ...]
    sources: tuple[str, ...]
    domain: npt.NDArray[np.int32]
    key: npt.NDArray[np.uint64]
    nll: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.int64]
    correct: npt.NDArray[np.int64]
    text_bytes: npt.NDArray[np.int64]
    context_sums: Floats = field(default_factory=lambda: np.zeros((0, 0, 2)))
    context_bounds: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def knows_bytes(self) -> bool:
        """Return whether the bytes of all documents are known."""
        return bool((self.text_bytes != UNKNOWN_BYTES).all())

    def by_domain(self) -> dict[str, Score]:
        """Return the sums over each domain's documents, in the order of `domains`."""
        sums = [
            np.bincount(self.domain, weights=values, minlength=len(self.domains)).tolist()
            for values in (self.nll, self.tokens, self.correct, self.text_bytes, self.text_bytes == UNKNOWN_BYTES)
        ]
        return {
            domain: Score(nll, int(tokens), int(correct), None if unknown else int(text_bytes))
            for domain, nll, tokens, correct, text_bytes, unknown in zip(self.domains, *sums, strict=True)
        }

    def records(self, step: int) -> list[dict[str, object]]:
        """Return the lines of evals.jsonl for one evaluation: each domain, then the averages.

        `source:NAME`, for a source with several domains, and `micro` average over tokens (bits per byte: over bytes);
        `macro` averages over domains: the mean of each figure, and the perplexity of the mean loss, so that a large
        domain weighs no more than a small one. Bits per byte and bytes are None where those of a document are unknown.
        `by_context` has the figures by the tokens of context, where they were added up.
        """
        of_domains = self.by_domain()
        records = [
            self._record(step, domain, score, [number]) for number, (domain, score) in enumerate(of_domains.items())
        ]
        members: dict[str, list[int]] = {}
        for number, source in enumerate(self.sources):
            members.setdefault(source, []).append(number)
        scores = list(of_domains.values())
        records += [
            self._record(step, source_line(source), total(scores[i] for i in numbers), numbers)
            for source, numbers in members.items()
            if len(numbers) > 1
        ]
        micro = self._record(step, "micro", total(scores), range(len(scores)))
        loss, accuracy = (_mean(getattr(s, key) for s in of_domains.values()) for key in ("nll_per_token", "accuracy"))
        bits = [score.bits_per_byte for score in of_domains.values() if score.bits_per_byte is not None]
        macro: dict[str, object] = {
            "nll_per_token": loss,
            "perplexity": perplexity(loss),
            "bits_per_byte": _mean(bits) if len(bits) == len(of_domains) else None,
            "accuracy": accuracy,
        }
        if "by_context" in micro:
            macro["by_context"] = mean_of([self.by_context([number]) for number in range(len(self.domains))])
        return [*records, {**micro, "domain": "macro", **macro}, micro]

    def by_context(self, numbers: Sequence[int]) -> dict[str, dict[str, float]]:
        """Return the figures of domains, given by their numbers, together, by the tokens of context."""
        return figures_of(self.context_sums[numbers].sum(axis=0), self.context_bounds.tolist())

    def _record(self, step: int, line: str, score: Score, numbers: Sequence[int]) -> dict[str, object]:
        """Return a line of evals.jsonl. Args: numbers: those of the domains that it is of."""
        by_context = {"by_context": self.by_context(numbers)} if len(self.context_bounds) else {}
        return {
            "step": step,
            "suite": self.suite,
            "domain": line,
            "nll_per_token": score.nll_per_token,
            "perplexity": perplexity(score.nll_per_token),
            "bits_per_byte": score.bits_per_byte,
            "accuracy": score.accuracy,
            "tokens": score.tokens,
            "bytes": score.text_bytes,
            **by_context,
        }

    def save(self, path: Path) -> None:
        """Write all scores atomically: some 20 bytes per document."""
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        arrays = {field.name: np.array(getattr(self, field.name)) for field in fields(self)}
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        write_atomically(path, buffer.getvalue())

    @staticmethod
    def load(path: Path) -> DocumentScores:
        """Read what `save` wrote.

        Raises:
            CheckpointError: if the file is missing, damaged, or was written by another version.
        """
        try:
            with np.load(path) as arrays:
                values = {
                    field.name: arrays[field.name]
                    for field in fields(DocumentScores)
                    if field.default_factory is MISSING or field.name in arrays  # older versions saved less
                }
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise CheckpointError(f"{path}: cannot be read as sums of documents: {error}") from None
        names = {key: tuple(values[key].tolist()) for key in ("domains", "sources")}
        return DocumentScores(**(values | names | {"suite": str(values["suite"])}))


def source_line(source: str) -> str:
    """Return the name of the line of a source that has several domains."""
    return _SOURCE + source


def line_names(domains: Sequence[str], sources: Sequence[str], averaged: bool = False) -> list[str]:
    """Return the names of all lines of an evaluation, given each domain and its source.

    Args:
        averaged: whether the moving average of the weights is scored as well.
    """
    several = [source for source, count in Counter(sources).items() if count > 1]
    names = [*domains, *map(source_line, several), *AVERAGES]
    return [*(AVERAGED + name for name in names if averaged), *names]


def label_of(
    name: str,
    bounds: Mapping[str, int | None],
    seq_len: int,
    precision: str,
    tokenizer: Tokenizer,
    content: Iterable[str],
) -> str:
    """Return what a suite or a task is called in evals.jsonl; results under one label are comparable.

    Args:
        name: of the suite or task.
        bounds: what part of it is scored, by the letters that say so; those that are None or 0 are left out.
        seq_len: tokens per window.
        precision: precision of the forward pass.
        content: says what is scored; other content, or the same with other tokens, has another label.
    """
    parts = [name, *(f"{letters}{bound}" for letters, bound in bounds.items() if bound), f"seq{seq_len}", precision]
    lines = "\n".join([tokenizer.content_hash, str(tokenizer.marks), *content])
    return ".".join(parts) + f"@{xxhash.xxh3_64_hexdigest(lines.encode())[:_LABEL_DIGITS]}"


class Scores(Protocol):
    """The scores of a suite or a task; `suite` is their label."""

    @property
    def suite(self) -> str: ...

    def records(self, step: int) -> list[dict[str, object]]:
        """Return the lines of evals.jsonl for one evaluation."""
        ...


@dataclass(frozen=True)
class ScoresOfAverage:
    """The scores of the moving average of the weights, which stand among those of the weights under names of their own.

    Sums per document are not kept of them.
    """

    scores: Scores

    @property
    def suite(self) -> str:
        """Return the label of the suite or task."""
        return self.scores.suite

    def records(self, step: int) -> list[dict[str, object]]:
        """Return the lines of evals.jsonl for one evaluation."""
        return [record | {"domain": f"{AVERAGED}{record['domain']}"} for record in self.scores.records(step)]


def record_scores(folder: RunFolder, step: int, *evaluation: Scores) -> list[dict[str, object]]:
    """Record one evaluation in a run's or a model's folder, on rank 0 only; return the lines of evals.jsonl."""
    for scores in evaluation:
        if isinstance(scores, DocumentScores):
            scores.save(folder.document_scores(step, scores.suite))
    records = [record for scores in evaluation for record in scores.records(step)]
    folder.evals.append(*records)
    return records


def evaluated_steps(folder: RunFolder, averaged: bool = False) -> dict[str, set[int]]:
    """Return by label the steps whose evaluation on a suite or a task is complete in evals.jsonl; others have none.

    Args:
        averaged: whether that of the weights' moving average is asked for, with which no task is scored.
    """
    last = f"{AVERAGED * averaged}micro"  # domain of the last line of a suite's
    found: dict[str, set[int]] = defaultdict(set)
    for record in folder.evals.read():
        if record["domain"] == last or (is_of_task(record) and not averaged):
            found[str(record["suite"])].add(step_of(record))
    return found


def labels(folder: RunFolder, task: str | None = None) -> list[str]:
    """List the labels in evals.jsonl of suites, or of a task of a name, in the order of first appearance."""
    return list(
        dict.fromkeys(
            str(record["suite"])
            for record in folder.evals.read()
            if is_of_task(record) == (task is not None) and task in (None, record["domain"])
        )
    )


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed)
