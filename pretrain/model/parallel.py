"""Tensor-parallel building blocks: fairscale's layers with tagged weights, and the collectives between them.

Every sharded weight carries the dimension along which it is split. The gradient norm, the initialization, checkpoints
and exports all read that one tag (`shard_dim`), so a weight is either sharded or replicated everywhere.

The vocabulary is the one size that need not divide: each rank holds as many rows of embedding and output, rounded up to
a multiple of `model.vocab_multiple`, and those that reach beyond the last token are padding. A whole weight never has
any; padding exists only in the slices of a running model and of its checkpoints, and is zero in them: its logits are
masked (`loss.py`), so it has no gradient, and AdamW's moments and weight decay leave zeros as they are. Dropping or
adding it changes nothing, so a resume with another tp_size recuts the whole weight and stays exact, although the amount
of padding follows from tp_size.

The layers themselves do not communicate. However many matrices read a branch's input, the branch enters the region that
the tp ranks split once and leaves it once: a collective forward and one backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.initialize import (
    get_model_parallel_group,
    get_model_parallel_rank,
    get_model_parallel_world_size,
)
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class ColumnLinear(ColumnParallelLinear):  # type: ignore[misc]  # fairscale has no types
    """A layer x [..., in] -> this rank's slice of the outputs [..., out / tp_size], uninitialized.

    Args:
        multiple: what each slice is rounded up to a multiple of; None: it is not, so tp_size has to divide the outputs.
    """

    def __init__(self, in_features: int, out_features: int, multiple: int | None = None) -> None:
        held = out_features if multiple is None else _padded_size(out_features, multiple)
        with _Untouched():
            super().__init__(in_features, held, bias=False, gather_output=False, init_method=_undrawn)
        tag(self.weight, shard_dim=0, whole_size=out_features, multiple=multiple or 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class RowLinear(RowParallelLinear):  # type: ignore[misc]
    """A layer from this rank's slice of x [..., in / tp_size] to its part of the sums [..., out], uninitialized."""

    def __init__(self, in_features: int, out_features: int) -> None:
        with _Untouched():
            super().__init__(in_features, out_features, bias=False, input_is_parallel=True, init_method=_undrawn)
        tag(self.weight, shard_dim=1, whole_size=in_features, multiple=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class VocabEmbedding(VocabParallelEmbedding):  # type: ignore[misc]
    """An embedding [...] -> [..., dim] of which each rank holds vocab_size / tp_size uninitialized rows, rounded up.

    Tokens whose rows another rank holds are zeros, which that rank's rows are to be added to.

    Args:
        multiple: what each rank's rows are rounded up to a multiple of.
    """

    def __init__(self, vocab_size: int, dim: int, multiple: int) -> None:
        with _Untouched():
            super().__init__(_padded_size(vocab_size, multiple), dim, init_method=_undrawn)
        tag(self.weight, shard_dim=0, whole_size=vocab_size, multiple=multiple)

    def forward(self, tokens: Tensor) -> Tensor:
        if get_model_parallel_world_size() == 1:
            return F.embedding(tokens, self.weight)
        row = tokens - self.vocab_start_index
        held = (row >= 0) & (row < self.num_embeddings_per_partition)
        return F.embedding(torch.where(held, row, 0), self.weight) * held.unsqueeze(-1)


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


def tag(weight: nn.Parameter, shard_dim: int, whole_size: int, multiple: int) -> None:
    """Mark a weight as this rank's slice of a whole one.

    Args:
        shard_dim, whole_size: the dimension along which it is split, and its size without padding.
        multiple: what slices along it are rounded up to a multiple of.
    """
    weight.shard_dim = shard_dim  # type: ignore[attr-defined]
    weight.whole_size = whole_size  # type: ignore[attr-defined]
    weight.slice_multiple = multiple  # type: ignore[attr-defined]
    # DeepSpeed looks for this name; without it the norm would leave out the slices of tp ranks > 0.
    weight.tensor_model_parallel = True  # type: ignore[attr-defined]


def shard_dim(parameter: nn.Parameter) -> int | None:
    """Return the dimension along which a weight is split over the tp ranks; None for a replicated weight."""
    return getattr(parameter, "shard_dim", None)


def counts_in_sums(parameter: nn.Parameter, tp_rank: int) -> bool:
    """Return whether this tp rank adds a weight to a sum over all of them; one of which all have a copy counts once."""
    return tp_rank == 0 or shard_dim(parameter) is not None


def full_shape(parameter: nn.Parameter) -> list[int]:
    """Return the shape of the whole weight, of which this rank may hold only a slice."""
    shape = list(parameter.shape)
    dim = shard_dim(parameter)
    if dim is not None:
        shape[dim] = parameter.whole_size  # type: ignore[attr-defined]
    return shape


def shard_of(full: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return this rank's slice of a whole weight: a view, or a copy with padding."""
    dim = shard_dim(parameter)
    if dim is None:
        return full
    tp_rank, tp_size = get_model_parallel_rank(), get_model_parallel_world_size()
    return slice_of(full, dim, tp_rank, tp_size, parameter.slice_multiple)  # type: ignore[attr-defined]


def padded_for(part: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return this rank's slice of a whole weight, given what it has of it without padding."""
    dim = shard_dim(parameter)
    if dim is None:
        return part
    whole_size, multiple = parameter.whole_size, parameter.slice_multiple  # type: ignore[attr-defined]
    return _padded(part, dim, slice_size(whole_size, get_model_parallel_world_size(), multiple))


def slice_size(whole_size: int, count: int, multiple: int = 1) -> int:
    """Return the size of each of `count` equal slices, a multiple of `multiple`, which may reach beyond the end."""
    return -(-whole_size // (count * multiple)) * multiple


def slice_bounds(whole_size: int, index: int, count: int, multiple: int = 1) -> tuple[int, int]:
    """Return the first position and the end of what slice `index` of `count` holds of a whole, without padding."""
    size = slice_size(whole_size, count, multiple)
    return min(index * size, whole_size), min((index + 1) * size, whole_size)


def slice_of(whole: Tensor, dim: int, index: int, count: int, multiple: int = 1) -> Tensor:
    """Return slice `index` of `count` equal slices along a dimension: a view, or a copy padded with zeros."""
    start, end = slice_bounds(whole.shape[dim], index, count, multiple)
    return _padded(whole.narrow(dim, start, end - start), dim, slice_size(whole.shape[dim], count, multiple))


def _padded(part: Tensor, dim: int, size: int) -> Tensor:
    """Return a tensor with zeros after it up to a size along a dimension; itself if it has that size."""
    missing = size - part.shape[dim]
    if missing == 0:
        return part
    shape = list(part.shape)
    shape[dim] = missing
    return torch.cat((part, part.new_zeros(shape)), dim)


def size_without_padding(weight: Tensor) -> int:
    """Return what this rank's slice of a weight has of the dimension that is split, without padding.

    A tensor that no layer here made has no padding.
    """
    whole_size = getattr(weight, "whole_size", None)
    if whole_size is None:
        return weight.shape[0]
    multiple: int = weight.slice_multiple  # type: ignore[attr-defined]
    start, end = slice_bounds(whole_size, get_model_parallel_rank(), get_model_parallel_world_size(), multiple)
    return end - start


def _padded_size(size: int, multiple: int) -> int:
    """Return the size of all tp ranks' slices together."""
    tp_size = get_model_parallel_world_size()
    return slice_size(size, tp_size, multiple) * tp_size


def enter_branch(x: Tensor, split_tokens: bool) -> Tensor:
    """Give every tp rank the whole input of a branch; its gradient is the sum of what the ranks' slices contribute.

    Args:
        x: [N, dim], the same on every tp rank; or with split_tokens this rank's [N / tp_size, dim].
    Returns:
        [N, dim].
    """
    if get_model_parallel_world_size() == 1:
        return x
    return _exchanged(x, _gathered, _scattered) if split_tokens else _exchanged(x, _copied, _summed)


def leave_branch(partial: Tensor, split_tokens: bool) -> Tensor:
    """Sum the ranks' parts [N, dim] of a branch's output; with split_tokens, return this rank's [N / tp_size, dim].

    Source: Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2, for split tokens.
    """
    if get_model_parallel_world_size() == 1:
        return partial
    if split_tokens:
        return _exchanged(partial, _scattered, _gathered)
    return _exchanged(partial, _summed, _copied)


def on_sharded_activations(weight: Tensor) -> Tensor:
    """Return a replicated weight for use on activations of which each tp rank has a different slice.

    Each rank then computes only its slice's part of the weight's gradient, and this sums the parts. Without it the
    ranks' copies of the weight drift apart, although the loss hardly shows it.
    """
    return weight if get_model_parallel_world_size() == 1 else _exchanged(weight, _copied, _summed)


class _Exchange(torch.autograd.Function):
    """Exchanges a tensor among the tp ranks in one way forward, and its gradient in another backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(gradient), None, None


def _exchanged(x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
    result: Tensor = _Exchange.apply(x, there, back)  # type: ignore[no-untyped-call]
    return result


def _copied(x: Tensor) -> Tensor:
    return x.view_as(x)


# torch's functional collectives, by their operators, rather than those of torch.distributed: a compiled block can hold
# them, and their Python wrappers have other names in each version of torch.
_collectives = torch.ops._c10d_functional


def _summed(x: Tensor) -> Tensor:
    group = get_model_parallel_group()
    return _collectives.wait_tensor(_collectives.all_reduce(x.contiguous(), "sum", group.group_name))


def _gathered(x: Tensor) -> Tensor:
    group = get_model_parallel_group()
    parts = _collectives.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name)
    return _collectives.wait_tensor(parts)


def _scattered(x: Tensor) -> Tensor:
    group = get_model_parallel_group()
    part = _collectives.reduce_scatter_tensor(x.contiguous(), "sum", group.size(), group.group_name)
    return _collectives.wait_tensor(part)


def tp_rank() -> int:
    """Return this rank's number among those that share a copy of the model."""
    return int(get_model_parallel_rank())


def tp_size() -> int:
    """Return the number of ranks that share a copy of the model."""
    return int(get_model_parallel_world_size())


def gather_over_tp(x: Tensor) -> Tensor:
    """Return every tp rank's tensor of the same shape, [tp_size, ...], without a gradient."""
    if get_model_parallel_world_size() == 1:
        return x.unsqueeze(0)
    return _gathered(x.unsqueeze(0))


def gather_vocab(logits: Tensor) -> Tensor:
    """Gather the full logits of a few positions, for sampling; never for training.

    Returns:
        [..., vocab_size], followed by those of padding, if there is any.
    """
    return torch.cat(list(gather_over_tp(logits)), dim=-1)
