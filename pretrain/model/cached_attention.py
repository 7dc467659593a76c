"""Attention of new tokens to all that came before them, without a mask: kv_cache -> cached_attention.

A mask of a few thousand queries over a long document would take more memory than its keys. None is needed: of what came
before, every new token sees all, and among the new ones each sees those up to itself. Both parts are computed by
PyTorch's kernels and merged by the sums of their softmax. B rows, T new tokens, S tokens in all, H query heads, K
key-value heads, D head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten

_BLOCK_TOKENS = 4096  # tokens whose keys and values are converted together, where they are kept in another type


def cached_attention(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend from each of the last T of S tokens to those up to itself.

    Args:
        q: [B, T, H, D].
        keys, values: [B, K, S, D] of all tokens, in any type; they are read in that of q, which is computed in.
    Returns:
        [B, T, H, D].
    """
    rows, count, n_heads, head_dim = q.shape
    n_kv_heads, before = keys.shape[1], keys.shape[2] - q.shape[1]
    heads = q.transpose(1, 2)
    # Where nothing is masked, the queries of all heads that share a key head are like queries of one head
    grouped = heads.reshape(rows, n_kv_heads, -1, head_dim)
    if count == 1:
        out = _over_blocks(grouped, keys, values)[0]
    else:
        repeats = n_heads // n_kv_heads
        k, v = (x[:, :, before:].to(q.dtype).repeat_interleave(repeats, dim=1) for x in (keys, values))
        out, sums = _with_logsumexp(heads, k, v, is_causal=True)
        if before:
            earlier, earlier_sums = _over_blocks(grouped, keys[:, :, :before], values[:, :, :before])
            out = _merged(earlier.reshape(out.shape), earlier_sums.reshape(sums.shape), out, sums)[0]
    return out.reshape(rows, n_heads, count, head_dim).transpose(1, 2).to(q.dtype)


def _over_blocks(q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Attend to all tokens; where their type is not that of q, to a block after another, each converted by itself.

    Args:
        q: [B, K, N, D], for any number of queries N.
        keys, values: [B, K, S, D].
    Returns:
        The output [B, K, N, D], and the logsumexp of each query's scores, [B, K, N] fp32.
    """
    if keys.dtype == q.dtype:
        return _with_logsumexp(q, keys, values)
    found: tuple[Tensor, Tensor] | None = None
    for start in range(0, keys.shape[2], _BLOCK_TOKENS):
        block = slice(start, start + _BLOCK_TOKENS)
        part = _with_logsumexp(q, keys[:, :, block].to(q.dtype), values[:, :, block].to(q.dtype))
        found = part if found is None else _merged(*found, *part)
    assert found is not None
    return found


def _merged(out: Tensor, sums: Tensor, other: Tensor, other_sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return the attention to two sets of tokens together, given that to each with its logsumexp; in fp32.

    Source: Milakov and Gimelshein 2018, arXiv 1805.02867, section 3, the softmax of two parts.
    """
    share = torch.sigmoid(other_sums - sums).unsqueeze(-1)  # of the softmax that falls on the other's tokens
    return torch.lerp(out.float(), other.float(), share), torch.logaddexp(sums, other_sums)


def _with_logsumexp(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> tuple[Tensor, Tensor]:
    """Compute attention [B, H, N, D] over keys and values [B, H, S, D], and each query's logsumexp [B, H, N] fp32.

    On CUDA by FlashAttention where it has a kernel, else by the one that PyTorch calls memory-efficient.
    """
    if q.device.type == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=is_causal)
    head_dim, scale = q.shape[-1], q.shape[-1] ** -0.5
    if head_dim % 8:  # the kernels' vectors; zeros add nothing to any product
        q, k, v = (F.pad(x, (0, -head_dim % 8)) for x in (q, k, v))
    if q.dtype == torch.bfloat16 and head_dim <= 256 and torch.cuda.get_device_capability(q.device) >= (8, 0):
        out, sums = _aten._scaled_dot_product_flash_attention(q, k, v, is_causal=is_causal, scale=scale)[:2]
    else:
        out, sums = _aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, is_causal, scale=scale)[:2]
    return out[..., :head_dim], sums[:, :, : q.shape[2]]  # whose rows are padded too
