"""The loss of next tokens without their logits: projection, softmax and gradients, a chunk of targets at a time.

transformer -> loss -> {engine, scoring}. The logits of a batch would be the largest tensor of a step: tokens x
vocabulary, in fp32 for the softmax. Here only those of a chunk exist. In training a chunk's gradients are computed
right after its logits, so that nothing is projected twice; an evaluation walks through the same chunks without
gradients. Each tp rank has its slice of the vocabulary, and the ranks exchange three figures a target. Rows of a slice
that only pad it (`parallel.py`) get logits of minus infinity: no probability, no gradient, never the most likely token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.parallel import gather_over_tp, size_without_padding, tp_rank
from pretrain.model.pieces import valid_targets
from pretrain.model.sequence import own_part
from pretrain.topology import copy_to

CHUNK_LOGITS = 1 << 25  # logits of a chunk, on one rank: 67 MB in bf16; a GPU also holds 34 MB of exponentials
SUMMED_WEIGHTS = 1 << 26  # the largest slice of the output projection whose gradient is summed in fp32: in 268 MB
_CACHED_LOGITS = 1 << 18  # on CPUs, logits of a softmax: 1 MB of exponentials, which stay in a core's cache


class Targets(NamedTuple):
    """The tokens to predict, and the positions to predict them from; a position that is not listed costs nothing.

    Attributes:
        positions: [M] int64, indices into the flattened positions [B * T] that this rank has.
        tokens: [M] int64, the token that follows each.
    """

    positions: Tensor
    tokens: Tensor


def next_token_targets(tokens: Tensor, segment_ids: Tensor) -> Targets:
    """Return the targets of packed rows: each token that follows another of the same piece and belongs to no prompt.

    Of split rows they are those of this rank's positions.

    Args:
        tokens: [B, T + 1] int64 on the device; the first T are the positions.
        segment_ids: [B, T + 1] on the host, so that their number is known without waiting for the device.
    """
    positions = copy_to(tokens.device, own_part(valid_targets(segment_ids)).flatten().nonzero().squeeze(1))
    return Targets(positions, own_part(tokens[:, 1:]).flatten()[positions])


class Loss(NamedTuple):
    """The loss of M targets in training, the same on every tp rank.

    Attributes:
        total: scalar fp32, the sum of nll and of z_loss * logsumexp^2; the only one with a gradient.
        nll: [M] fp32, negative log-likelihood of each target, in nats.
        logsumexp: [M] fp32, log of the sum of the exponentials of a position's logits.
    """

    total: Tensor
    nll: Tensor
    logsumexp: Tensor


class Scores(NamedTuple):
    """The scores of M targets in an evaluation, the same on every tp rank.

    Attributes:
        nll: [M] fp32, negative log-likelihood of each target, in nats.
        correct: [M] bool, whether it was the most likely token; of equally likely ones that is the lowest.
    """

    nll: Tensor
    correct: Tensor


def training_loss(hidden: Tensor, weight: Tensor, targets: Targets, z_loss: float, compiled: bool = False) -> Loss:
    """Compute the loss of targets, and with it its gradients.

    Args:
        hidden: [B, T, dim], the final hidden states, whole on every tp rank. Their gradient is this rank's part of a
            sum over the tp ranks.
        weight: [vocab_size / tp_size, dim], this rank's slice of the output projection.
        z_loss: coefficient of the squared logsumexp. Source: Chowdhery et al. 2022 (PaLM), arXiv 2204.02311, section 5.
        compiled: whether to compile the softmax; its first call then takes seconds.
    """
    states = hidden.flatten(0, 1).index_select(0, targets.positions)
    function: Any = _LossWithGradients  # torch's types know no `apply`
    return Loss(*function.apply(states, weight, targets.tokens, z_loss, compiled))


@torch.no_grad()
def target_scores(hidden: Tensor, weight: Tensor, targets: Targets) -> Scores:
    """Score targets without gradients; the arguments are those of `training_loss`."""
    states = hidden.flatten(0, 1).index_select(0, targets.positions)
    nll = torch.empty(len(targets.tokens), device=states.device)
    correct = torch.empty_like(targets.tokens, dtype=torch.bool)
    for place, logits, figures in _blocks_with_figures(states, weight, targets.tokens, _exponentials):
        nll[place] = figures.logsumexp - figures.target
        # An argmax costs more than all the rest, so it is computed only where the target may be it.
        likely = figures.target == figures.largest
        best = argmax_over_tp(logits[likely])
        correct[place] = likely.masked_scatter(likely, best == targets.tokens[place][likely])
    return Scores(nll, correct)


def all_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return this rank's slice [..., vocab_size / tp_size] of the logits of positions [..., dim]."""
    return _masked(F.linear(hidden, weight), size_without_padding(weight))


