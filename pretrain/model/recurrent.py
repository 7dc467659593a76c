"""A recurrent model: each layer carries a context vector of fixed size from token to token.

tokens, segment ids -> final hidden states -> a head's result. A layer reads the stream x_t, blends what it makes of it
into its context h_t, and a feed-forward network of the context adds to the stream:

    h_t = a_t * h_{t-1} + (1 - a_t) * u_t,  a_t = sigmoid(gate(norm(x_t))),  u_t = candidate(norm(x_t))
    x_t + w2(silu(w1(norm(h_t))))

Gates depend on the stream alone and not on the context before, so all tokens of a row are computed together, by a scan;
a piece begins without a context. The form of the recurrence is that of Martin and Cundy 2018, arXiv 1709.04057.
Shapes: B rows, T tokens per row, C context_dim.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pretrain.model.activations import ActivationMeasurement, sums
from pretrain.model.architecture import BlockCosts, Head, Model, ModelConfig, Use, WeightSpec
from pretrain.model.attention import AttentionBackend
from pretrain.model.layers import Output, RMSNorm, computations, draw
from pretrain.model.loss import all_logits
from pretrain.model.parallel import VocabEmbedding, full_shape, shard_of
from pretrain.model.pieces import pieces_of
from pretrain.parallel_config import ParallelConfig
from pretrain.topology import Topology

_MEMORIES = (1.2, 32.0)  # tokens over which the first and the last number of a drawn layer's context are averaged


class RecurrentConfig(ModelConfig):
    """A recurrent model, whose layers carry a context of fixed size from token to token; for `parallel.tp_size: 1`."""

    COMPUTES: ClassVar = (*ModelConfig.COMPUTES, "context_dim", "ffn_dim", "norm_eps")

    architecture: Literal["recurrent"] = "recurrent"  # chooses these keys
    context_dim: int = Field(256, ge=1)  # numbers that each layer carries from token to token
    ffn_dim: int = Field(512, ge=1)  # width of the feed-forward network, from the context to dim
    norm_eps: float = Field(1e-5, gt=0)  # added to the mean square in RMSNorm
    # Of embedding and output; None: 1 / sqrt(dim). The layers' matrices follow from their widths
    init_std: float | None = Field(None, gt=0)

    @property
    def embedding_std(self) -> float:
        return self.init_std or self.dim**-0.5

    def make(self, parallel: ParallelConfig, attention: AttentionBackend) -> Recurrent:
        """Make the model; see `ModelConfig`."""
        return Recurrent(self, parallel)

    def layer_specs(self) -> dict[str, WeightSpec]:
        """List all weights between embedding and output."""
        dim, context, hidden = self.dim, self.context_dim, self.ffn_dim
        block = {
            "norm.weight": WeightSpec((dim,)),
            "candidate.weight": WeightSpec((context, dim)),
            "gate.weight": WeightSpec((context, dim)),
            "gate.bias": WeightSpec((context,)),
            "context_norm.weight": WeightSpec((context,)),
            "w1.weight": WeightSpec((hidden, context)),
            "w2.weight": WeightSpec((dim, hidden)),
        }
        blocks = {f"blocks.{layer}.{name}": spec for layer in range(self.n_layers) for name, spec in block.items()}
        return {**blocks, "norm.weight": WeightSpec((dim,))}

    def new_cache(self, max_length: int, dtype: torch.dtype | None = None) -> Contexts:
        """Make empty contexts, whose size does not depend on the length; they are sums, and so fp32 in any case."""
        return Contexts(self.n_layers)

    @property
    def logit_variance(self) -> float | None:
        """Return the variance of a logit of a drawn model; the last norm leaves activations of length sqrt(dim).

        Those are mostly the token's embedding. Where that is the output too, the logit of the token itself stands out,
        by how much is not known.
        """
        return None if self.tie_embeddings else self.dim * self.embedding_std**2

    def block_costs(self, parallel: ParallelConfig, seq_len: int, bytes_per_weight: int) -> BlockCosts:
        """Return what a block takes; how long that takes is not known, since a scan waits for its many small steps.

        A scan's inputs and outputs are fp32. Uncompiled, so are both gates, and contexts are kept in both types.
        """
        dim, context, hidden = self.dim, self.context_dim, self.ffn_dim
        products = 2 * context + hidden  # of matrices; their inputs are the normalized stream and context, and SwiGLU's
        compiled = bytes_per_weight * (2 * dim + context + hidden + products) + 8 * context
        rounded = context * bytes_per_weight if bytes_per_weight < 4 else 0
        whole = compiled if parallel.compile else compiled + 8 * context - bytes_per_weight * context + rounded
        kept = {
            "none": whole,
            "selective": bytes_per_weight * (dim + products + (0 if parallel.compile else dim)),
            "full": bytes_per_weight * dim,
        }[parallel.activation_checkpointing]
        # Of the stream, and of what a scan returns and reads; compiled, they replace what was kept
        gradients = 0 if parallel.compile else bytes_per_weight * dim + 8 * context
        return BlockCosts(kept, whole - kept + gradients, moved=None)

    def spelled_out(self) -> dict[str, Any]:
        """Return all values as JSON has them, with the scale of drawn embeddings."""
        return self.model_dump(mode="json") | {"init_std": self.embedding_std}

    def describe(self) -> str:
        """Describe the model's shape for a reader."""
        return f"{self.n_layers} recurrent layers of dim {self.dim} with contexts of {self.context_dim}"


