"""Hash a run's weights and their moments where ZeRO's ranks hold them. {zero_pieces, state_hash} -> weight_hash."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from pretrain.checkpoint.state_hash import Place, StateHash, digits, hash_sum
from pretrain.model.parallel import shard_dim, size_without_padding
from pretrain.topology import Topology
from pretrain.zero_pieces import own_pieces


@torch.no_grad()
def state_hash(model: nn.Module, optimizer: Any, topology: Topology) -> StateHash:
    """Hash the fp32 weights that are trained, and their moments, the same in every layout. Every rank must call it.

    The moving average of the weights counts as a moment.

    Args:
        optimizer: DeepSpeed's.
    """
    weights, moments = [], []
    for name, parameter, piece in own_pieces(model, optimizer, topology.zero_rank):
        dim = shard_dim(parameter)
        if dim is None and topology.tp_rank > 0:
            continue  # every tensor-parallel rank has a copy, which counts once
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        place = Place.in_slice(piece.start, shape, dim, topology.tp_rank, topology.tp_size)
        size = max(0, _size_without_padding(parameter, shape) - piece.start)
        weights.append(hash_sum(piece.weights[:size].to(topology.device), name, place))
        for key, values in piece.moments.items():
            moments.append(hash_sum(values[:size].to(topology.device), f"{name}/{key}", place))
    own = [int(torch.stack(sums).sum()) if sums else 0 for sums in (weights, moments)]
    return StateHash(*map(digits, topology.sum_int64(own)))


def _size_without_padding(parameter: Any, shape: tuple[int, ...]) -> int:
    """Count the first elements of a slice of this shape that are no padding, which lies at its end."""
    if shard_dim(parameter) != 0:
        return math.prod(shape)  # only rows are padded
    return size_without_padding(parameter) * math.prod(shape[1:])
