"""Rotary position embedding (RoPE), and its scaling for contexts longer than in pretraining."""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from shards import Config


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
    """Return the cosines and sines of RoPE, [B, T, 1, head_dim / 2] fp32: of one half of a head, equal for the other.

    Computed from the positions rather than kept as a buffer: casting a model to bf16 would round a buffer too, and
    bf16 cannot tell position 2049 from 2050.

    Source: Su et al. 2021, arXiv 2104.09864, in the "rotate half" layout of the Hugging Face checkpoints.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    frequencies = theta**-exponents
    if scaling:
        frequencies = scaling.scaled(frequencies)
    angles = positions[:, :, None, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to x [B, T, heads, head_dim] in fp32; the result has x's type."""
    rotated: Tensor = _Rotation.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return rotated


class _Rotation(torch.autograd.Function):
    """A rotation, whose gradient is the rotation back; traced op by op, it would take twice the time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    first, second = (half.float() for half in x.chunk(2, dim=-1))
    halves = (
        (first * cos).addcmul_(second, sin, value=-direction),
        (second * cos).addcmul_(first, sin, value=direction),
    )
    return torch.cat([half.to(x.dtype) for half in halves], dim=-1)