def last_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return this rank's slice [B, vocab_size / tp_size] of the logits of the last of positions [B, T, dim]."""
    return all_logits(hidden[:, -1], weight)


def _masked(logits: Tensor, held: int) -> Tensor:
    """Give the columns from `held` on, which belong to padding, a probability of zero; in place."""
    if held < logits.shape[-1]:
        logits[..., held:] = -torch.inf
    return logits


@torch.no_grad()
def argmax_over_tp(logits: Tensor) -> Tensor:
    """Return the most likely ids [M] int64 by slices of logits [M, vocab_size / tp_size]; of equals, the lowest."""
    largest, index = logits.max(dim=-1)
    parts = gather_over_tp(torch.stack((largest.double(), (index + tp_rank() * logits.shape[-1]).double())))
    is_largest = parts[:, 0] == parts[:, 0].amax(dim=0)
    return torch.where(is_largest, parts[:, 1], torch.inf).amin(dim=0).long()


class _Figures(NamedTuple):
    """What the softmax needs to know of each of R positions; all [R] fp32."""

    logsumexp: Tensor
    target: Tensor  # the target's logit
    largest: Tensor  # the largest logit


class _LossWithGradients(torch.autograd.Function):
    """Computes the gradients in the forward pass, while a chunk's logits are at hand; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, tokens: Tensor, z_loss: float, compiled: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        kernels, is_frozen = _Kernels(compiled), not ctx.needs_input_grad[1]
        if is_frozen or weight.numel() <= SUMMED_WEIGHTS:
            nll, logsumexp, *ctx.gradients = _by_targets(states, weight, tokens, z_loss, kernels, is_frozen)
        else:
            nll, logsumexp, *ctx.gradients = _by_vocabulary(states, weight, tokens, z_loss, kernels)
        total = nll.sum() + z_loss * logsumexp.square().sum()
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(nll, logsumexp)
        return total, nll, logsumexp

    @staticmethod
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        of_states, of_weight = ctx.gradients
        del ctx.gradients  # they may be as large as the weight in fp32
        scaled = None if of_weight is None else _scaled(of_weight, scale, ctx.dtype)
        return _scaled(of_states, scale, ctx.dtype), scaled, None, None, None


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a gradient [rows, width] times a scalar, in another type and, where that is its own, in its memory.

    The product is taken in fp32, part by part: CUDA would round the scalar to the gradient's type first.
    """
    result = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    height, width = gradient.shape
    for rows in _even_slices(height, width, CHUNK_LOGITS):
        result[rows] = gradient[rows].float() * scale
    return result


class _Kernels:
    """The two functions of the softmax, compiled on request at their first call."""

    def __init__(self, compiled: bool) -> None:
        self.exponentials: Callable[..., tuple[Tensor, Tensor]] = (
            _compiled(_exponentials) if compiled else _exponentials
        )
        self.gradient: Callable[..., Tensor] = _compiled(_logits_gradient) if compiled else _logits_gradient


