"""Measure what flows through the blocks during forward passes, to see early that a run goes wrong.

Hooks do it, on blocks that are not compiled for it, so that training passes know nothing of it. Figures are of whole
tensors over all ranks, so they depend on the weights and the tokens alone, not on the layout. Padding does not count.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from pretrain.model.attention import Attend
from pretrain.model.pieces import Pieces, pieces_of
from pretrain.model.transformer import Block, Transformer
from pretrain.topology import Topology, copy_to

# Queries of a row whose attention is measured; of a longer row, so many that are evenly spaced
_QUERIES = 4096
# Attention logits computed at once; in fp32 with their exponentials and masks, about half a gigabyte
_LOGITS_AT_ONCE = 1 << 25
# A unit of SwiGLU whose value exceeds this share of the layer's rms at no token is dead.
_DEAD = 0.01


class ActivationMeasurement:
    """Gathers figures of each block over forward passes, by this rank's tokens, for all ranks together.

    The figures, one number for each block:
        residual_rms: root mean square of the residual stream after the block.
        residual_max: its largest absolute value.
        residual_kurtosis: its fourth moment over its squared second one, both about 0: 3 for a normal distribution, and
            the larger, the more of the stream's size sits in few coordinates.
        attention_logit_max: the largest attention logit, q k / sqrt(head_dim), of a token and one that it sees.
        attention_entropy: mean entropy, over heads and tokens, of the attention's distribution, in nats.
        dead_units: share of the units of SwiGLU that stay below a hundredth of the layer's rms at every token.
    """

    def __init__(self, model: Transformer, topology: Topology) -> None:
        blocks, width = model.config.n_layers, model.config.hidden_dim // topology.tp_size
        self._model, self._topology = model, topology
        self._residual = torch.zeros(blocks, 3, dtype=torch.float64, device=topology.device)  # count, x^2, x^4
        self._hidden = torch.zeros(blocks, 2, dtype=torch.float64, device=topology.device)  # count, x^2
        self._entropy = torch.zeros(blocks, 2, dtype=torch.float64, device=topology.device)  # count, sum
        self._largest = torch.full((blocks, 2), -torch.inf, device=topology.device)  # |residual|, attention logit
        self._units = torch.zeros(blocks, width, device=topology.device)  # largest |x| of each unit

    @contextmanager
    def of(self, segment_ids: Tensor) -> Iterator[None]:
        """Measure the forward pass inside the block, of rows with these segment ids [B, T], on the host."""
        device = self._topology.device
        pieces, real = pieces_of(segment_ids, device), copy_to(device, segment_ids != 0)
        tokens = copy_to(device, segment_ids.flatten().nonzero().flatten())
        with ExitStack() as hooks:
            for number, block in enumerate(self._model.blocks if len(tokens) else ()):
                assert isinstance(block, Block)
                self._watch(number, block, pieces, real, tokens, hooks)
            yield

    def finish(self) -> dict[str, list[float]]:
        """Return the figures over all passes and ranks. Every rank must call it."""
        topology = self._topology
        for sums in (self._residual, self._hidden, self._entropy):
            topology.sum_over_all(sums)
        topology.max_over_all(self._largest)
        topology.max_over_dp(self._units)
        square, fourth = (self._residual[:, 1:] / self._residual[:, :1]).unbind(1)
        rms = (self._hidden[:, 1] / self._hidden[:, 0]).sqrt()
        dead = topology.sum_over_all((self._units <= _DEAD * rms.unsqueeze(1)).double().mean(1))
        figures = {
            "residual_rms": square.sqrt(),
            "residual_max": self._largest[:, 0],
            "residual_kurtosis": fourth / square.square(),
            "attention_logit_max": self._largest[:, 1],
            "attention_entropy": self._entropy[:, 1] / self._entropy[:, 0],
            "dead_units": dead / topology.world_size,
        }
        return {name: values.tolist() for name, values in figures.items()}

    def _watch(self, number: int, block: Block, pieces: Pieces, real: Tensor, tokens: Tensor, hooks: ExitStack) -> None:
        """Let a block's passes be measured: real [B, T] says which tokens are no padding, `tokens` where they are."""

        def before(_block: Block, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            x, cos, sin, attend, _ = inputs
            return x, cos, sin, self._measured_attention(number, attend, pieces, real), "uncompiled"

        def after(_block: Block, _inputs: tuple[Any, ...], x: Tensor) -> None:
            x = x[tokens].float()
            square = x.square()
            self._residual[number] += _sums(x.numel(), square, square.square())
            self._largest[number, 0] = torch.maximum(self._largest[number, 0], square.max().sqrt())

        def hidden(_layer: torch.nn.Module, inputs: tuple[Tensor]) -> None:
            x = inputs[0][tokens].float()
            self._hidden[number] += _sums(x.numel(), x.square())
            self._units[number] = torch.maximum(self._units[number], x.abs().amax(0))

        hooks.enter_context(block.register_forward_pre_hook(before))
        hooks.enter_context(block.register_forward_hook(after))
        hooks.enter_context(block.feed_forward.w2.register_forward_pre_hook(hidden))

    def _measured_attention(self, number: int, attend: Attend, pieces: Pieces, real: Tensor) -> Attend:
        def measured(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for largest, entropies in _attention_rows(q, k, pieces.numbers, real):
                self._largest[number, 1] = torch.maximum(self._largest[number, 1], largest)
                self._entropy[number] += _sums(entropies.numel(), entropies)
            return attend(q, k, v)

        return measured


def _attention_rows(q: Tensor, k: Tensor, numbers: Tensor, real: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Compute the attention of a few queries at a time.

    Args:
        q, k: [B, T, H, D], [B, T, K, D].
        numbers: [B, T], the piece of each token.
        real: [B, T], whether it is one and not padding.
    Yields:
        The largest logit, and the entropies [queries and heads].
    """
    rows, length, heads, size = q.shape
    kv_heads = k.shape[2]
    at_once = max(1, _LOGITS_AT_ONCE // (rows * heads * length))
    k, columns = k.float(), torch.arange(length, device=q.device)
    asked = torch.linspace(0, length - 1, min(length, _QUERIES)).round().long()  # on the host
    for places in torch.split(asked, at_once):
        end = int(places[-1]) + 1
        places = places.to(q.device)
        queries = q[:, places].float().view(rows, len(places), kv_heads, heads // kv_heads, size)
        logits = torch.einsum("bqkgd,btkd->bqkgt", queries, k[:, :end]) / size**0.5
        seen = (numbers[:, places, None] == numbers[:, None, :end]) & (columns[:end] <= places[:, None])
        counts = real[:, places]
        logits = logits[counts].masked_fill(~seen[counts][:, None, None], -torch.inf)
        log_shares = logits.log_softmax(-1)
        entropies = -(log_shares.exp() * log_shares.masked_fill(log_shares.isinf(), 0)).sum(-1)
        if logits.numel():
            yield logits.max(), entropies


def _sums(count: int, *values: Tensor) -> Tensor:
    """Return a count and the sums of tensors, in float64."""
    sums = [v.sum(dtype=torch.float64) for v in values]
    return torch.stack([sums[0].new_tensor(float(count)), *sums])
