"""The LLaMA-class transformer: pre-norm RMSNorm, rotary positions, grouped-query attention, SwiGLU.

tokens, segment ids -> final hidden states -> a head's result: logits, or the loss without them (`loss.py`).
Shapes: B rows, T tokens per row on this rank, H and K this rank's query and key-value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from pretrain.model.architecture import BlockCosts, Head, Heads, Layout, Model, ModelConfig, Use, WeightSpec
from pretrain.model.attention import Attend, AttentionBackend, attention_within_pieces
from pretrain.model.attention_figures import TransformerMeasurement
from pretrain.model.kv_cache import KVCache
from pretrain.model.layers import Distribution, Output, RMSNorm, computations, draw
from pretrain.model.lora import LoraConfig, adapted, attach_adapters, drawn_adapter, is_adapter
from pretrain.model.loss import all_logits
from pretrain.model.parallel import (
    ColumnLinear,
    RowLinear,
    VocabEmbedding,
    enter_branch,
    full_shape,
    leave_branch,
    shard_of,
)
from pretrain.model.pieces import pieces_of
from pretrain.model.rotary import RopeScaling, YarnScaling, rotary_angles, rotate
from pretrain.model.sequence import over_whole_rows, own_part
from pretrain.model.swiglu import tiled_swiglu
from pretrain.model.transformer_costs import block_costs
from pretrain.parallel_config import ParallelConfig
from pretrain.parametrization import MupBase, Scale, Size, scale_of
from pretrain.topology import Topology
from shards.config_errors import not_divisible


class LlamaConfig(ModelConfig):
    """A LLaMA: blocks of attention with rotary positions and a feed-forward network with SwiGLU, after RMSNorm."""

    COMPUTES: ClassVar = (
        *ModelConfig.COMPUTES, "n_heads", "n_kv_heads", "ffn_dim", "norm_eps", "rope_theta", "rope_scaling", "qk_norm",
    )  # fmt: skip
    LAYOUTS: ClassVar[tuple[Layout, ...]] = ("hf", "meta", "headrace")
    POSITIONS: ClassVar = ("rope_theta", "rope_scaling")
    SPLITS: ClassVar = True
    SPLITS_ROWS: ClassVar = True
    TILES: ClassVar = True

    architecture: Literal["llama"] = "llama"  # chooses these keys; a model without it is a LLaMA
    n_heads: int = Field(ge=1)  # query heads; dim / n_heads is the size of a head and must be even
    n_kv_heads: int | None = Field(None, ge=1)  # key and value heads; None: as many as query heads
    ffn_dim: int | None = Field(None, ge=1)  # width of SwiGLU; None: 8/3 dim, rounded up to a multiple of 256
    norm_eps: float = Field(1e-5, gt=0)  # added to the mean square in RMSNorm
    rope_theta: float = Field(10_000.0, gt=0)  # base of the rotary wavelengths
    rope_scaling: RopeScaling | None = None  # slower rotations, for contexts longer than in pretraining
    qk_norm: bool = False  # RMSNorm on each query and key head, before the rotation
    # Share of the attention's weights that are set to 0 in training; costs time and memory, see docs/models.md
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    init: Distribution = "trunc_normal"  # trunc_normal: cut at three standard deviations
    init_std: float = Field(0.02, gt=0)  # output projections of both branches get init_std / sqrt(2 n_layers)
    # mup: learning rate and init_std are those of `base`, and are scaled for this model's size
    parametrization: Literal["standard", "mup"] = "standard"
    base: MupBase | None = None  # needed for mup
    lora: LoraConfig | None = None  # trains adapters of the model in init_from, which stays as it is; None: all weights

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

    def make(self, parallel: ParallelConfig, attention: AttentionBackend) -> Transformer:
        """Make this rank's slices of the model; see `ModelConfig`."""
        return Transformer(self, parallel, attention)

    def layer_specs(self) -> dict[str, WeightSpec]:
        """List all weights between embedding and output."""
        dim, head_dim, hidden = self.dim, self.head_dim, self.hidden_dim
        queries, keys = self.n_heads * head_dim, self.kv_heads * head_dim
        block = {
            "attention_norm": WeightSpec((dim,)),
            "attention.wq": WeightSpec((queries, dim), 0),
            "attention.wk": WeightSpec((keys, dim), 0),
            "attention.wv": WeightSpec((keys, dim), 0),
            "attention.wo": WeightSpec((dim, queries), 1),
            "ffn_norm": WeightSpec((dim,)),
            "feed_forward.w1": WeightSpec((hidden, dim), 0),
            "feed_forward.w3": WeightSpec((hidden, dim), 0),
            "feed_forward.w2": WeightSpec((dim, hidden), 1),
        }
        if self.qk_norm:
            block |= {"attention.q_norm": WeightSpec((head_dim,)), "attention.k_norm": WeightSpec((head_dim,))}
        blocks = [(f"blocks.{layer}.{name}", spec) for layer in range(self.n_layers) for name, spec in block.items()]
        return {f"{name}.weight": spec for name, spec in [*blocks, ("norm", WeightSpec((dim,)))]}

    def new_cache(self, max_length: int, dtype: torch.dtype | None = None) -> KVCache:
        """Make an empty cache of keys and values."""
        return KVCache(self.n_layers, max_length, dtype)

    @property
    def cached_numbers(self) -> int:
        """Return how many numbers of a token's keys and values a cache keeps, over all layers and tp ranks."""
        return 2 * self.n_layers * self.kv_heads * self.head_dim

    @property
    def logit_variance(self) -> float:
        """Return the variance of a logit of a drawn model.

        The last norm leaves activations of length sqrt(dim) times its weight, so logits are independent and normally
        distributed with variance dim * (weight * init_std)^2.
        """
        return self.dim * (self.scale_of("norm.weight").init * self.init_std) ** 2

    @property
    def heads(self) -> Heads:
        """Return the heads of a layer's attention."""
        return Heads(self.n_heads, self.kv_heads, self.head_dim, self.attention_dropout)

    @property
    def dropouts(self) -> Mapping[str, float]:
        """Return the shares that are dropped in training, by key."""
        of_adapters = self.lora.dropout if self.lora else 0.0
        return {**super().dropouts, "attention_dropout": self.attention_dropout, "lora.dropout": of_adapters}

    @property
    def adapters(self) -> LoraConfig | None:
        """Return the adapters that are trained, if any."""
        return self.lora

    def merged(self) -> Self:
        """Return the config without adapters."""
        return self.model_copy(update={"lora": None})

    @property
    def split_sizes(self) -> Mapping[str, int]:
        """Return the sizes, by key, that tensor parallelism divides: tp_size must divide each of them."""
        return {"n_heads": self.n_heads, "n_kv_heads": self.kv_heads, "ffn_dim": self.hidden_dim}

    def problems(self) -> Iterator[str]:
        """Yield what cannot work in the sizes of heads, and with adapters."""
        yield from not_divisible("model.dim", self.dim, "model.n_heads", self.n_heads)
        if self.dim % self.n_heads == 0 and self.head_dim % 2:
            yield (
                f"model.dim={self.dim} / model.n_heads={self.n_heads} gives heads of size {self.head_dim}; "
                "rotary positions need an even head size"
            )
        yield from not_divisible("model.n_heads", self.n_heads, "model.n_kv_heads", self.kv_heads)
        if isinstance(self.rope_scaling, YarnScaling) and self.rope_theta <= 1:
            yield f"model.rope_theta={self.rope_theta} must be above 1 for model.rope_scaling.rope_type=yarn"
        if self.lora and self.parametrization == "mup":
            yield (
                "model.lora: parametrization=mup scales the learning rates of weights that adapters leave as they are;"
                " set parametrization: standard, under which the model in init_from computes the same"
            )

    def scale_of(self, name: str) -> Scale:
        """Return how a weight begins and learns relative to the standard parametrization, by its name."""
        if self.base is None:
            return Scale()
        ffn_dim = self.base.ffn_dim or self.hidden_dim * self.base.dim / self.dim
        base = Size(self.base.dim, ffn_dim, self.base.n_layers, self.base.head_dim or self.head_dim)
        return scale_of(name, Size(self.dim, self.hidden_dim, self.n_layers, self.head_dim), base, self.qk_norm)

    def products_of(self, squared_lengths: int) -> int:
        """Count the multiplications of attention: the causal half of each document's products, scores and values."""
        return self.n_layers * self.n_heads * self.head_dim * squared_lengths

    def block_costs(self, parallel: ParallelConfig, seq_len: int, bytes_per_weight: int) -> BlockCosts:
        """Return what a block costs; it depends on the rows' length where attention has dropout."""
        heads, qk_norm, lora = self.heads, self.qk_norm, self.lora
        return block_costs(self.dim, self.hidden_dim, heads, qk_norm, lora, parallel, seq_len, bytes_per_weight)

    def spelled_out(self) -> dict[str, Any]:
        """Return all values as JSON has them, with the number of key-value heads and SwiGLU's width."""
        return self.model_dump(mode="json") | {"n_kv_heads": self.kv_heads, "ffn_dim": self.hidden_dim}

    def describe(self) -> str:
        """Describe the model's shape for a reader."""
        heads = f"{self.n_heads} heads, {self.kv_heads} for keys and values"
        return f"{self.n_layers} layers of dim {self.dim}, {heads}"


