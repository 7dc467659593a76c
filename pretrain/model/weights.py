"""The weights of a model by name, and the sources that they are read from. {checkpoint, exchange} -> weights -> models.

A weight's name is its name in `Transformer`. Every source of a model - a run's checkpoint, files in another program's
layout - uses these names and returns whole weights or slices of them, one at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pretrain.model.transformer import ModelConfig, Transformer
from shards import ConfigError


@dataclass(frozen=True)
class WeightSpec:
    """A weight's full shape, and the dimension along which tensor-parallel ranks split it; None if it is replicated."""

    shape: tuple[int, ...]
    shard_dim: int | None = None

    def slice_of(self, whole: Tensor, index: int, count: int) -> Tensor:
        """Return the slice of tensor-parallel rank `index` of `count`, as a view."""
        return whole if self.shard_dim is None else whole.chunk(count, self.shard_dim)[index]

    def bounds(self, index: int, count: int) -> tuple[slice, ...]:
        """Return the same slice as an index into the whole weight."""
        bounds = [slice(0, size) for size in self.shape]
        if self.shard_dim is not None:
            size = self.shape[self.shard_dim] // count
            bounds[self.shard_dim] = slice(index * size, (index + 1) * size)
        return tuple(bounds)


class Weights(Protocol):
    """A source of a model's weights, which are read one at a time."""

    def read(self, name: str, index: int = 0, count: int = 1) -> Tensor:
        """Read the slice of a weight for tensor-parallel rank `index` of `count`, on the CPU, in its stored type."""


def weight_specs(config: ModelConfig) -> dict[str, WeightSpec]:
    """List all weights in the order in which the layers use them; a tied output projection is not listed."""
    dim, head_dim, hidden = config.dim, config.head_dim, config.hidden_dim
    queries, keys = config.n_heads * head_dim, config.kv_heads * head_dim
    block = {
        "attention_norm": WeightSpec((dim,)),
        "attention.wq": WeightSpec((queries, dim), 0),
        "attention.wk": WeightSpec((keys, dim), 0),
        "attention.wv": WeightSpec((keys, dim), 0),
        "attention.wo": WeightSpec((dim, queries), 1),
        "ffn_norm": WeightSpec((dim,)),
        "feed_forward.w1": WeightSpec((hidden, dim), 0),
        "feed_forward.w3": WeightSpec((hidden, dim), 0),
        "feed_forward.w2": WeightSpec((dim, hidden), 1),
    }
    if config.qk_norm:
        block |= {"attention.q_norm": WeightSpec((head_dim,)), "attention.k_norm": WeightSpec((head_dim,))}
    vocabulary = WeightSpec((config.vocab_size, dim), 0)
    specs = {"embedding": vocabulary}
    for layer in range(config.n_layers):
        specs |= {f"blocks.{layer}.{name}": spec for name, spec in block.items()}
    specs["norm"] = WeightSpec((dim,))
    if not config.tie_embeddings:
        specs["output"] = vocabulary
    return {f"{name}.weight": spec for name, spec in specs.items()}


@torch.no_grad()
def fill(model: Transformer, weights: Weights, tp_rank: int, tp_size: int) -> None:
    """Copy the weights into every parameter of a model, rounding to the parameter's type."""
    for name, parameter in model.named_parameters():
        parameter.copy_(weights.read(name, tp_rank, tp_size))


def check_splits(config: ModelConfig, tp_size: int, key: str) -> None:
    """Check that `tp_size` ranks can split a model. Raises ConfigError that names `key`, by which the user set it."""
    for name, value in config.split_sizes.items():
        if value % tp_size:
            raise ConfigError(f"{key}={tp_size} does not divide the model's {name}={value}")
