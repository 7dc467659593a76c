"""The scores of a task, and its line in evals.jsonl. scoring -> TaskScores -> {journal, commands}.

The choices of a question are ranked by their log-likelihood: as it is, or divided by the continuation's tokens,
characters or bytes, or less what the continuation would have had without the question. The first of equals wins. Where
one of them is not finite, as of a diverged model, nothing can be ranked: the accuracy is NaN, like the nats.

Source: OLMES, Gu et al. 2024, arXiv 2406.08446, section 3; with the names of figures that oe-eval gives them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from pretrain.run.eval_figure import perplexity

ChoiceMetric = Literal["acc_raw", "acc_per_token", "acc_per_char", "acc_per_byte", "acc_uncond"]
Metric = ChoiceMetric | Literal["acc_greedy"]
CHOICE_METRICS: tuple[ChoiceMetric, ...] = get_args(ChoiceMetric)
GREEDY: Metric = "acc_greedy"  # of a completion: whether each of its tokens was the most likely one

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TaskItems:
    """What is known of the items of a task before they are scored.

    An item is a continuation after a context: each instance's choices in turn; then, if the task has unconditional
    requests, all of them again, after contexts that do not ask.

    Attributes:
        choices: [instances], number of choices of each.
        gold: [instances], which of them is right.
        tokens, chars, text_bytes: [items], size of the continuation, with the space that it may begin with.
    """

    choices: Ints
    gold: Ints
    tokens: Ints
    chars: Ints
    text_bytes: Ints


@dataclass(frozen=True)
class TaskScores:
    """The scores of a task.

    Attributes:
        suite: its label.
        name: of its figures.
        metric: that of `accuracy`.
        nll: [items], negative log-likelihood of each continuation, in nats.
        correct: [items], number of its tokens that were the most likely ones.
        contexts_cut: number of items whose context lost its beginning.
    """

    suite: str
    name: str
    metric: Metric
    items: TaskItems
    nll: Floats
    correct: Floats
    contexts_cut: int

    def accuracies(self) -> dict[str, float]:
        """Return the share of instances that are right, by each way of comparing that the task allows.

        NaN where what is compared is not finite for any of them.
        """
        items, count = self.items, int(self.items.choices.sum())
        if self.metric == GREEDY:
            right = (self.correct == items.tokens).astype(np.float64)
            return {GREEDY: float(np.mean(np.where(np.isfinite(self.nll), right, np.nan)))}
        likelihood = -self.nll[:count]
        by_metric = {
            "acc_raw": likelihood,
            "acc_per_token": likelihood / items.tokens[:count],
            "acc_per_char": likelihood / items.chars[:count],
            "acc_per_byte": likelihood / items.text_bytes[:count],
        }
        if len(self.nll) > count:
            by_metric["acc_uncond"] = likelihood + self.nll[count:]
        return {metric: self._accuracy(values) for metric, values in by_metric.items()}

    def _accuracy(self, values: Floats) -> float:
        if not np.isfinite(values).all():
            return math.nan  # argmax would take NaN for the highest
        ends = np.cumsum(self.items.choices)
        found = [int(np.argmax(part)) for part in np.split(values, ends[:-1])]
        return float(np.mean(found == self.items.gold))

    def records(self, step: int) -> list[dict[str, object]]:
        """Return the lines of evals.jsonl for one evaluation, of which there is one.

        Bits per byte are those of the right continuation, the mean over instances, as ai2-olmo-eval computes them; nats
        per token are a sum over a sum, as everywhere else.
        """
        items, accuracies = self.items, self.accuracies()
        gold = np.cumsum(items.choices) - items.choices + items.gold
        nll, tokens, text_bytes = (column[gold] for column in (self.nll, items.tokens, items.text_bytes))
        nll_per_token = math.fsum(nll) / int(tokens.sum())
        record: dict[str, object] = {
            "step": step,
            "suite": self.suite,
            "domain": self.name,
            "nll_per_token": nll_per_token,
            "perplexity": perplexity(nll_per_token),
            "bits_per_byte": math.fsum(nll / text_bytes) / len(gold) / math.log(2),
            "accuracy": accuracies[self.metric],
            "tokens": int(tokens.sum()),
            "bytes": int(text_bytes.sum()),
            "metric": self.metric,
            "instances": len(gold),
            "contexts_cut": self.contexts_cut,
            **accuracies,
        }
        return [record]