class Attention(nn.Module):
    """Grouped-query attention; each tp rank computes n_heads / tp_size heads."""

    def __init__(self, config: LlamaConfig) -> None:
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
    """SwiGLU: w2(silu(w1 x) * w3 x). Source: Shazeer 2020, arXiv 2002.05202.

    Args:
        tokens: how many go through it at once; None: all.
    """

    def __init__(self, config: LlamaConfig, tokens: int | None) -> None:
        super().__init__()
        self.tokens = tokens
        self.w1 = ColumnLinear(config.dim, config.hidden_dim)
        self.w3 = ColumnLinear(config.dim, config.hidden_dim)
        self.w2 = RowLinear(config.hidden_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return this rank's part of the output [N, dim] for x [N, dim]."""
        if self.tokens is None:
            return self._of(x)
        if torch.is_grad_enabled():
            return tiled_swiglu(x, self.w1.weight, self.w3.weight, self.w2.weight, self.tokens)
        out = torch.empty_like(x)
        for part, tile in zip(torch.split(out, self.tokens), torch.split(x, self.tokens), strict=True):
            part.copy_(self._of(tile))  # by the layers, which may be measured
        return out

    def _of(self, x: Tensor) -> Tensor:
        w1, w3, w2 = adapted(self.w1, self.w3, self.w2)
        return w2(F.silu(w1(x)) * w3(x))


class Block(nn.Module):
    """One layer: each branch reads the normalized residual stream and adds to it."""

    def __init__(self, config: LlamaConfig, parallel: ParallelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config, parallel.feed_forward_tokens)
        self.dropout = nn.Dropout(config.dropout)
        self.sequence_parallel = parallel.sequence_parallel
        self._computations = computations(self._compute, parallel)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, use: Use) -> Tensor:
        """Process the residual stream x [B * T, dim]; of split tokens, this rank's [B * T / tp_size, dim]."""
        return self._computations[use](x, cos, sin, attend)

    def _compute(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        split_tokens = self.sequence_parallel and self.training
        whole = enter_branch(self.attention_norm(x, split_tokens), split_tokens)
        x = x + self.dropout(leave_branch(self.attention(whole, cos, sin, attend), split_tokens))
        whole = enter_branch(self.ffn_norm(x, split_tokens), split_tokens)
        return x + self.dropout(leave_branch(self.feed_forward(whole), split_tokens))


class Transformer(Model):
    """The whole model, of which each tp rank holds its slices.

    Args:
        config: the architecture.
        parallel: how it is trained; only memory and speed depend on it.
        attention: attention backend; see `attention.py`.
    """

    def __init__(
        self, config: LlamaConfig, parallel: ParallelConfig | None = None, attention: AttentionBackend = "sdpa"
    ) -> None:
        super().__init__()
        parallel = parallel or ParallelConfig()
        self.config: LlamaConfig = config
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
        """Predict each next token; see `Model`."""
        config, split_tokens = self.config, self.sequence_parallel and self.training
        use = self.use_with(cache)
        if cache is None:
            assert segment_ids is not None
            pieces = pieces_of(segment_ids, tokens.device)
            dropout = config.attention_dropout if self.training else 0.0
            attend = attention_within_pieces(pieces, self.attention_backend, dropout)
            attends = [over_whole_rows(attend)] * config.n_layers
            tokens, positions = own_part(tokens), own_part(pieces.positions)
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
        for name, parameter in self.named_parameters():
            full = initial_weight(name, full_shape(parameter), self.config, seed, parameter.device)
            parameter.copy_(shard_of(full, parameter))

    def measurement(self, topology: Topology) -> TransformerMeasurement:
        """Return what measures the layers, with their attention and SwiGLU."""
        return TransformerMeasurement(self.blocks, self.config.hidden_dim, topology)


def initial_weight(
    name: str, shape: Sequence[int], config: LlamaConfig, seed: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Return the whole initial value of a weight of this name and shape, in fp32."""
    if is_adapter(name):
        return drawn_adapter(name, shape, seed, device)
    scale = config.scale_of(name).init
    if len(shape) < 2:
        return torch.full(tuple(shape), scale, device=device)
    std = config.init_std * scale
    if name.endswith(("attention.wo.weight", "feed_forward.w2.weight")):
        std /= (2 * (config.base or config).n_layers) ** 0.5
    return draw(name, shape, std, seed, device, config.init)
