"""Low-rank adapters beside frozen matrices: y = W x + (alpha / r) B A x. parallel -> lora -> transformer.

Only A [r, in] and B [out, r] are trained. The tp ranks split the one of the two that has the dimension along which W is
split: B of a column-parallel layer, A of a row-parallel one. Every rank holds the other, and its gradient there is a
part of a sum. All such sums of a branch are taken together, in one small collective of its backward pass; there is no
other, since B A x is linear in a rank's slice of x, and so is a part of what the branch sums anyway when it is left.

Source: Hu et al. 2021, arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from pretrain.model.parallel import ColumnLinear, RowLinear, on_sharded_activations, shard_dim, tag, tp_rank, tp_size
from pretrain.rng import derive_seed
from shards import Config

Target = Literal["wq", "wk", "wv", "wo", "w1", "w2", "w3"]


class LoraConfig(Config):
    """Adapters, which are trained in place of the model in init_from: of each matrix in some layers a low-rank update.

    They compute W x + (alpha / r) B A x, where A begins with random values and B with zeros.
    """

    r: int = Field(ge=1)  # rank of the update: columns of B and rows of A
    alpha: float = Field(gt=0)  # the update is multiplied by alpha / r
    dropout: float = Field(0.0, ge=0, lt=1)  # on what A reads, not on what the frozen matrix reads
    targets: tuple[Target, ...] = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")  # the matrices of each block that get one

    @field_validator("targets")
    @classmethod
    def _are_distinct(cls, targets: tuple[Target, ...]) -> tuple[Target, ...]:
        if not targets or len(set(targets)) < len(targets):
            raise ValueError("name each matrix once, and at least one of wq, wk, wv, wo, w1, w2, w3")
        return targets

    def adapts(self, layer: str) -> bool:
        """Return whether the layer of this name in the model gets an adapter."""
        return layer.rpartition(".")[2] in self.targets

    @property
    def scale(self) -> float:
        return self.alpha / self.r


def is_adapter(name: str) -> bool:
    """Return whether the weight of this name in `Transformer` is one of an adapter's."""
    return name.endswith((".lora.a", ".lora.b"))


class Adapter(nn.Module):
    """The low-rank update of one layer, uninitialized.

    Args:
        layer: its dimension that the tp ranks split, the adapter splits too.
    Attributes:
        a: [r, in], of a row-parallel layer this rank's [r, in / tp_size].
        b: [out, r], of a column-parallel layer this rank's [out / tp_size, r].
    """

    def __init__(self, config: LoraConfig, layer: ColumnLinear | RowLinear) -> None:
        super().__init__()
        out_features, in_features = layer.weight.shape
        self.a = nn.Parameter(torch.empty(config.r, in_features))
        self.b = nn.Parameter(torch.empty(out_features, config.r))
        self.splits_outputs = shard_dim(layer.weight) == 0
        tag(self.b if self.splits_outputs else self.a, int(not self.splits_outputs), layer.weight.whole_size, 1)
        self._scale, self._dropout = config.scale, config.dropout

    @property
    def replicated(self) -> nn.Parameter:
        """Return the one of its weights that every tp rank holds whole."""
        return self.a if self.splits_outputs else self.b

    def forward(self, x: Tensor, replicated: Tensor) -> Tensor:
        """Return what this rank adds to its layer's result for x [N, in], or for its slice of it.

        Args:
            replicated: the replicated weight, as `adapted` has prepared it.
        """
        a, b = (replicated, self.b) if self.splits_outputs else (self.a, replicated)
        return F.linear(F.linear(self._dropped(x), a), b) * self._scale

    def _dropped(self, x: Tensor) -> Tensor:
        """Apply dropout to x [N, in], or to this rank's slice of it, with the same mask for every tp_size.

        Where ranks have slices, each draws the mask of the whole input, from the seed that they share, and cuts out its
        own part; otherwise their slices would drop the same units.
        """
        if not (self.training and self._dropout):
            return x
        if self.splits_outputs or tp_size() == 1:
            return F.dropout(x, self._dropout)
        width = x.shape[-1]
        mask = F.dropout(x.new_ones(*x.shape[:-1], width * tp_size()), self._dropout)
        return x * mask.narrow(-1, width * tp_rank(), width)


def attach_adapters(model: nn.Module, config: LoraConfig) -> None:
    """Freeze a model, and give those of its layers that the config names an adapter to train."""
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if config.adapts(name):
            assert isinstance(layer, ColumnLinear | RowLinear), f"{name} is no matrix"
            layer.lora = Adapter(config, layer)


def adapted(*layers: nn.Module) -> list[Callable[[Tensor], Tensor]]:
    """Return a function for each layer of a branch: what it computes, with its adapter's update if it has one."""
    adapters: list[Adapter | None] = [getattr(layer, "lora", None) for layer in layers]
    prepared = iter(_all_on_sharded_activations([adapter.replicated for adapter in adapters if adapter is not None]))
    return [
        layer if adapter is None else _with_update(layer, adapter, next(prepared))
        for layer, adapter in zip(layers, adapters, strict=True)
    ]


def _with_update(layer: nn.Module, adapter: Adapter, replicated: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x) + adapter(x, replicated)


def _all_on_sharded_activations(weights: list[nn.Parameter]) -> list[Tensor]:
    """Apply `on_sharded_activations` to several weights with one collective."""
    if tp_size() == 1 or not weights:
        return list(weights)
    together = on_sharded_activations(torch.cat([weight.flatten() for weight in weights]))
    parts = torch.split(together, [weight.numel() for weight in weights])
    return [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]


def drawn_adapter(name: str, shape: Sequence[int], seed: int, device: torch.device | str) -> Tensor:
    """Draw a whole weight of an adapter as peft does: A uniformly within 1 / sqrt(in), B of zeros.

    Those are the bounds of Kaiming's uniform distribution with a = sqrt(5). The seed is the run's.
    """
    whole = torch.zeros(tuple(shape), device=device)
    if name.endswith(".b"):
        return whole
    bound = whole.shape[1] ** -0.5
    generator = torch.Generator(device).manual_seed(derive_seed(seed, "init", name))
    return whole.uniform_(-bound, bound, generator=generator)
