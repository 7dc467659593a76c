"""Find the part of a weight that ZeRO has given a rank to optimize. engine -> zero_pieces.

Each ZeRO rank optimizes one contiguous piece of a weight, or of this tensor-parallel rank's slice of it. Its fp32
values lie in a flat tensor with those of other weights; where, and where its gradient is, DeepSpeed tells in one way
for ZeRO-3 and in another for the other stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_local_grad
from torch import Tensor, nn

from pretrain.checkpoint.zero_files import AVERAGE
from pretrain.optim import moments_of


class OwnPiece:
    """A weight's piece that a rank optimizes; its tensors are flat, without padding, and empty if it has no part.

    Args:
        parameter: a parameter of the model.
        optimizer: DeepSpeed's optimizer, which wraps PyTorch's.
        zero_rank: this rank's number among those that share the weight.
    Attributes:
        start: where it begins, in elements of this tensor-parallel rank's flat slice of the weight.
        size: its elements.
        place: where it begins in the rank's flat tensor.
        flat: that tensor, a parameter of PyTorch's optimizer; None if the rank has no part of the weight, but under
            ZeRO-3.
        weights: the fp32 values: the live ones, which the next step changes, on the host if they are offloaded.
    """

    def __init__(self, parameter: Any, optimizer: Any, zero_rank: int) -> None:
        self._parameter = parameter
        self._states = optimizer.optimizer.state
        self._partitioned = hasattr(parameter, "ds_id")  # by ZeRO-3
        # None too if the rank has no part of the weight
        self._mapping: Any = None if self._partitioned else parameter._hp_mapping
        self.flat: Tensor | None = None
        self.start = self.size = self.place = group = 0
        if self._partitioned:
            size = parameter.ds_tensor.numel()  # including the padding
            self.start = min(size * zero_rank, parameter.ds_numel)
            self.size = min(size, parameter.ds_numel - self.start)
            part, self.place, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            self.flat = optimizer.fp32_partitioned_groups_flat[part]
            group = optimizer.sub_group_to_group_id[part]
        elif self._mapping is not None:
            address, group = self._mapping.lp_fragment_address, self._mapping.param_group_index
            self.start, self.size = address.start, address.numel
            self.place = self._mapping.get_hp_fragment_address().start
            self.flat = optimizer.optimizer.param_groups[group]["params"][0]
        self._moments = moments_of(optimizer.optimizer.param_groups[group])
        # Of no part, nothing is cut from any tensor
        self._held = optimizer.optimizer.param_groups[0]["params"][0] if self.flat is None else self.flat
        self.weights = self.cut(self._held.detach())

    @property
    def moments(self) -> dict[str, Tensor]:
        """Return the optimizer's moments by name, in fp32; before the first step, the zeros that they begin as.

        The moving average of the weights counts as one, if there is one.
        """
        # Not those in the mapping, which go stale when a checkpoint is loaded
        if states := self._states.get(self._held):
            return {key: self.cut(states[key]).float() for key in (*self._moments, AVERAGE) if key in states}
        return {key: torch.zeros_like(self.weights) for key in self._moments}

    def state(self, key: str) -> Tensor:
        """Return what the optimizer keeps of this piece under a key, which must be there."""
        return self.cut(self._states[self._held][key])

    @property
    def gradient(self) -> Tensor:
        """Return the gradient, summed over micro-steps and averaged over the ZeRO ranks.

        It exists between the last backward pass of a step and the optimizer's step, and is not clipped then.
        """
        if self._partitioned:
            return safe_get_local_grad(self._parameter).flatten()[: self.size]
        if self._mapping is None:
            return torch.empty_like(self.weights)
        held = self._mapping.get_lp_grad_fragment(self._parameter._index_in_param_group).flatten()
        # The bf16 optimizer holds a whole gradient on every ZeRO rank.
        return held[self.start :][: self.size] if held.numel() == self._parameter.numel() else held

    def cut(self, flat: Tensor) -> Tensor:
        """Return this piece of a flat tensor that holds those of other weights as well."""
        return flat[self.place : self.place + self.size]


def own_pieces(model: nn.Module, optimizer: Any, zero_rank: int) -> Iterator[tuple[str, nn.Parameter, OwnPiece]]:
    """Yield the weights of a model that are trained, each with its name and this rank's piece.

    Args:
        optimizer, zero_rank: as for `OwnPiece`.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter, OwnPiece(parameter, optimizer, zero_rank)


def flat_partitions(optimizer: Any) -> Sequence[Tensor]:
    """Return the flat fp32 tensors that hold a rank's pieces, by which the optimizer's state is looked up.

    Args:
        optimizer: DeepSpeed's.
    """
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3, which empties the groups between steps
        return list(optimizer.fp32_partitioned_groups_flat)
    return [group["params"][0] for group in optimizer.optimizer.param_groups]


def set_whole(parameter: Any, values: Tensor) -> None:
    """Set what the forward pass uses of a weight, or of this tensor-parallel rank's slice; all ZeRO ranks must call it.

    Args:
        values: all of them, flat or in shape, of which ZeRO-3 keeps a part on each ZeRO rank.
    """
    # Under ZeRO-3 all ZeRO ranks get rank 0's.
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(values.view(parameter.shape))
