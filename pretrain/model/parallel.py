"""Tensor-parallel building blocks: fairscale's layers with tagged weights, and losses on split logits.

Every sharded weight carries the dimension along which it is split. The gradient norm, the initialization, checkpoints
and exports all read that one tag (`shard_dim`), so a weight is either sharded or replicated everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel.cross_entropy import vocab_parallel_cross_entropy
from fairscale.nn.model_parallel.initialize import (
    get_model_parallel_group,
    get_model_parallel_rank,
    get_model_parallel_world_size,
)
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from fairscale.nn.model_parallel.mappings import copy_to_model_parallel_region, reduce_from_model_parallel_region
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def column_linear(in_features: int, out_features: int) -> nn.Module:
    """Make a layer x [..., in] -> this rank's slice of the outputs [..., out / tp_size], uninitialized."""
    with _Untouched():
        layer = ColumnParallelLinear(in_features, out_features, bias=False, gather_output=False, init_method=_undrawn)
    return _tagged(layer, shard_dim=0)


def row_linear(in_features: int, out_features: int) -> nn.Module:
    """Make a layer from this rank's slice of x [..., in / tp_size] to the outputs [..., out], uninitialized."""
    with _Untouched():
        layer = RowParallelLinear(in_features, out_features, bias=False, input_is_parallel=True, init_method=_undrawn)
    return _tagged(layer, shard_dim=1)


def vocab_embedding(vocab_size: int, dim: int) -> nn.Module:
    """Make an embedding [...] -> [..., dim]; each rank holds vocab_size / tp_size uninitialized rows."""
    with _Untouched():
        layer = VocabParallelEmbedding(vocab_size, dim, init_method=_undrawn)
    return _tagged(layer, shard_dim=0)


def _undrawn(weight: Tensor) -> Tensor:
    """Leave the full matrix unchanged that fairscale passes to its init on every rank."""
    return weight


class _Untouched(TorchFunctionMode):
    """Keeps fairscale from copying this rank's slice out of an uninitialized full matrix.

    Memory that is never written to is never allocated. The copy would allocate the host memory of every weight on every
    rank for nothing, since the weights are drawn later, on their device.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.cat and kwargs and "out" in kwargs:
            return kwargs["out"]
        return function(*args, **(kwargs or {}))


def _tagged(layer: nn.Module, shard_dim: int) -> nn.Module:
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    weight.shard_dim = shard_dim  # type: ignore[attr-defined]
    # DeepSpeed looks for this name; without it the norm would leave out the slices of tp ranks > 0.
    weight.tensor_model_parallel = True  # type: ignore[attr-defined]
    return layer


def shard_dim(parameter: nn.Parameter) -> int | None:
    """Return the dimension along which a weight is split over the tp ranks; None for a replicated weight."""
    return getattr(parameter, "shard_dim", None)


def full_shape(parameter: nn.Parameter) -> list[int]:
    """Return the shape of the whole weight, of which this rank may hold only a slice."""
    shape = list(parameter.shape)
    dim = shard_dim(parameter)
    if dim is not None:
        shape[dim] *= get_model_parallel_world_size()
    return shape


def shard_of(full: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return this rank's slice of a whole weight, as a view."""
    dim = shard_dim(parameter)
    if dim is None:
        return full
    return full.chunk(get_model_parallel_world_size(), dim)[get_model_parallel_rank()]


def on_sharded_activations(weight: Tensor) -> Tensor:
    """Return a replicated weight for use on activations of which each tp rank has a different slice.

    Each rank then computes only its slice's part of the weight's gradient, and this sums the parts. Without it the
    ranks' copies of the weight drift apart, although the loss hardly shows it.
    """
    return copy_to_model_parallel_region(weight)


def vocab_parallel_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the negative log-likelihood of each target, without gathering the logits.

    Args:
        logits: [..., vocab_size / tp_size], this rank's slice of the vocabulary, any float type.
        targets: [...] int64 token ids in [0, vocab_size); positions to ignore have any valid id and are masked later.
    Returns:
        [...] fp32, in nats, the same on every tp rank.
    """
    # fairscale's loss edits its input in place, and .float() of an fp32 tensor does not copy.
    fresh = logits.clone() if logits.dtype == torch.float32 else logits.float()
    return vocab_parallel_cross_entropy(fresh, targets)


def vocab_parallel_logsumexp(logits: Tensor) -> Tensor:
    """Return log(sum(exp(logits))) over the whole vocabulary, [...] fp32, differentiable."""
    logits = logits.float()
    largest = logits.detach().amax(dim=-1)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=get_model_parallel_group())
    sum_exp = (logits - largest.unsqueeze(-1)).exp().sum(dim=-1)
    # The sum over ranks passes the gradient through unchanged, since each rank owns its own logits.
    return reduce_from_model_parallel_region(sum_exp).log() + largest


@torch.no_grad()
def vocab_parallel_argmax(logits: Tensor) -> Tensor:
    """Return the most likely token id [...] int64 over the whole vocabulary; of equals, the lowest."""
    group, slice_size = get_model_parallel_group(), logits.shape[-1]
    best, index = logits.max(dim=-1)
    index = index + get_model_parallel_rank() * slice_size
    best_anywhere = best.clone()
    dist.all_reduce(best_anywhere, op=dist.ReduceOp.MAX, group=group)
    index = torch.where(best == best_anywhere, index, torch.iinfo(torch.int64).max)
    dist.all_reduce(index, op=dist.ReduceOp.MIN, group=group)
    return index


@torch.no_grad()
def vocab_parallel_score(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Score each target for an evaluation, without gathering the logits and without a gradient.

    Args:
        logits: [B, T, vocab_size / tp_size], this rank's slice of the vocabulary, any float type.
        targets: [B, T] int64 token ids.
    Returns:
        The negative log-likelihood of each target, [B, T] fp32, in nats; whether it was the most likely token, bool.
        Both are the same on every tp rank.
    """
    nll, correct = torch.empty(targets.shape, device=logits.device), torch.empty_like(targets, dtype=torch.bool)
    first = get_model_parallel_rank() * logits.shape[-1]
    # Row by row, since fp32 copies of a whole batch's logits would take more memory than its forward pass.
    for row, (row_logits, row_targets) in enumerate(zip(logits, targets, strict=True)):
        column = row_targets - first
        in_slice = (column >= 0) & (column < row_logits.shape[-1])
        found = row_logits.gather(-1, torch.where(in_slice, column, 0).unsqueeze(-1)).squeeze(-1).float()
        found = reduce_from_model_parallel_region(torch.where(in_slice, found, 0.0))
        largest = row_logits.amax(dim=-1).float()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=get_model_parallel_group())
        sum_exp = torch.sub(row_logits, largest.unsqueeze(-1)).exp_().sum(dim=-1)  # fp32, whatever the logits are
        nll[row] = reduce_from_model_parallel_region(sum_exp).log() + largest - found
        # An argmax costs more than all the rest, so it is computed only where the target may be it.
        likely = found == largest
        correct[row] = likely
        correct[row, likely] = vocab_parallel_argmax(row_logits[likely]) == row_targets[likely]
    return nll, correct


def gather_vocab(logits: Tensor) -> Tensor:
    """Gather the full logits [..., vocab_size] of a few positions, for sampling; never for training."""
    parts = [torch.empty_like(logits) for _ in range(get_model_parallel_world_size())]
    dist.all_gather(parts, logits.contiguous(), group=get_model_parallel_group())
    return torch.cat(parts, dim=-1)