def _by_targets(
    states: Tensor, weight: Tensor, tokens: Tensor, z_loss: float, kernels: _Kernels, is_frozen: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return nll, logsumexp and the gradients of states and weight, chunk of targets by chunk.

    Each chunk is projected once, but the weight's gradient has to be summed over the chunks, in fp32; a frozen weight
    has none.
    """
    nll = torch.empty(len(tokens), device=states.device)
    logsumexp = torch.empty_like(nll)
    of_states = torch.empty_like(states)
    of_weight = None if is_frozen else torch.zeros_like(weight, dtype=torch.float32)
    for chunk, logits, columns in _chunks(states, weight, tokens):
        for rows in _blocks(logits):
            powers, part = kernels.exponentials(logits[rows], columns[rows])
            figures = _over_tp(part)
            logsumexp[chunk][rows] = figures.logsumexp
            nll[chunk][rows] = figures.logsumexp - figures.target
            # The gradient takes the logits' memory.
            logits[rows] = kernels.gradient(powers, columns[rows], part[2], figures.logsumexp, z_loss)
        torch.mm(logits, weight, out=of_states[chunk])
        if of_weight is not None:
            of_weight += logits.t() @ states[chunk]
    return nll, logsumexp, of_states, of_weight


def _by_vocabulary(
    states: Tensor, weight: Tensor, tokens: Tensor, z_loss: float, kernels: _Kernels
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the same, the gradients by one part of the vocabulary after another.

    No gradient of a whole vocabulary exists in fp32, but everything is projected twice: a softmax needs the logsumexp
    over the whole vocabulary first.
    """
    nll = torch.empty(len(tokens), device=states.device)
    logsumexp = torch.empty_like(nll)
    for place, _, found in _blocks_with_figures(states, weight, tokens, kernels.exponentials):
        logsumexp[place] = found.logsumexp
        nll[place] = found.logsumexp - found.target
    of_states = torch.zeros_like(states, dtype=torch.float32)
    of_weight = torch.empty_like(weight)
    first, held = tp_rank() * weight.shape[0], size_without_padding(weight)
    of_weight[held:] = 0
    weight = weight[:held]
    for part in _even_slices(held, len(tokens), CHUNK_LOGITS):
        logits, columns = states @ weight[part].t(), tokens - first - part.start
        for rows in _blocks(logits):
            powers, figures = kernels.exponentials(logits[rows], columns[rows])
            logits[rows] = kernels.gradient(powers, columns[rows], figures[2], logsumexp[rows], z_loss)
        torch.mm(logits.t(), states, out=of_weight[part])
        of_states += logits @ weight[part]
    return nll, logsumexp, of_states, of_weight


def _blocks_with_figures(
    states: Tensor, weight: Tensor, tokens: Tensor, exponentials: Callable[..., tuple[Tensor, Tensor]]
) -> Iterator[tuple[slice, Tensor, _Figures]]:
    """Yield the place of each block of targets, its logits [R, vocab_size / tp_size], and their softmax's figures."""
    for chunk, logits, columns in _chunks(states, weight, tokens):
        for rows in _blocks(logits):
            figures = _over_tp(exponentials(logits[rows], columns[rows])[1])
            yield slice(chunk.start + rows.start, chunk.start + rows.start + len(logits[rows])), logits[rows], figures


def _chunks(states: Tensor, weight: Tensor, tokens: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield each chunk's place, its logits [C, vocab_size / tp_size], and its targets' columns in them.

    A column is negative, or not below the slice's width, where another tp rank's slice holds the target.
    """
    width, held = weight.shape[0], size_without_padding(weight)
    for chunk in _even_slices(len(tokens), width, CHUNK_LOGITS):
        yield chunk, _masked(states[chunk] @ weight.t(), held), tokens[chunk] - tp_rank() * width


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Yield the rows of a chunk [C, width] that go through the softmax together: on CPUs, as many as a cache holds."""
    limit = _CACHED_LOGITS if logits.device.type == "cpu" else CHUNK_LOGITS // 4
    return _even_slices(logits.shape[0], logits.shape[1], limit)


def _even_slices(rows: int, width: int, limit: int) -> Iterator[slice]:
    """Yield slices of about the same number of rows, of at most about `limit` elements each."""
    count = max(1, -(-rows * width // limit))
    size = -(-rows // count)
    return (slice(start, start + size) for start in range(0, rows, max(1, size)))


def _exponentials(logits: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return exp(logits - largest) [R, width] fp32, and this slice's part of the figures, [3, R] fp32."""
    width = logits.shape[-1]
    held = (columns >= 0) & (columns < width)
    target = logits.gather(-1, torch.where(held, columns, 0).unsqueeze(-1)).squeeze(-1).float()
    largest = logits.amax(-1).float()
    powers = logits.to(torch.float32, copy=True).sub_(largest.unsqueeze(-1)).exp_()
    return powers, torch.stack((powers.sum(-1).log() + largest, torch.where(held, target, 0.0), largest))


def _over_tp(part: Tensor) -> _Figures:
    """Combine the slices' figures [3, R] of all tp ranks to those of the whole vocabulary."""
    parts = gather_over_tp(part)  # [tp_size, 3, R]
    return _Figures(parts[:, 0].logsumexp(0), parts[:, 1].sum(0), parts[:, 2].amax(0))


def _logits_gradient(powers: Tensor, columns: Tensor, largest: Tensor, logsumexp: Tensor, z_loss: float) -> Tensor:
    """Return the gradient of the loss with respect to logits [R, width], given what `_exponentials` made of them.

    That of the negative log-likelihood is softmax - onehot; that of z_loss * logsumexp^2 is the softmax times twice
    z_loss * logsumexp.
    """
    width = powers.shape[-1]
    softmax = powers.mul_((largest - logsumexp).exp().unsqueeze(-1))
    held = (columns >= 0) & (columns < width)
    gradient = softmax.mul_((1 + 2 * z_loss * logsumexp).unsqueeze(-1)) if z_loss else softmax
    return gradient.scatter_add_(-1, torch.where(held, columns, 0).unsqueeze(-1), -held.float().unsqueeze(-1))


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)  # the number of targets differs from batch to batch
