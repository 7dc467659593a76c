"""Needles in haystacks as rows to score: numbers asked for at the end of long texts. haystacks -> NeedleSet -> scoring.

Each length is a task of its own, whose answers are scored like those of any completion: whether each of their tokens is
the most likely one. Nothing is sampled, and the texts follow from config and tokenizer alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import xxhash
from pydantic import Field, model_validator

from pretrain.evaluation.rows import RowPacker
from pretrain.evaluation.scores import Totals, label_of
from pretrain.evaluation.task_scores import GREEDY, TaskItems, TaskScores
from pretrain.evaluation.tasks import TaskSet
from shards import Config, Tokenizer
from shards.suites.needles import Haystacks
from shards.tokenizer_check import Soundness


class NeedlesConfig(Config):
    """Texts that hide a number and ask for it, scored with each evaluation: for each length, depth by depth."""

    # Tokens of a text, with its question and answer, rising; more than data.seq_len is allowed
    lengths: tuple[int, ...] = Field(min_length=1)
    depths: int = Field(5, ge=1, le=101)  # places of the number, evenly from a text's beginning to its end
    count: int = Field(8, ge=1)  # texts of each length and depth
    seed: int = Field(0, ge=0)  # decides the words, numbers and sentences

    @model_validator(mode="after")
    def _check(self) -> Self:
        if list(self.lengths) != sorted(set(self.lengths)):
            raise ValueError(f"lengths: {list(self.lengths)} must rise")
        return self

    @property
    def places(self) -> list[float]:
        """Return the depths, from 0 at the beginning of a text to 1 before its question; a single one is the middle."""
        return [i / (self.depths - 1) for i in range(self.depths)] if self.depths > 1 else [0.5]

    @property
    def names(self) -> list[str]:
        """Return the names of its figures, one for each length."""
        return [f"needles_{length}" for length in self.lengths]


@dataclass(frozen=True)
class NeedleScores(TaskScores):
    """The scores of the texts of a length.

    Attributes:
        length: tokens of each text.
        depths: the places of the needle; the texts are as many of each, one place after another.
    """

    length: int
    depths: tuple[float, ...]

    def records(self, step: int) -> list[dict[str, object]]:
        """Return the line of evals.jsonl for one evaluation: that of a task, and its figures by depth."""
        (record,) = super().records(step)
        right = np.where(np.isfinite(self.nll), self.correct == self.items.tokens, np.nan)
        columns = [column.reshape(len(self.depths), -1) for column in (right, self.nll, self.items.tokens)]
        by_depth = {
            f"{depth:.3g}": {"accuracy": float(accuracy), "nll_per_token": float(nll)}
            for depth, accuracy, nll in zip(
                self.depths, columns[0].mean(axis=1), columns[1].sum(axis=1) / columns[2].sum(axis=1), strict=True
            )
        }
        return [{**record, "length": self.length, "by_depth": by_depth}]


@dataclass(frozen=True)
class NeedleSet(TaskSet):
    """The texts of a length as one dp rank holds them; attributes as in TaskSet and NeedleScores."""

    length: int
    depths: tuple[float, ...]

    def scores_of(self, totals: Totals) -> NeedleScores:
        """Return its scores."""
        return NeedleScores(**vars(super().scores_of(totals)), length=self.length, depths=self.depths)


def load_needles(
    config: NeedlesConfig | None,
    tokenizer: Tokenizer,
    seq_len: int,
    precision: str,
    dp_rank: int = 0,
    dp_size: int = 1,
) -> list[NeedleSet]:
    """Make and pack the texts of each length.

    Texts that fit into the run's rows are packed into such rows. All others share one length of rows, so that a
    compiled model meets one more shape: as many times the run's as the longest of them needs.

    Args:
        seq_len: predicted tokens of the run's rows.
        precision: precision of the forward pass, for the label.
    Raises:
        ConfigError: if a length is too short, or the tokenizer cannot spell the texts.
    """
    if config is None:
        return []
    soundness = Soundness(tokenizer, "evaluation.needles")
    soundness.add("needles", Haystacks.spelled, tokenizer.encode_documents([Haystacks.spelled])[0])
    soundness.check()
    haystacks, longest = Haystacks(tokenizer), -(-config.lengths[-1] // seq_len)
    return [
        _load(config, haystacks, length, (seq_len, longest if length > seq_len else 1), precision, (dp_rank, dp_size))
        for length in config.lengths
    ]


def _load(
    config: NeedlesConfig,
    haystacks: Haystacks,
    length: int,
    rows: tuple[int, int],
    precision: str,
    own: tuple[int, int],
) -> NeedleSet:
    """Make and pack the texts of a length.

    Args:
        rows: predicted tokens of the run's rows, and how many times as long those of this length are.
        own: dp_rank and dp_size.
    """
    seq_len, times = rows
    packer = RowPacker(seq_len * times, *own)
    answers: list[str] = []
    tokens: list[int] = []
    content: list[str] = []
    for depth in config.places:
        for number in range(config.count):
            text = haystacks.text(length, depth, "needles", config.seed, f"{depth:.3g}", number)
            ids = np.concatenate((text.context, text.answer))
            packer.add(len(answers), ids, given=len(text.context))
            answers.append(text.needle.answer)
            tokens.append(len(text.answer))
            content.append(xxhash.xxh3_64_hexdigest(ids.astype(np.int64).tobytes()))
    packer.pack()
    name, bounds = f"needles_{length}", {"d": config.depths, "n": config.count, "seed": config.seed}
    count = len(answers)
    return NeedleSet(
        label=label_of(name, bounds, length, precision, haystacks.tokenizer, content),
        seq_len=seq_len * times,
        name=name,
        metric=GREEDY,
        items=TaskItems(
            choices=np.ones(count, np.int64),
            gold=np.zeros(count, np.int64),
            tokens=np.array(tokens, np.int64),
            chars=np.array([len(answer) for answer in answers], np.int64),
            text_bytes=np.array([len(answer.encode()) for answer in answers], np.int64),
        ),
        rows=packer.rows,
        num_rows=packer.num_rows,
        contexts_cut=0,
        length=length,
        depths=tuple(config.places),
        times=times,
    )
