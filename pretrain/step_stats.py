"""The results of an optimizer step, and limits that may refuse it. step_stats -> {engine, stepper, faults}."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pretrain.gradient_noise import GradientNoise
from pretrain.layer_figures import LayerFigures


@dataclass(frozen=True)
class Limits:
    """The loss and the gradient norm above which a step is refused: its update is not made."""

    loss: float = math.inf
    grad_norm: float = math.inf


NO_LIMITS = Limits()


@dataclass(frozen=True)
class StepStats:
    """The results of one optimizer step, the same on every rank.

    Attributes:
        loss: mean negative log-likelihood of the global batch's valid targets, in nats; without the z-loss. NaN,
            like the other two, if there was no target.
        z_loss: mean squared logsumexp of the logits times its weight; 0 if it is off.
        grad_norm: L2 norm of the gradient of the whole model before clipping; infinite if it is NaN.
        applied: False if loss or gradient was not finite or refused, or there was no target; weights and optimizer are
            then unchanged.
        layers: figures of each layer, if they were to be measured.
        refused: whether nothing was applied because of the step's limits.
        noise: estimates by its micro-batches, if the update was made and there were several.
    """

    loss: float
    z_loss: float
    grad_norm: float
    applied: bool
    layers: LayerFigures | None = None
    refused: bool = False
    noise: GradientNoise | None = None

    def exceeds(self, limits: Limits) -> bool:
        """Return whether loss or gradient norm is above its limit; one that is not finite is another fault."""
        return limits.loss < self.loss < math.inf or limits.grad_norm < self.grad_norm < math.inf
