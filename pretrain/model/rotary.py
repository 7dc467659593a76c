"""Rotary position embedding (RoPE), and its scaling for contexts longer than in pretraining."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BeforeValidator, Discriminator, Field, model_validator
from torch import Tensor

from shards import Config


class _Scaling(Config, ABC):
    """A change of RoPE's frequencies and of the length of what it rotates."""

    @abstractmethod
    def scaled(self, frequencies: Tensor, theta: float) -> Tensor:
        """Scale the frequencies [head_dim / 2] in radians per token, which fall from 1 to about 1 / theta."""

    @property
    def amplitude(self) -> float:
        """Return the factor of cosines and sines, and so of queries and keys."""
        return 1.0


class LinearScaling(_Scaling):
    """All rotations slower by one factor, as if positions lay closer together: Chen et al. 2023, arXiv 2306.15595."""

    rope_type: Literal["linear"] = "linear"  # chooses these keys, as in config.json
    factor: float = Field(gt=1)  # factor by which all wavelengths grow

    def scaled(self, frequencies: Tensor, theta: float) -> Tensor:
        """Scale all frequencies alike."""
        return frequencies / self.factor


class Llama3Scaling(_Scaling):
    """Slower rotations for long wavelengths, as Llama 3.1 and later have them, with the keys of their config.json."""

    rope_type: Literal["llama3"] = "llama3"  # chooses these keys; a section without it is of this type
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

    def scaled(self, frequencies: Tensor, theta: float) -> Tensor:
        """Scale frequencies; between the two bounds the scale changes linearly with the frequency.

        Source: Llama 3.1's reference code; Grattafiori et al. 2024, arXiv 2407.21783, section 3.4.2.
        """
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)  # turns within the original context
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


class YarnScaling(_Scaling):
    """YaRN: slower rotations for long wavelengths and longer queries and keys: Peng et al. 2023, arXiv 2309.00071.

    The keys are those of config.json.
    """

    rope_type: Literal["yarn"] = "yarn"  # chooses these keys
    factor: float = Field(gt=1)  # factor by which the longest wavelengths grow
    original_max_position_embeddings: int = Field(ge=1)  # context length before scaling, in tokens
    beta_fast: float = Field(32.0, gt=0)  # what turns more often within the original length does not change
    beta_slow: float = Field(1.0, gt=0)  # what turns less often grows by the full factor
    # Factor of cosines and sines; None: 0.1 ln(factor) + 1 or, of a model with mscale, (0.1 mscale ln(factor) + 1)
    # divided by the same with mscale_all_dim
    attention_factor: float | None = Field(None, gt=0)
    mscale: float | None = Field(None, gt=0)  # see attention_factor
    mscale_all_dim: float | None = Field(None, gt=0)  # see attention_factor
    truncate: bool = True  # round the bounds that follow from beta_fast and beta_slow to whole pairs of a head

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast={self.beta_fast} must be above beta_slow={self.beta_slow}")
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ValueError("mscale and mscale_all_dim are the two parts of a quotient; set both, or neither")
        return self

    @property
    def amplitude(self) -> float:
        """Return the factor of cosines and sines."""
        if self.attention_factor is not None:
            return self.attention_factor
        log = 0.1 * math.log(self.factor)
        if self.mscale is None or self.mscale_all_dim is None:
            return log + 1
        return (self.mscale * log + 1) / (self.mscale_all_dim * log + 1)

    def scaled(self, frequencies: Tensor, theta: float) -> Tensor:
        """Scale frequencies; between the two bounds the scale changes linearly with the place of a pair in the head.

        Source: Peng et al. 2023, section 3.2, with the bounds in whole pairs as transformers has them.
        """
        pairs = len(frequencies)

        def place(turns: float) -> float:
            """Return the pair, counted from 0, that turns so often within the original length."""
            return pairs * math.log(self.original_max_position_embeddings / (2 * math.pi * turns)) / math.log(theta)

        first, last = place(self.beta_fast), place(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * pairs - 1)
        width = last - first or 0.001  # a step, if the bounds are one
        slowed = ((torch.arange(pairs, device=frequencies.device) - first) / width).clamp(0, 1)
        return frequencies * (1 - slowed + slowed / self.factor)


def _named(values: Any) -> Any:
    # Configs and checkpoints from before there was a choice may name none
    return {"rope_type": "llama3", **values} if isinstance(values, Mapping) else values


RopeScaling = Annotated[
    LinearScaling | Llama3Scaling | YarnScaling, Discriminator("rope_type"), BeforeValidator(_named)
]


def rotary_angles(
    positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of RoPE, [B, T, 1, head_dim / 2] fp32: of one half of a head, equal for the other.

    Those of a scaling with an amplitude are multiplied by it.

    Computed from the positions rather than kept as a buffer: casting a model to bf16 would round a buffer too, and
    bf16 cannot tell position 2049 from 2050.

    Source: Su et al. 2021, arXiv 2104.09864, in the "rotate half" layout of the Hugging Face checkpoints.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    frequencies = theta**-exponents
    if scaling:
        frequencies = scaling.scaled(frequencies, theta)
    angles = positions[:, :, None, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return (cos * scaling.amplitude, sin * scaling.amplitude) if scaling and scaling.amplitude != 1 else (cos, sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to x [B, T, heads, head_dim] in fp32; the result has x's type."""
    rotated: Tensor = _Rotation.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return rotated


class _Rotation(torch.autograd.Function):
    """A rotation, whose gradient is the rotation back with the same amplitude; op by op it takes twice the time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    pairs = ((first, second, -direction), (second, first, direction))
    # One half after the other, so that only one exists in fp32: of long rows that is as much as all of x
    return torch.cat([(a * cos).addcmul_(b, sin, value=sign).to(x.dtype) for a, b, sign in pairs], dim=-1)