@dataclass
class Context:
    """The vector that one layer carries on: [B, C] fp32, or None before the first token."""

    values: Tensor | None = None


class Contexts:
    """The contexts of documents that are continued together, which replace a cache of all their tokens.

    Attributes:
        length: number of tokens of each document that the model has seen.
        of_layers: the context of each layer.
    """

    def __init__(self, n_layers: int) -> None:
        self.length = 0
        self.of_layers = [Context() for _ in range(n_layers)]


class RecurrentBlock(nn.Module):
    """One layer: reads the normalized stream into its context, and adds to the stream what it makes of that."""

    def __init__(self, config: RecurrentConfig, parallel: ParallelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.candidate = nn.Linear(config.dim, config.context_dim, bias=False)
        self.gate = nn.Linear(config.dim, config.context_dim)
        self.context_norm = RMSNorm(config.context_dim, config.norm_eps)
        self.w1 = nn.Linear(config.context_dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self._computations = computations(self._compute, parallel)

    def forward(self, x: Tensor, carries: Tensor, context: Context | None, use: Use) -> Tensor:
        """Process the stream x [B * T, dim].

        Args:
            carries: [B, T, 1] fp32: 0 for the first token of a piece, which takes over no context, and 1 for others.
            context: what the layer carries on from the tokens before; it is updated. None: there are none.
        """
        return self._computations[use](x, carries, context)

    def _compute(self, x: Tensor, carries: Tensor, context: Context | None) -> Tensor:
        rows, length, _ = carries.shape
        read = self.norm(x)
        # In fp32: the sum over a piece would lose what each token adds
        gate = self.gate(read).view(rows, length, -1).float()
        new = torch.sigmoid(-gate) * self.candidate(read).view(rows, length, -1)
        kept = torch.sigmoid(gate) * carries
        if context is not None and context.values is not None:
            new = torch.cat((new[:, :1] + kept[:, :1] * context.values.unsqueeze(1), new[:, 1:]), dim=1)
        carried = scan(kept, new)
        if context is not None:
            context.values = carried[:, -1].clone()  # a view would keep the contexts of all tokens
        hidden = F.silu(self.w1(self.context_norm(carried.flatten(0, 1).to(x.dtype))))
        return x + self.dropout(self.w2(hidden))


class Recurrent(Model):
    """The whole model.

    Args:
        config: the architecture.
        parallel: how it is trained; only memory and speed depend on it.
    """

    def __init__(self, config: RecurrentConfig, parallel: ParallelConfig | None = None) -> None:
        super().__init__()
        parallel = parallel or ParallelConfig()
        self.config: RecurrentConfig = config
        self.embedding = VocabEmbedding(config.vocab_size, config.dim, config.vocab_multiple)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(RecurrentBlock(config, parallel) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = Output(config)
        if config.tie_embeddings:
            self.output.weight = self.embedding.weight

    def forward(
        self,
        tokens: Tensor,
        segment_ids: Tensor | None = None,
        head: Head[Any] = all_logits,
        cache: Contexts | None = None,
    ) -> Any:
        """Predict each next token; see `Model`."""
        use = self.use_with(cache)
        contexts: list[Context | None] = [None] * self.config.n_layers
        if cache is None:
            assert segment_ids is not None
            carries = (pieces_of(segment_ids, tokens.device).positions > 0).float().unsqueeze(-1)
        else:
            contexts = [*cache.of_layers]
            carries = torch.ones(*tokens.shape, 1, device=tokens.device)
        x = self.dropout(self.embedding(tokens.flatten()))
        for block, context in zip(self.blocks, contexts, strict=True):
            x = block(x, carries, context, use)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.output(self.norm(x).view(*tokens.shape, -1), head)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Draw every matrix; let the numbers of each context be averages over few to many tokens.

        A layer's additions are drawn as small as the embedding.
        """
        config = self.config
        for name, parameter in self.named_parameters():
            device = parameter.device
            if name.endswith("gate.bias"):
                shortest, longest = map(math.log, _MEMORIES)
                # a = 1 - 1 / n keeps a share of 1 / e over n tokens; its logit is log(n - 1)
                lengths = torch.linspace(shortest, longest, len(parameter), device=device).exp()
                parameter.copy_((lengths - 1).log())
            elif parameter.dim() < 2:
                parameter.fill_(1.0)
            else:
                std = parameter.shape[1] ** -0.5 if name.startswith("blocks.") else config.embedding_std
                if name.endswith("w2.weight"):
                    std *= config.embedding_std / math.sqrt(config.n_layers)
                full = draw(name, full_shape(parameter), std, seed, device)
                parameter.copy_(shard_of(full, parameter))

    def measurement(self, topology: Topology) -> RecurrentMeasurement:
        """Return what measures the layers, with what their contexts keep."""
        return RecurrentMeasurement(self.blocks, topology)


class RecurrentMeasurement(ActivationMeasurement):
    """Gathers one more figure of each layer.

    context_kept: mean share of a context that is carried on from one token to the next, over numbers and tokens.
    """

    def __init__(self, blocks: nn.ModuleList, topology: Topology) -> None:
        super().__init__(blocks, topology)
        self._kept = torch.zeros(len(blocks), 2, dtype=torch.float64, device=topology.device)  # count, sum

    def watch(self, segment_ids: Tensor, tokens: Tensor, hooks: ExitStack) -> None:
        """Let all layers be measured in the next pass."""
        super().watch(segment_ids, tokens, hooks)
        for number, block in enumerate(self._blocks):
            gate = block.get_submodule("gate")
            hooks.enter_context(gate.register_forward_hook(self._measures_gate(number, tokens)))

    def finish(self) -> dict[str, list[float]]:
        """Return the figures over all passes and ranks. Every rank must call it."""
        self._topology.sum_over_all(self._kept)
        return super().finish() | {"context_kept": (self._kept[:, 1] / self._kept[:, 0]).tolist()}

    def _measures_gate(self, number: int, tokens: Tensor) -> Any:
        def measure(_gate: nn.Module, _inputs: tuple[Tensor], logits: Tensor) -> None:
            kept = torch.sigmoid(logits[tokens].float())
            self._kept[number] += sums(kept.numel(), kept)

        return measure


@torch.library.custom_op("headrace::scan", mutates_args=())
def scan(kept: Tensor, new: Tensor) -> Tensor:
    """Compute h_t = kept_t * h_{t-1} + new_t, from h_{-1} = 0.

    An operator of its own, so that its loops are one node of a compiled block. Rows are cut into chunks of about
    sqrt(T) tokens, which are all scanned together, and then chunk by chunk what the one before ends with is added: some
    2 sqrt(T) operations on vectors, which multiply only numbers up to 1.

    Args:
        kept, new: [B, T, C] fp32, kept from 0 to 1.
    Returns:
        [B, T, C] fp32.
    """
    rows, length, width = kept.shape
    size = math.isqrt(length - 1) + 1
    padding = (0, 0, 0, -length % size)
    kept, found = (F.pad(x, padding).view(rows, -1, size, width).clone() for x in (kept, new))
    for i in range(1, size):
        found[:, :, i].addcmul_(kept[:, :, i], found[:, :, i - 1])
        kept[:, :, i].mul_(kept[:, :, i - 1])  # from here on of all tokens from the chunk's first on
    for chunk in range(1, found.shape[1]):
        found[:, chunk].addcmul_(kept[:, chunk], found[:, chunk - 1, -1:])
    return found.view(rows, -1, width)[:, :length].contiguous()


@scan.register_fake
def _scan_shape(kept: Tensor, _new: Tensor) -> Tensor:
    return torch.empty(kept.shape, dtype=kept.dtype, device=kept.device)


def _save_for_gradients(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)


def _scan_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of kept and new: those of h_t are a scan from the last token to the first."""
    kept, found = ctx.saved_tensors
    later = F.pad(kept[:, 1:], (0, 0, 0, 1))
    of_new = scan(later.flip(1), gradient.flip(1)).flip(1)
    return of_new * F.pad(found[:, :-1], (0, 0, 1, 0)), of_new


scan.register_autograd(_scan_gradients, setup_context=_save_for_gradients)
