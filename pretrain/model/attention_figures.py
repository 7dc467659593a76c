"""Measure the attention and SwiGLU of a transformer's blocks. activations -> attention_figures -> transformer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.model.activations import ActivationMeasurement, sums
from pretrain.model.attention import Attend
from pretrain.model.pieces import Pieces, pieces_of
from pretrain.model.sequence import to_own_heads
from pretrain.topology import Topology, copy_to

# Queries of a row whose attention is measured; of a longer row, so many that are evenly spaced
_QUERIES = 4096
# Attention logits computed at once; in fp32 with their exponentials and masks, about half a gigabyte
_LOGITS_AT_ONCE = 1 << 25
# A unit of SwiGLU whose value exceeds this share of the layer's rms at no token is dead.
_DEAD = 0.01


class TransformerMeasurement(ActivationMeasurement):
    """Gathers more figures of each block of a transformer.

    One number for each block:
        attention_logit_max: the largest attention logit, q k / sqrt(head_dim), of a token and one that it sees.
        attention_entropy: mean entropy, over heads and tokens, of the attention's distribution, in nats.
        dead_units: share of the units of SwiGLU that stay below a hundredth of the layer's rms at every token.

    Args:
        hidden_dim: width of SwiGLU, over all tensor-parallel ranks.
    """

    def __init__(self, blocks: nn.ModuleList, hidden_dim: int, topology: Topology) -> None:
        super().__init__(blocks, topology)
        count, width, device = len(blocks), hidden_dim // topology.tp_size, topology.device
        self._hidden = torch.zeros(count, 2, dtype=torch.float64, device=device)  # count, x^2
        self._entropy = torch.zeros(count, 2, dtype=torch.float64, device=device)  # count, sum
        self._largest_logit = torch.full((count,), -torch.inf, device=device)
        self._units = torch.zeros(count, width, device=device)  # largest |x| of each unit

    def watch(self, segment_ids: Tensor, tokens: Tensor, hooks: ExitStack) -> None:
        """Let all blocks be measured in the next pass."""
        device = self._topology.device
        pieces, real = pieces_of(segment_ids, device), copy_to(device, segment_ids != 0)
        super().watch(segment_ids, tokens, hooks)
        for number, block in enumerate(self._blocks):
            hooks.enter_context(block.register_forward_pre_hook(self._measures_attention(number, pieces, real)))
            network = block.get_submodule("feed_forward.w2")
            if len(tokens):
                hooks.enter_context(network.register_forward_pre_hook(self._measures_units(number, tokens)))

    def finish(self) -> dict[str, list[float]]:
        """Return the figures over all passes and ranks. Every rank must call it."""
        topology, of_stream = self._topology, super().finish()
        for found in (self._hidden, self._entropy):
            topology.sum_over_all(found)
        topology.max_over_all(self._largest_logit)
        topology.max_over_zero(self._units)
        rms = (self._hidden[:, 1] / self._hidden[:, 0]).sqrt()
        dead = topology.sum_over_all((self._units <= _DEAD * rms.unsqueeze(1)).double().mean(1))
        figures = {
            "attention_logit_max": self._largest_logit,
            "attention_entropy": self._entropy[:, 1] / self._entropy[:, 0],
            "dead_units": dead / topology.world_size,
        }
        return of_stream | {name: values.tolist() for name, values in figures.items()}

    def _measures_units(self, number: int, tokens: Tensor) -> Any:
        end = 0  # of those that came so far: a layer may be given a few tokens at a time

        def measure(_layer: nn.Module, inputs: tuple[Tensor]) -> None:
            nonlocal end
            first, end = end, end + len(inputs[0])
            own = tokens[(tokens >= first) & (tokens < end)] - first
            if len(own):
                x = inputs[0][own].float()
                self._hidden[number] += sums(x.numel(), x.square())
                self._units[number] = torch.maximum(self._units[number], x.abs().amax(0))

        return measure

    def _measures_attention(self, number: int, pieces: Pieces, real: Tensor) -> Any:
        def replace(_block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            x, cos, sin, attend, use = inputs
            return x, cos, sin, self._measured(number, attend, pieces, real), use

        return replace

    def _measured(self, number: int, attend: Attend, pieces: Pieces, real: Tensor) -> Attend:
        def measured(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            queries, keys, _ = to_own_heads(q, k, v)  # of whole rows, which `attend` exchanges for itself once more
            for largest, entropies in _attention_rows(queries, keys, pieces.numbers, real):
                self._largest_logit[number] = torch.maximum(self._largest_logit[number], largest)
                self._entropy[number] += sums(entropies.numel(), entropies)
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
