"""The LLaMA-class transformer: pre-norm RMSNorm, rotary positions, grouped-query attention, SwiGLU.

tokens, segment ids -> final hidden states -> a head's result: logits, or the loss without them (`loss.py`).
Shapes: B rows, T tokens per row, H and K this rank's query and key-value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from pretrain.model.attention import Attend, AttentionBackend, attention_within_pieces
from pretrain.model.checkpointing import checkpointed
from pretrain.model.kv_cache import KVCache
from pretrain.model.lora import LoraConfig, adapted, attach_adapters, draw_adapter, is_adapter
from pretrain.model.loss import all_logits
from pretrain.model.parallel import (
    ColumnLinear,
    RowLinear,
    VocabEmbedding,
    enter_branch,
    full_shape,
    leave_branch,
    on_sharded_activations,
    shard_of,
    slice_bounds,
)
from pretrain.model.pieces import pieces_of
from pretrain.model.rotary import RopeScaling, rotary_angles, rotate
from pretrain.parametrization import MupBase, Scale, Size, scale_of
from pretrain.rng import derive_seed
from pretrain.topology import ParallelConfig
from shards import Config

T = TypeVar("T")

# What to make of the final hidden states [B, T, dim] and this rank's slice [vocab_size / tp_size, dim] of the output
# projection, rounded up: logits, a loss, scores.
Head = Callable[[Tensor, Tensor], T]

Use = Literal["training", "scoring", "uncompiled"]  # of a forward pass

Precision = Literal["bf16", "fp32"]  # type of the weights in the forward and backward pass


class ModelConfig(Config):
    """The architecture. Runs with the same ModelConfig compute the same function of their weights."""

    dim: int = Field(ge=1)  # width of the residual stream
    n_layers: int = Field(ge=1)  # transformer blocks, each with attention and a feed-forward network
    n_heads: int = Field(ge=1)  # query heads; dim / n_heads is the size of a head and must be even
    n_kv_heads: int | None = Field(None, ge=1)  # key and value heads; None: as many as query heads
    ffn_dim: int | None = Field(None, ge=1)  # width of SwiGLU; None: 8/3 dim, rounded up to a multiple of 256
    vocab_size: int = Field(ge=1)  # number of the tokenizer's pieces; tp_size need not divide it
    # Each tp rank's rows of embedding and output are rounded up to a multiple of it, by padding that no token has; GPUs
    # multiply some sizes faster, such as multiples of 64 or 128
    vocab_multiple: int = Field(1, ge=1)
    norm_eps: float = Field(1e-5, gt=0)  # added to the mean square in RMSNorm
    rope_theta: float = Field(10_000.0, gt=0)  # base of the rotary wavelengths
    rope_scaling: RopeScaling | None = None  # as in Llama 3.1 and later, for contexts longer than in pretraining
    qk_norm: bool = False  # RMSNorm on each query and key head, before the rotation
    tie_embeddings: bool = False  # the output projection is the embedding
    dropout: float = Field(0.0, ge=0, lt=1)  # on the embedding and on each branch before it joins the residual stream
    init: Literal["trunc_normal", "normal"] = "trunc_normal"  # trunc_normal: cut at three standard deviations
    init_std: float = Field(0.02, gt=0)  # output projections of both branches get init_std / sqrt(2 n_layers)
    # mup: learning rate and init_std are those of `base`, and are scaled for this model's size
    parametrization: Literal["standard", "mup"] = "standard"
    base: MupBase | None = None  # needed for mup
    lora: LoraConfig | None = None  # trains adapters of the model in init_from, which stays as it is; null: all weights

    @model_validator(mode="after")
    def _has_base(self) -> Self:
        if (self.parametrization == "mup") != (self.base is not None):
            raise ValueError(
                "parametrization: mup needs base, the small model whose settings this one is to share, and standard has"
                " none; set base.dim and base.n_layers, or leave out both"
            )
        return self

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def hidden_dim(self) -> int:
        return self.ffn_dim or -(-(8 * self.dim // 3) // 256) * 256

    def scale_of(self, name: str) -> Scale:
        """Return how a weight begins and learns relative to the standard parametrization, by its name."""
        if self.base is None:
            return Scale()
        ffn_dim = self.base.ffn_dim or self.hidden_dim * self.base.dim / self.dim
        base = Size(self.base.dim, ffn_dim, self.base.n_layers, self.base.head_dim or self.head_dim)
        return scale_of(name, Size(self.dim, self.hidden_dim, self.n_layers, self.head_dim), base, self.qk_norm)

    @property
    def split_sizes(self) -> dict[str, int]:
        """Return the sizes, by key, that tensor parallelism divides: tp_size must divide each of them."""
        return {
            "n_heads": self.n_heads,
            "n_kv_heads": self.kv_heads,
            "ffn_dim": self.hidden_dim,
        }

    def gives_each_rank_tokens(self, tp_size: int) -> bool:
        """Return whether every one of `tp_size` equal slices of the vocabulary, rounded up, has a token."""
        start, end = slice_bounds(self.vocab_size, tp_size - 1, tp_size, self.vocab_multiple)
        return start < end


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in fp32.

    Source: Zhang and Sennrich 2019, arXiv 1910.07467.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor, sharded: bool = False) -> Tensor:
        """Normalize x [..., dim]; `sharded` says whether each tp rank has different activations."""
        weight = on_sharded_activations(self.weight) if sharded else self.weight
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention; each tp rank computes n_heads / tp_size heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.wq = ColumnLinear(config.dim, config.n_heads * config.head_dim)
        self.wk = ColumnLinear(config.dim, config.kv_heads * config.head_dim)
        self.wv = ColumnLinear(config.dim, config.kv_heads * config.head_dim)
        self.wo = RowLinear(config.n_heads * config.head_dim, config.dim)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """Return this rank's part of the output [N, dim] for x [N, dim], where N = B * T."""
        rows, length = cos.shape[:2]
        wq, wk, wv, wo = adapted(self.wq, self.wk, self.wv, self.wo)
        q = wq(x).view(rows, length, -1, self.head_dim)  # [B, T, H, D]
        k = wk(x).view(rows, length, -1, self.head_dim)  # [B, T, K, D]
        v = wv(x).view(rows, length, -1, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q, sharded=True), self.k_norm(k, sharded=True)
        out = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)  # [B, T, H, D]
        return wo(out.reshape(rows * length, -1))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x). Source: Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = ColumnLinear(config.dim, config.hidden_dim)
        self.w3 = ColumnLinear(config.dim, config.hidden_dim)
        self.w2 = RowLinear(config.hidden_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return this rank's part of the output [N, dim] for x [N, dim]."""
        w1, w3, w2 = adapted(self.w1, self.w3, self.w2)
        return w2(F.silu(w1(x)) * w3(x))


class Block(nn.Module):
    """One layer: each branch reads the normalized residual stream and adds to it.

    Checkpointing and compilation happen inside the module and leave out its hooks, with which ZeRO-3 gathers the
    weights before and frees them after.
    """

    def __init__(self, config: ModelConfig, parallel: ParallelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)
        self.sequence_parallel = parallel.sequence_parallel
        train, score = checkpointed(self._compute, parallel.activation_checkpointing), self._compute
        if parallel.compile:
            train, score = torch.compile(train, dynamic=False), torch.compile(score, dynamic=False)
        # Generation is not compiled, since its shapes differ from call to call; nor is a pass that is measured.
        self._computations = {"training": train, "scoring": score, "uncompiled": self._compute}

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, use: Use) -> Tensor:
        """Process the residual stream x [B * T, dim]; of split tokens, this rank's [B * T / tp_size, dim]."""
        return self._computations[use](x, cos, sin, attend)

    def _compute(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        split_tokens = self.sequence_parallel and self.training
        whole = enter_branch(self.attention_norm(x, split_tokens), split_tokens)
        x = x + self.dropout(leave_branch(self.attention(whole, cos, sin, attend), split_tokens))
        whole = enter_branch(self.ffn_norm(x, split_tokens), split_tokens)
        return x + self.dropout(leave_branch(self.feed_forward(whole), split_tokens))


class Output(ColumnLinear):
    """The projection to the vocabulary, which leaves it to a head whether any logits are ever made."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.dim, config.vocab_size, config.vocab_multiple)

    def forward(self, hidden: Tensor, head: Head[T]) -> T:  # type: ignore[override]
        """Return what the head makes of hidden states [B, T, dim]."""
        return head(hidden, self.weight)


class Transformer(nn.Module):
    """The whole model, of which each tp rank holds its slices.

    Args:
        config: the architecture.
        parallel: how it is trained; only memory and speed depend on it.
        attention: attention backend; see `attention.py`.
    """

    def __init__(
        self, config: ModelConfig, parallel: ParallelConfig | None = None, attention: AttentionBackend = "sdpa"
    ) -> None:
        super().__init__()
        parallel = parallel or ParallelConfig()
        self.config = config
        self.attention_backend: AttentionBackend = attention
        self.sequence_parallel = parallel.sequence_parallel
        self.embedding = VocabEmbedding(config.vocab_size, config.dim, config.vocab_multiple)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, parallel) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = Output(config)
        if config.tie_embeddings:
            # One parameter in two layers, since both split the vocabulary the same way
            self.output.weight = self.embedding.weight
        if config.lora:
            attach_adapters(self, config.lora)

    def forward(
        self,
        tokens: Tensor,
        segment_ids: Tensor | None = None,
        head: Head[Any] = all_logits,
        cache: KVCache | None = None,
    ) -> Any:
        """Predict each next token.

        Args:
            tokens: [B, T] int64.
            segment_ids: [B, T] int64 on the host; neighbours that are equal but for their sign belong to one piece, 0
                is padding. Needed without a cache.
            head: what to make of the predictions; the default makes this rank's slice of the logits,
                [B, T, vocab_size / tp_size], in the weights' type.
            cache: cache of the preceding tokens, to which these are added; each row is then one piece.
        Returns:
            The head's result.
        """
        config, split_tokens = self.config, self.sequence_parallel and self.training
        use: Use = "training" if self.training else "scoring" if cache is None else "uncompiled"
        if cache is None:
            assert segment_ids is not None
            pieces = pieces_of(segment_ids, tokens.device)
            attends = [attention_within_pieces(pieces, self.attention_backend)] * config.n_layers
            positions = pieces.positions
        else:
            attends, positions = cache.attends, cache.positions(tokens)
        cos, sin = rotary_angles(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        x = self.dropout(leave_branch(self.embedding(tokens.flatten()), split_tokens))
        if config.lora and torch.is_grad_enabled():
            x.requires_grad_()  # or ZeRO-3 would take the first block's gradients before they are computed
        for block, attend in zip(self.blocks, attends, strict=True):
            x = block(x, cos, sin, attend, use)
        if cache is not None:
            cache.advance(tokens.shape[1])
        hidden = enter_branch(self.norm(x, split_tokens), split_tokens)
        return self.output(hidden.view(*tokens.shape, config.dim), head)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Draw every matrix from its own generator, seeded by its name, so that every tp_size gets the same weights."""
        layers = self.config.base.n_layers if self.config.base else self.config.n_layers
        for name, parameter in self.named_parameters():
            scale = self.config.scale_of(name).init
            if parameter.dim() < 2:
                parameter.fill_(scale)
                continue
            std = self.config.init_std * scale
            if name.endswith(("attention.wo.weight", "feed_forward.w2.weight")):
                std /= (2 * layers) ** 0.5
            generator = torch.Generator(parameter.device).manual_seed(derive_seed(seed, "init", name))
            full = torch.empty(full_shape(parameter), device=parameter.device)
            if is_adapter(name):
                draw_adapter(name, full, generator)
            elif self.config.init == "trunc_normal":
                nn.init.trunc_normal_(full, std=std, a=-3 * std, b=3 * std, generator=generator)
            else:
                nn.init.normal_(full, std=std, generator=generator)
            parameter.copy_(shard_of(full, parameter))
