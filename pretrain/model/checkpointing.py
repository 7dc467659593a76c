"""What a block keeps of its forward pass for the backward pass, and what it computes again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from pretrain.model import piece_attention, swiglu  # noqa: F401  # they register their operators
from pretrain.parallel_config import Checkpointing

# Costly to compute again for what they take to keep: matrix products, attention, and whatever waits for other ranks.
_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.headrace.piece_attention.default,
    torch.ops.headrace.swiglu.default,
    torch.ops.higher_order.flex_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops._c10d_functional.all_reduce.default,
    torch.ops._c10d_functional.all_gather_into_tensor.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_to_all_single.default,
    torch.ops._c10d_functional.wait_tensor.default,
}


def checkpointed(compute: Callable[..., Tensor], what: Checkpointing) -> Callable[..., Tensor]:
    """Return a function that computes what a block's does and keeps less of it for the backward pass.

    Args:
        what: "none" keeps all that the gradients need, "selective" what is costly to compute again, "full" only the
            block's input.
    """
    if what == "none":
        return compute
    if what == "full":
        return functools.partial(checkpoint, compute, use_reentrant=False)
    selected = functools.partial(create_selective_checkpoint_contexts, _policy)
    return functools.partial(checkpoint, compute, use_reentrant=False, context_fn=selected)


def _policy(_context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
