"""Warn of evaluations that cannot be right. scores -> plausibility -> log.

A broken tokenizer, wrong weights or a model that diverged give figures that look like any others, to whoever does not
know what to expect. Two things are known: no model need be worse than one that takes every piece for equally likely,
whose perplexity is the number of pieces; and what the loss of a model is whose weights were only drawn.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

from pretrain.model.transformer import ModelConfig

_logger = logging.getLogger(__name__)

_TOLERANCE = 1.0  # nats; drawn models of many shapes were within 0.5 of what is expected
_NAMED = 5  # domains named in a message


def drawn_loss(config: ModelConfig) -> float:
    """Return the loss to expect of drawn weights, in nats: ln(vocab_size), and more for widely drawn logits.

    The last norm leaves activations of length sqrt(dim), so logits are normally distributed with variance dim *
    init_std^2, and independent. The mean of the logsumexp of such logits is that of the random energy model.

    Source: Derrida 1981, Phys. Rev. B 24, 2613.
    """
    uniform, variance = math.log(config.vocab_size), config.dim * config.init_std**2
    return uniform + variance / 2 if variance < 2 * uniform else math.sqrt(2 * uniform * variance)


def warn_of_doubts(records: Sequence[Mapping[str, object]], config: ModelConfig, drawn: bool = False) -> None:
    """Warn of results in an evaluation that cannot be right.

    Args:
        records: the lines of evals.jsonl of one evaluation.
        drawn: the weights are those that a run begins with where it begins with no other model's.
    """
    losses = {str(record["domain"]): float(str(record["nll_per_token"])) for record in records}
    evaluation = f"step {records[0]['step']}, {records[0]['suite']}"
    if drawn:
        expected, found = drawn_loss(config), losses["micro"]
        if not abs(found - expected) <= _TOLERANCE:
            _logger.warning(
                "%s: the loss is %.2f nats a token, but with weights that were only drawn it should be about %.2f"
                " (ln(vocab_size) is %.2f): something is wrong with the model, its init_std or the scoring",
                evaluation, found, expected, math.log(config.vocab_size),
            )  # fmt: skip
        return
    worse = [domain for domain, loss in losses.items() if not loss <= math.log(config.vocab_size)]
    if worse:
        _logger.warning(
            "%s: the perplexity of %s is above %d, so worse than a guess in which all pieces are equally likely; after"
            " more than a few steps the model has diverged, or the weights, the tokenizer or the text are not those"
            " that belong together",
            evaluation, ", ".join(worse[:_NAMED]) + ", ..." * (len(worse) > _NAMED), config.vocab_size,
        )  # fmt: skip
