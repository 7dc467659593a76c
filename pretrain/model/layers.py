"""Layers that architectures share. parallel -> layers -> {transformer, recurrent}."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.model.architecture import Head, ModelConfig, Use
from pretrain.model.checkpointing import checkpointed
from pretrain.model.parallel import ColumnLinear, on_sharded_activations
from pretrain.parallel_config import ParallelConfig
from pretrain.rng import derive_seed

T = TypeVar("T")

Distribution = Literal["trunc_normal", "normal"]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in fp32.

    Source: Zhang and Sennrich 2019, arXiv 1910.07467.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor, sharded: bool = False) -> Tensor:
        """Normalize x [..., dim]; `sharded` says whether each tp rank has different activations."""
        weight = on_sharded_activations(self.weight) if sharded else self.weight
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)


class Output(ColumnLinear):
    """The projection to the vocabulary, which leaves it to a head whether any logits are ever made."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.dim, config.vocab_size, config.vocab_multiple)

    def forward(self, hidden: Tensor, head: Head[T]) -> T:  # type: ignore[override]
        """Return what the head makes of hidden states [B, T, dim]."""
        return head(hidden, self.weight)


def computations(compute: Callable[..., Tensor], parallel: ParallelConfig) -> dict[Use, Callable[..., Tensor]]:
    """Return how to compute a block for each use, checkpointed and compiled as a config says.

    Both happen inside the module and leave out its hooks, with which ZeRO-3 gathers the weights before and frees them
    after. Generation is not compiled, since its shapes differ from call to call; nor is a pass that is measured.
    """
    train, score = checkpointed(compute, parallel.activation_checkpointing), compute
    if parallel.compile:
        train, score = torch.compile(train, dynamic=False), torch.compile(score, dynamic=False)
    return {"training": train, "scoring": score, "uncompiled": compute}


def draw(
    name: str,
    shape: Sequence[int],
    std: float,
    seed: int,
    device: torch.device | str = "cpu",
    distribution: Distribution = "trunc_normal",
) -> Tensor:
    """Draw a whole matrix, in fp32, from its own generator, so that every layout gets the same weights.

    Args:
        name: of the weight; with the run's seed it decides what is drawn.
        distribution: normal, or trunc_normal, which is cut at three standard deviations.
    """
    full = torch.empty(tuple(shape), device=device)
    generator = torch.Generator(device).manual_seed(derive_seed(seed, "init", name))
    if distribution == "trunc_normal":
        return nn.init.trunc_normal_(full, std=std, a=-3 * std, b=3 * std, generator=generator)
    return nn.init.normal_(full, std=std, generator=generator)
