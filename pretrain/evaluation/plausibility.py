"""Warn about evaluations that cannot be right. scores -> plausibility -> log.

A broken tokenizer, wrong weights or a diverged model give figures that look plausible to anyone who does not know what
to expect. Two things are known: no model need be worse than a uniform guess over all tokens, whose perplexity is the
number of tokens; and the loss of a model with randomly initialized weights can be computed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

from pretrain.model.transformer import ModelConfig

_logger = logging.getLogger(__name__)

_TOLERANCE = 1.0  # nats; initialized models of many shapes were within 0.5 of the expected loss
_NAMED = 5  # maximum number of domains in a message


def drawn_loss(config: ModelConfig) -> float:
    """Return the expected loss of initialized weights, in nats: ln(vocab_size), and more for widely spread logits.

    The last norm leaves activations of length sqrt(dim) times its weight, so logits are independent and normally
    distributed with variance dim * (weight * init_std)^2. The mean of the logsumexp of such logits is that of the
    random energy model.

    Source: Derrida 1981, Phys. Rev. B 24, 2613.
    """
    uniform, weight = math.log(config.vocab_size), config.scale_of("norm.weight").init
    variance = config.dim * (weight * config.init_std) ** 2
    return uniform + variance / 2 if variance < 2 * uniform else math.sqrt(2 * uniform * variance)


def warn_of_doubts(records: Sequence[Mapping[str, object]], config: ModelConfig, drawn: bool = False) -> None:
    """Warn about results of an evaluation that cannot be right.

    Args:
        records: the lines of evals.jsonl of one evaluation.
        drawn: whether the weights were just initialized, not trained or taken from another model.
    """
    losses = {str(record["domain"]): float(str(record["nll_per_token"])) for record in records}
    evaluation = f"step {records[0]['step']}, {records[0]['suite']}"
    if drawn:
        expected, found = drawn_loss(config), losses["micro"]
        if not abs(found - expected) <= _TOLERANCE:
            _logger.warning(
                "%s: the loss is %.2f nats per token, but untrained weights should give about %.2f"
                " (ln(vocab_size) is %.2f): something is wrong with the model, its init_std or the scoring",
                evaluation, found, expected, math.log(config.vocab_size),
            )  # fmt: skip
        return
    worse = [domain for domain, loss in losses.items() if not loss <= math.log(config.vocab_size)]
    if worse:
        _logger.warning(
            "%s: the perplexity of %s is above %d, so worse than a uniform guess over all tokens; after"
            " more than a few steps the model has diverged, or the weights, the tokenizer and the text do not"
            " belong together",
            evaluation, ", ".join(worse[:_NAMED]) + ", ..." * (len(worse) > _NAMED), config.vocab_size,
        )  # fmt: skip
