"""The weights of a model by name, and the sources that they are read from. {checkpoint, exchange} -> weights -> models.

A weight's name is its name in the `Model`. Every source of a model - a run's checkpoint, files in another program's
layout - uses these names and returns whole weights or slices of them, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from pretrain.model.architecture import ModelConfig, WeightSpec
from pretrain.model.lora import is_adapter
from pretrain.model.parallel import padded_for
from shards import ConfigError
from shards.config_errors import not_divisible


class Weights(Protocol):
    """A source of a model's weights, which are read one at a time."""

    def read(self, name: str, index: int = 0, count: int = 1) -> Tensor:
        """Read the slice of a weight for tensor-parallel rank `index` of `count`, on the CPU, in its stored type.

        A slice has no padding, so those of a vocabulary may be of different sizes.
        """


def weight_specs(config: ModelConfig) -> dict[str, WeightSpec]:
    """List all weights but those of adapters, in the order in which the layers use them.

    A tied output projection is not listed.
    """
    vocabulary = WeightSpec((config.vocab_size, config.dim), 0, config.vocab_multiple)
    output = {} if config.tie_embeddings else {"output.weight": vocabulary}
    return {"embedding.weight": vocabulary, **config.layer_specs(), **output}


def trained_specs(config: ModelConfig) -> dict[str, WeightSpec]:
    """List the weights that a training changes and saves: the adapters', if there are any, or else all."""
    lora, specs = config.adapters, weight_specs(config)
    if lora is None:
        return specs
    adapters = {}
    for name, spec in specs.items():
        layer = name.removesuffix(".weight")
        if lora.adapts(layer):
            outputs, inputs = spec.shape
            a_dim, b_dim = (None, 0) if spec.shard_dim == 0 else (1, None)
            adapters[f"{layer}.lora.a"] = WeightSpec((lora.r, inputs), a_dim)
            adapters[f"{layer}.lora.b"] = WeightSpec((outputs, lora.r), b_dim)
    return adapters


class AdaptedWeights:
    """The weights of a model and of its adapters, each from its own source; a `Weights`."""

    def __init__(self, base: Weights, adapters: Weights) -> None:
        self._base, self._adapters = base, adapters

    def read(self, name: str, index: int = 0, count: int = 1) -> Tensor:
        """Read a weight of the model or of an adapter, or its slice for tensor-parallel rank `index` of `count`."""
        return (self._adapters if is_adapter(name) else self._base).read(name, index, count)


class MergedWeights:
    """The weights of a model with its adapters' updates added: W + (alpha / r) B A; a `Weights`.

    Args:
        config: of the model, with its adapters.
    """

    def __init__(self, base: Weights, adapters: Weights, config: ModelConfig) -> None:
        assert config.adapters is not None
        self._base, self._adapters = base, adapters
        self._scale, self._names = config.adapters.scale, trained_specs(config).keys()

    def read(self, name: str, index: int = 0, count: int = 1) -> Tensor:
        """Read a weight, or its slice for tensor-parallel rank `index` of `count`; in fp32 if it has an update."""
        weight, layer = self._base.read(name, index, count), name.removesuffix(".weight")
        if f"{layer}.lora.a" not in self._names:
            return weight
        a, b = (self._adapters.read(f"{layer}.lora.{part}", index, count).float() for part in "ab")
        return weight.float() + self._scale * (b @ a)


@torch.no_grad()
def fill(model: nn.Module, weights: Weights, tp_rank: int, tp_size: int) -> None:
    """Copy the weights into every parameter of a model, rounding to the parameter's type."""
    for name, parameter in model.named_parameters():
        parameter.copy_(padded_for(weights.read(name, tp_rank, tp_size), parameter))


def split_problems(config: ModelConfig, tp_size: int, key: str) -> Iterator[str]:
    """Yield why `tp_size` ranks cannot split a model, naming `key`, by which the user set them."""
    if tp_size > 1 and not config.SPLITS:
        yield f"{key}={tp_size}: model.architecture={config.architecture} cannot be split over ranks; set {key}=1"
    for name, value in config.split_sizes.items():
        yield from not_divisible(f"model.{name}", value, key, tp_size)
    if not config.gives_each_rank_tokens(tp_size):
        yield (
            f"model.vocab_size={config.vocab_size} leaves some of {key}={tp_size} ranks without a token; make {key} or"
            f" model.vocab_multiple={config.vocab_multiple} smaller"
        )


def check_splits(config: ModelConfig, tp_size: int, key: str) -> None:
    """Check that `tp_size` ranks can split a model. Raises ConfigError that names `key`, by which the user set it."""
    if problems := list(split_problems(config, tp_size, key)):
        raise ConfigError("\n".join(problems))


def check_row_splits(config: ModelConfig, tp_size: int, sp_size: int, seq_len: int, key: str) -> None:
    """Check that `sp_size` ranks can divide rows of `seq_len` tokens. Raises ConfigError that names `key`."""
    if sp_size > 1 and not config.SPLITS_ROWS:
        named = f"a model of architecture={config.architecture}"
        raise ConfigError(f"{key}={sp_size}: {named} cannot divide a row over ranks; make it 1")
    if config.heads and config.heads.n_heads % (tp_size * sp_size):
        raise ConfigError(f"{key}={sp_size} does not divide the {config.heads.n_heads // tp_size} heads of a rank")
    if seq_len % sp_size:
        raise ConfigError(f"{key}={sp_size} does not divide the {seq_len} tokens of a row")
