"""Held-out loss per domain: perplexity, bits per byte, next-token accuracy. suite folder -> EvalSet -> scores.

Every document is scored by itself; a long one in windows of seq_len that overlap by one token, so that every token
after its first is a target exactly once, as in training. Rows hold documents of one domain, packed, with attention
inside each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from pretrain.engine import Engine, valid_targets
from pretrain.model.parallel import vocab_parallel_argmax, vocab_parallel_nll
from pretrain.topology import Topology
from shards import Config, ConfigError, Tokenizer, pack_documents, read_documents


class EvaluationConfig(Config):
    """What is evaluated during a run, and when: before the first step, every so many steps, and after the last."""

    every: int | None = Field(None, ge=1)  # optimizer steps; None: only before the first step and after the last
    suite: Path | None = None  # a folder with one folder per domain; None: no evaluation
    split: str = "val"  # the files of a domain to read: <domain>/<split>.jsonl.zst or another format of a shard
    batch_size: int | None = Field(None, ge=1)  # rows a rank scores at once; None: as in training
    prompt: str = "The "  # what a finished run shows a continuation of

    def due(self, step: int) -> bool:
        return self.every is not None and step % self.every == 0


@dataclass(frozen=True)
class EvalSet:
    """A suite, tokenized and packed.

    Attributes:
        suite: its name.
        domains: in order.
        tokens, segment_ids: int32 [rows, seq_len + 1].
        row_domain: int64 [rows]: index of the domain that all of a row's documents belong to.
        text_bytes: per domain, UTF-8 bytes of the documents' texts.
    """

    suite: str
    domains: tuple[str, ...]
    tokens: npt.NDArray[np.int32]
    segment_ids: npt.NDArray[np.int32]
    row_domain: npt.NDArray[np.int64]
    text_bytes: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """Sums over one domain's targets.

    Attributes:
        nll: negative log-likelihood, in nats.
        tokens: targets, the end-of-document tokens among them.
        correct: targets that were the most likely token.
        text_bytes: UTF-8 bytes of the texts.
    """

    nll: float
    tokens: int
    correct: int
    text_bytes: int

    @property
    def nll_per_token(self) -> float:
        return self.nll / max(self.tokens, 1)

    @property
    def bits_per_byte(self) -> float:
        """Independent of the tokenizer, since the bytes are the same for all."""
        return self.nll / math.log(2) / max(self.text_bytes, 1)

    @property
    def accuracy(self) -> float:
        return self.correct / max(self.tokens, 1)


def load_suite(config: EvaluationConfig, tokenizer: Tokenizer, seq_len: int) -> EvalSet | None:
    """Reads and packs the suite; None where the config names none.

    Raises:
        ConfigError: if the folder is missing, or holds no domain with this split.
    """
    if config.suite is None:
        return None
    files = suite_files(config.suite, config.split)
    parts, text_bytes = [], []
    for shards_of_domain in files.values():
        texts = [document.text for shard in shards_of_domain for document in read_documents(shard)]
        rows = pack_documents([tokenizer.encode_document(text) for text in texts], seq_len)
        parts.append(rows.dense())
        text_bytes.append(sum(len(text.encode()) for text in texts))
    return EvalSet(
        suite=config.suite.name,
        domains=tuple(files),
        tokens=np.concatenate([tokens for tokens, _ in parts]),
        segment_ids=np.concatenate([segment_ids for _, segment_ids in parts]),
        row_domain=np.repeat(np.arange(len(parts)), [len(tokens) for tokens, _ in parts]),
        text_bytes=tuple(text_bytes),
    )


def suite_files(suite: Path, split: str) -> dict[str, list[Path]]:
    """The shards of each domain of a suite's folder, domains and files sorted by name.

    Raises:
        ConfigError: if there are none.
    """
    if not suite.is_dir():
        raise ConfigError(f"evaluation.suite={suite} is no folder; name one that holds <domain>/{split}.jsonl.zst")
    domains = sorted(path for path in suite.iterdir() if path.is_dir())
    files = {domain.name: sorted(domain.glob(f"{split}.json*")) for domain in domains}
    found = {domain: paths for domain, paths in files.items() if paths}
    if not found:
        raise ConfigError(f"evaluation.suite={suite} has no <domain>/{split}.json*; set evaluation.split or .suite")
    return found


def evaluate(engine: Engine, eval_set: EvalSet, topology: Topology, batch_size: int) -> dict[str, Score]:
    """Scores every domain. All ranks call it, and all get the whole result.

    Args:
        batch_size: rows a rank scores at once.
    """
    own = slice(topology.dp_rank, None, topology.dp_size)
    tokens, segment_ids, row_domain = eval_set.tokens[own], eval_set.segment_ids[own], eval_set.row_domain[own]
    # Every rank makes as many forward passes as every other (ZeRO-3 gathers weights in each); the last may be empty
    passes = -(-len(eval_set.tokens) // (topology.dp_size * batch_size))
    sums = torch.zeros(len(eval_set.domains), 3, dtype=torch.float64, device=topology.device)
    for start in range(0, passes * batch_size, batch_size):
        batch = slice(start, start + batch_size)
        ids, segments = (
            torch.from_numpy(_padded(rows[batch], batch_size)).to(topology.device).long()
            for rows in (tokens, segment_ids)
        )
        per_row = _score_rows(engine, ids, segments)
        domains = torch.from_numpy(row_domain[batch]).to(topology.device)
        sums.index_add_(0, domains, per_row[: len(domains)])
    return {
        domain: Score(nll, int(count), int(correct), text_bytes)
        for domain, (nll, count, correct), text_bytes in zip(
            eval_set.domains, topology.sum_over_dp(sums).tolist(), eval_set.text_bytes, strict=True
        )
    }


def _padded(rows: npt.NDArray[np.int32], count: int) -> npt.NDArray[np.int32]:
    return np.concatenate((rows, np.zeros((count - len(rows), rows.shape[1]), np.int32)))


@torch.no_grad()
def _score_rows(engine: Engine, tokens: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
    """[rows, seq_len + 1] -> float64 [rows, 3]: sums of negative log-likelihood, targets, correct targets."""
    valid = valid_targets(segment_ids)
    logits = engine.logits(tokens[:, :-1], segment_ids[:, :-1])
    targets = tokens[:, 1:]
    correct = (vocab_parallel_argmax(logits) == targets) & valid
    nll = vocab_parallel_nll(logits, targets).double() * valid
    return torch.stack((nll.sum(1), valid.sum(1).double(), correct.sum(1).double()), dim=1)


def eval_records(step: int, suite: str, scores: dict[str, Score]) -> list[dict[str, object]]:
    """The lines of evals.jsonl for one evaluation: each domain, then the averages.

    `micro` averages over tokens (bits per byte: over bytes); `macro` over domains: the mean of each figure, and the
    perplexity that belongs to the mean loss, so that one large domain weighs no more than a small one.
    """
    records = [_record(step, suite, domain, score) for domain, score in scores.items()]
    macro = {
        key: _mean([getattr(score, key) for score in scores.values()])
        for key in ("nll_per_token", "bits_per_byte", "accuracy")
    }
    total = Score(
        *(sum(getattr(s, key) for s in scores.values()) for key in ("nll", "tokens", "correct", "text_bytes"))
    )
    perplexity = _perplexity(macro["nll_per_token"])
    counts = {"tokens": total.tokens, "bytes": total.text_bytes}
    head = {"step": step, "suite": suite, "domain": "macro"}
    return [*records, {**head, **macro, "perplexity": perplexity, **counts}, _record(step, suite, "micro", total)]


def _record(step: int, suite: str, domain: str, score: Score) -> dict[str, object]:
    return {
        "step": step,
        "suite": suite,
        "domain": domain,
        "nll_per_token": score.nll_per_token,
        "perplexity": _perplexity(score.nll_per_token),
        "bits_per_byte": score.bits_per_byte,
        "accuracy": score.accuracy,
        "tokens": score.tokens,
        "bytes": score.text_bytes,
    }


def _perplexity(nll_per_token: float) -> float:
    return math.exp(nll_per_token) if nll_per_token < 700 else math.inf  # a model that diverged is no reason to crash


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
