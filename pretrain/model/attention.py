"""Attention within documents: a row holds several pieces, and a token sees only its own piece, from the piece's start.

Two backends with the same result: SDPA with a mask (any device) and FlexAttention (CUDA), which skips the blocks of
the row-by-row mask in which no token may see another.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from pretrain.topology import ParallelConfig, Topology
from shards import Config, ConfigError

# q [B, n_heads, T, head_dim], k and v [B, n_kv_heads, T, head_dim] -> [B, n_heads, T, head_dim]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
AttentionBackend = Literal["sdpa", "flex"]


def positions_in_pieces(segment_ids: Tensor) -> Tensor:
    """Return each token's position within its piece, from 0. segment_ids [B, T] -> [B, T] int64."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def valid_targets(segment_ids: Tensor) -> Tensor:
    """Mark the next tokens that are targets: those of the same piece. segment_ids [B, T + 1] -> [B, T] bool."""
    return (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, :-1] > 0)


def attention_backend(parallel: ParallelConfig, topology: Topology, head_dim: int) -> AttentionBackend:
    """Resolve the attention that a config asks for. Raises ConfigError if this device cannot run it."""
    fits = topology.device.type == "cuda" and head_dim >= 16
    if parallel.attention == "flex" and not fits:
        raise ConfigError(
            f"parallel.attention=flex needs CUDA and heads of at least 16, not {topology.device.type} and {head_dim};"
            " use auto"
        )
    if parallel.attention != "auto":
        return parallel.attention
    return "flex" if fits else "sdpa"


def attention_within_pieces(segment_ids: Tensor, backend: AttentionBackend) -> Attend:
    """Return causal attention that stays within a piece; made once per forward pass, used by every block.

    Args:
        segment_ids: [B, T]; padding (0) attends to padding, so that its rows stay finite.
        backend: "flex" compiles at its first use and needs CUDA.
    """
    if backend == "flex":
        return _flex_attention(segment_ids)
    length = segment_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()
    mask = (segment_ids.unsqueeze(2) == segment_ids.unsqueeze(1)) & causal  # [B, T (query), T (key)]
    mask = mask.unsqueeze(1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

    return attend


def _flex_attention(segment_ids: Tensor) -> Attend:
    def visible(batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (segment_ids[batch, query] == segment_ids[batch, key])

    rows, length = segment_ids.shape
    mask = _compiled(create_block_mask)(visible, rows, None, length, length, device=segment_ids.device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _compiled(flex_attention)(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

    return attend


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


class RopeScaling(Config):
    """Slower rotations for long wavelengths, so that a model trained on short contexts can be trained on long ones.

    The keys are those in a config.json of Llama 3.1.
    """

    rope_type: Literal["llama3"] = "llama3"  # the only supported method, named as in config.json
    factor: float = Field(gt=1)  # factor by which the longest wavelengths grow
    low_freq_factor: float = Field(1.0, gt=0)  # wavelengths above the original length / this grow by the full factor
    high_freq_factor: float = Field(4.0, gt=0)  # wavelengths below the original length / this do not change
    original_max_position_embeddings: int = Field(8192, ge=1)  # context length before scaling, in tokens

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor} must be above low_freq_factor={self.low_freq_factor}"
            )
        return self

    def scaled(self, frequencies: Tensor) -> Tensor:
        """Scale frequencies in radians per token, of any shape; between the two bounds the scale changes linearly.

        Source: Llama 3.1's reference code; Grattafiori et al. 2024, arXiv 2407.21783, section 3.4.2.
        """
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)  # turns within the original context
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


def rotary_angles(
    positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of RoPE, [B, 1, T, head_dim] fp32, the same for both halves of a head.

    Computed from the positions rather than kept as a buffer: casting a model to bf16 would round a buffer too, and
    bf16 cannot tell position 2049 from 2050.

    Source: Su et al. 2021, arXiv 2104.09864, in the "rotate half" layout of the Hugging Face checkpoints.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    frequencies = theta**-exponents
    if scaling:
        frequencies = scaling.scaled(frequencies)
    angles = positions.unsqueeze(-1).float() * frequencies
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to x [B, heads, T, head_dim] in fp32; the result has x's type."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
