"""Scale initial weights and learning rates with a model's size, so that what suits a small one suits a large one.

LlamaConfig -> parametrization -> {initialization, parameter groups}. The maximal-update parametrization is usually
written with multipliers in the forward pass: on the attention logits, each branch's output and the model's output.
AdamW's updates do not depend on the scale of gradients, so a multiplier on what a weight is applied to is the same as
one on its initial values and its learning rate (Yang et al. 2022, appendix J.2.1). Here all multipliers are moved into
weights that way. The function that a model computes of its weights is thus the standard one, and so are its checkpoints
and exports.

Sources: muP for width, Yang et al. 2022, arXiv 2203.03466, table 3; CompleteP for depth, Dey et al. 2025,
arXiv 2505.01618, table 1 with alpha = 1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pydantic import Field

from shards import Config

_INTO_BRANCH = re.compile(r"(attention\.w[qkv]|feed_forward\.w[13])\.weight$")
_OUT_OF_BRANCH = re.compile(r"(attention\.wo|feed_forward\.w2)\.weight$")


class MupBase(Config):
    """The small model whose settings are to hold for this one; at its own size, mup is the standard parametrization."""

    dim: int = Field(ge=1)  # its width
    ffn_dim: int | None = Field(None, ge=1)  # its width of SwiGLU; None: in the same proportion to dim as this model's
    n_layers: int = Field(ge=1)  # its depth
    head_dim: int | None = Field(None, ge=1)  # size of its heads; None: the same as this model's


@dataclass(frozen=True)
class Size:
    """What the scales of a model's weights depend on."""

    dim: int
    ffn_dim: float
    n_layers: int
    head_dim: int


@dataclass(frozen=True)
class Scale:
    """How a weight begins and learns, relative to the standard parametrization of the base model.

    Attributes:
        init: factor of the standard deviation of its initial values; of a norm's weight, its initial value.
        learning_rate: factor of the learning rate. Weight decay is divided by it, so that a weight decays as fast as
            the base model's.
        width: of a matrix in a block, its width relative to the base's.
    """

    init: float = 1.0
    learning_rate: float = 1.0
    width: float = 1.0

    @property
    def muon_learning_rate(self) -> float:
        """Return the factor of the learning rate if Muon trains the weight.

        Muon's update has the root mean square of AdamW's, but spreads over as many singular values as the matrix is
        wide, where AdamW's gathers in a few; so the largest of them, which decides what the update does to the
        activations, grows with the root of the width and not with the width.
        Source: Yang, Simon and Bernstein 2023, arXiv 2310.17813.
        """
        return self.learning_rate * self.width**0.5


def scale_of(name: str, model: Size, base: Size, qk_norm: bool) -> Scale:
    """Return the scale of a weight.

    Args:
        name: its name in `Transformer`.
        qk_norm: whether queries are normalized, so that the norm's weight scales the attention logits.
    """
    width, depth = model.dim / base.dim, model.n_layers / base.n_layers
    # A logit is a sum over a head's size; standard is 1 / sqrt(head_dim), and 1 / head_dim keeps it the same size.
    logits = (base.head_dim / model.head_dim) ** 0.5
    if name == "norm.weight":
        return Scale(1 / width, 1 / width)  # of the output's multiplier, which is thus on tied embeddings too
    if _OUT_OF_BRANCH.search(name):
        summed = model.ffn_dim / base.ffn_dim if name.endswith("w2.weight") else width
        return Scale(summed**-0.5 / depth, 1 / (summed * depth), width)  # of the branch's multiplier, 1 / depth
    if _INTO_BRANCH.search(name):
        multiplier = logits if name.endswith("wq.weight") and not qk_norm else 1.0
        return Scale(width**-0.5 * multiplier, multiplier / width, width)
    if name.endswith("q_norm.weight"):
        return Scale(logits, logits)
    return Scale()
