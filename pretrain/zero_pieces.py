"""Find the part of a weight that ZeRO has given a rank to optimize. engine -> zero_pieces.

Each dp rank optimizes one contiguous piece of a weight, or of this tensor-parallel rank's slice of it. DeepSpeed keeps
weights, moments and gradients of the pieces in a different place for ZeRO-3, for its bf16 optimizer (ZeRO-1 in bf16)
and for the other stages.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_grad, safe_get_local_optimizer_state
from torch import Tensor

_MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's


class OwnPiece:
    """A weight's piece that a rank optimizes; its tensors are flat, live where there is one, and without padding.

    Args:
        parameter: a parameter of the model.
        optimizer: DeepSpeed's optimizer, which wraps PyTorch's.
        dp_rank: this rank's number among those that share the weight.
    Attributes:
        start: where it begins, in elements of this tensor-parallel rank's flat slice of the weight.
    """

    def __init__(self, parameter: Any, optimizer: Any, dp_rank: int) -> None:
        self._parameter = parameter
        self._optimizer = optimizer.optimizer
        self._partitioned = hasattr(parameter, "ds_id")  # by ZeRO-3
        # None too if the piece is empty
        self._mapping: Any = None if self._partitioned else parameter._hp_mapping
        if self._partitioned:
            size = parameter.ds_tensor.numel()  # including the padding
            self.start = min(size * dp_rank, parameter.ds_numel)
            self._size = min(size, parameter.ds_numel - self.start)
        elif self._mapping is not None:
            self.start = self._mapping.lp_fragment_address.start
            self._size = self._mapping.lp_fragment_address.numel
        else:
            self.start = self._size = 0

    @property
    def weights(self) -> Tensor:
        """Return the fp32 values."""
        if self._partitioned:
            return self._cut(safe_get_local_fp32_param(self._parameter))
        return self._empty() if self._mapping is None else self._cut(self._flat_weights().detach())

    @property
    def moments(self) -> dict[str, Tensor]:
        """Return the optimizer's moments by name; before the first step, the zeros that they begin as."""
        if self._partitioned and self._optimizer.state:
            return {key: self._cut(safe_get_local_optimizer_state(self._parameter, key)) for key in _MOMENTS}
        # The mapping has views of the moments too, but they go stale when a checkpoint is loaded.
        if self._mapping is not None and (state := self._optimizer.state.get(self._flat_weights())):
            return {key: self._cut(state[key]) for key in _MOMENTS}
        return {key: torch.zeros_like(self.weights) for key in _MOMENTS}

    @property
    def gradient(self) -> Tensor:
        """Return the gradient, summed over micro-steps and averaged over the dp ranks.

        It exists between the last backward pass of a step and the optimizer's step, and is not clipped then.
        """
        if self._partitioned:
            return safe_get_local_grad(self._parameter).flatten()[: self._size]
        if self._mapping is None:
            return self._empty()
        held = self._mapping.get_lp_grad_fragment(self._parameter._index_in_param_group).flatten()
        # The bf16 optimizer holds a whole gradient on every dp rank.
        return held[self.start :][: self._size] if held.numel() == self._parameter.numel() else held

    def _flat_weights(self) -> Tensor:
        """Return the fp32 weights of all pieces of this rank that are optimized together."""
        return self._optimizer.param_groups[self._mapping.param_group_index]["params"][0]

    def _cut(self, values: Tensor) -> Tensor:
        """Return this piece of what may be padded, or that of other weights as well."""
        start = 0 if self._partitioned else self._mapping.get_hp_fragment_address().start
        return values[start : start + self._size]

    def _empty(self) -> Tensor:
        return torch.empty(0, device=self._parameter.device)
