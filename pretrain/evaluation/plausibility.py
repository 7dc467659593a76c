"""Doubt evaluations that cannot be right. scores -> plausibility -> {trainer, log}.

A broken tokenizer, wrong weights or a diverged model give figures that look plausible to anyone who does not know what
to expect. Some things are known: no model need be worse than a uniform guess over all tokens, whose perplexity is the
number of tokens; the loss of a model with randomly initialized weights can be computed; held-out text is not much
easier than the training's; and what is learned moves every domain.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence

from pretrain.model.architecture import ModelConfig
from pretrain.run.eval_figure import is_of_task
from pretrain.run.step_log import step_of

_logger = logging.getLogger(__name__)

_TOLERANCE = 1.0  # nats; initialized models of many shapes were within 0.5 of the expected loss
_NAMED = 5  # maximum number of domains in a message
_FAR_BELOW = 0.6  # of the training loss
_COURSE = 5  # evaluations, at the last of which a domain is looked at that has not moved
_NO_MOVE = 1e-3  # of what the average over all tokens has moved


def drawn_loss(config: ModelConfig) -> float | None:
    """Return the expected loss of initialized weights, in nats: ln(vocab_size), and more for widely spread logits.

    The mean of the logsumexp of logits that are independent and normally distributed is that of the random energy
    model. None if it is not known how widely they are spread.

    Source: Derrida 1981, Phys. Rev. B 24, 2613.
    """
    uniform, variance = math.log(config.vocab_size), config.logit_variance
    if variance is None:
        return None
    return uniform + variance / 2 if variance < 2 * uniform else math.sqrt(2 * uniform * variance)


def doubt_of_first_loss(loss: float, config: ModelConfig, where: str) -> str | None:
    """Return what is to be said of the loss of weights that were just initialized, in nats; None if it is plausible."""
    expected = drawn_loss(config)
    if expected is None or abs(loss - expected) <= _TOLERANCE:
        return None
    return (
        f"{where}: the loss is {loss:.2f} nats per token, but untrained weights should give about {expected:.2f}"
        f" (ln(vocab_size) is {math.log(config.vocab_size):.2f}): something is wrong with the model, its init_std or"
        " the scoring"
    )


def doubts(
    records: Sequence[Mapping[str, object]],
    config: ModelConfig,
    drawn: bool = False,
    training_loss: float = math.nan,
    before: Sequence[Mapping[str, object]] = (),
) -> Iterator[str]:
    """Yield what cannot be right in the results of an evaluation.

    Args:
        records: the lines of evals.jsonl of one evaluation; of those of tasks only whether they are finite counts.
        drawn: whether the weights were just initialized, not trained or taken from another model.
        training_loss: of the last steps, in nats per token; NaN if it is not known.
        before: the lines of the evaluations before, on the same suite.
    """
    diverged = [str(record["domain"]) for record in records if is_of_task(record) and not _is_finite(record)]
    if diverged:
        yield (
            f"step {records[0]['step']}: the figures of the tasks {_listed(diverged)} are not finite: the model has"
            " diverged, or its weights are damaged"
        )
    records = [record for record in records if not is_of_task(record)]
    if not records:
        return
    losses = _losses(records)
    evaluation = f"step {records[0]['step']}, {records[0]['suite']}"
    if drawn:
        doubt = doubt_of_first_loss(losses["micro"], config, evaluation)
        yield from [doubt] if doubt else []
        return
    worse = [domain for domain, loss in losses.items() if not loss <= math.log(config.vocab_size)]
    if worse:
        yield (
            f"{evaluation}: the perplexity of {_listed(worse)} is above {config.vocab_size}, so worse than a uniform"
            " guess over all tokens; after more than a few steps the model has diverged, or the weights, the tokenizer"
            " and the text do not belong together"
        )
    if losses["micro"] < _FAR_BELOW * training_loss:
        yield (
            f"{evaluation}: the loss is {losses['micro']:.2f} nats per token, far below that of training,"
            f" {training_loss:.2f}: the texts of the suite may be among those trained on (data.decontaminate), be much"
            " easier, or be scored wrongly"
        )
    if unmoved := _unmoved(records, before):
        yield (
            f"{evaluation}: the loss of {_listed(unmoved)} has not moved in {_COURSE} evaluations, while the average"
            " has: its text may be empty, constant, or not what the model is shown"
        )


def warn_of_doubts(records: Sequence[Mapping[str, object]], config: ModelConfig) -> None:
    """Warn about results of an evaluation that cannot be right; the arguments are those of `doubts`."""
    for doubt in doubts(records, config):
        _logger.warning("%s", doubt)


def _unmoved(records: Sequence[Mapping[str, object]], before: Sequence[Mapping[str, object]]) -> list[str]:
    """Return the domains whose loss has not moved since the first evaluation; only at the `_COURSE`th of them."""
    steps = sorted({step_of(record) for record in before})
    if len(steps) != _COURSE - 1:
        return []  # too early, or said already
    course = [_losses([r for r in before if r["step"] == step]) for step in steps] + [_losses(records)]
    spread = {
        domain: max(losses.get(domain, math.nan) for losses in course)
        - min(losses.get(domain, math.nan) for losses in course)
        for domain in course[-1]
    }
    if not spread["micro"] > 0:
        return []
    return [domain for domain, moved in spread.items() if moved <= _NO_MOVE * spread["micro"]]


def _losses(records: Sequence[Mapping[str, object]]) -> dict[str, float]:
    """Return each line's loss in nats per token; null in the file stands for one that is not finite."""
    return {
        str(record["domain"]): math.nan if record["nll_per_token"] is None else float(str(record["nll_per_token"]))
        for record in records
    }


def _is_finite(record: Mapping[str, object]) -> bool:
    """Return whether a task's accuracy and loss are finite."""
    return all(math.isfinite(float(str(record[key]))) for key in ("accuracy", "nll_per_token"))


def _listed(domains: Sequence[str]) -> str:
    return ", ".join(domains[:_NAMED]) + ", ..." * (len(domains) > _NAMED)
