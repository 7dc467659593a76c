"""The weights of a model by name, and the sources that they are read from. {checkpoint, exchange} -> weights -> models.

A weight's name is its name in the `Model`. Every source of a model - a run's checkpoint, files in another program's
layout - uses these names and returns whole weights or slices of them, one at a time.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from pretrain.model.architecture import ModelConfig, WeightSpec
from pretrain.model.parallel import padded_for
from shards import ConfigError


class Weights(Protocol):
    """A source of a model's weights, which are read one at a time."""

    def read(self, name: str, index: int = 0, count: int = 1) -> Tensor:
        """Read the slice of a weight for tensor-parallel rank `index` of `count`, on the CPU, in its stored type.

        A slice has no padding, so those of a vocabulary may be of different sizes.
        """


def weight_specs(config: ModelConfig) -> dict[str, WeightSpec]:
    """List all weights in the order in which the layers use them; a tied output projection is not listed."""
    vocabulary = WeightSpec((config.vocab_size, config.dim), 0, config.vocab_multiple)
    output = {} if config.tie_embeddings else {"output.weight": vocabulary}
    return {"embedding.weight": vocabulary, **config.layer_specs(), **output}


@torch.no_grad()
def fill(model: nn.Module, weights: Weights, tp_rank: int, tp_size: int) -> None:
    """Copy the weights into every parameter of a model, rounding to the parameter's type."""
    for name, parameter in model.named_parameters():
        parameter.copy_(padded_for(weights.read(name, tp_rank, tp_size), parameter))


def check_splits(config: ModelConfig, tp_size: int, key: str) -> None:
    """Check that `tp_size` ranks can split a model. Raises ConfigError that names `key`, by which the user set it."""
    if tp_size > 1 and not config.SPLITS:
        raise ConfigError(f"{key}={tp_size}: a model of architecture={config.architecture} cannot be split; make it 1")
    for name, value in config.split_sizes.items():
        if value % tp_size:
            raise ConfigError(f"{key}={tp_size} does not divide the model's {name}={value}")
    if not config.gives_each_rank_tokens(tp_size):
        raise ConfigError(
            f"{key}={tp_size} leaves ranks without any of the model's vocab_size={config.vocab_size}, of which each"
            f" holds a multiple of vocab_multiple={config.vocab_multiple}"
        )


def check_row_splits(config: ModelConfig, tp_size: int, sp_size: int, seq_len: int, key: str) -> None:
    """Check that `sp_size` ranks can divide rows of `seq_len` tokens. Raises ConfigError that names `key`."""
    if sp_size > 1 and not config.SPLITS_ROWS:
        named = f"a model of architecture={config.architecture}"
        raise ConfigError(f"{key}={sp_size}: {named} cannot divide a row over ranks; make it 1")
    if config.heads and config.heads.n_heads % (tp_size * sp_size):
        raise ConfigError(f"{key}={sp_size} does not divide the {config.heads.n_heads // tp_size} heads of a rank")
    if seq_len % sp_size:
        raise ConfigError(f"{key}={sp_size} does not divide the {seq_len} tokens of a row")
