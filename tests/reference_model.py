"""A LLaMA and its training step in plain PyTorch, for comparison: no fairscale, no DeepSpeed, no packing tricks.

It follows the papers' formulas, on a dict of whole weights, one piece of a row at a time.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.parametrization import Scale

Weights = dict[str, Tensor]
Observe = Callable[[str, int, Tensor], None]  # what is observed, the block's number, the values


@dataclass(frozen=True)
class Shape:
    """The architecture, in numbers."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    eps: float = 1e-5
    theta: float = 10_000.0
    qk_norm: bool = False
    tied: bool = False


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x: Tensor, theta: float) -> Tensor:
    """Apply RoPE to [heads, T, head_dim] as a complex multiplication of (x_i, x_{i + head_dim / 2})."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.outer(torch.arange(x.shape[1], dtype=torch.float64), frequencies)
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)


def piece_logits(
    w: Weights, shape: Shape, tokens: Tensor, observe: Observe = lambda what, block, values: None
) -> Tensor:
    """Return the logits [T, vocab_size] of one piece [T] by itself."""
    x = w["embedding.weight"][tokens]
    length = len(tokens)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    for i in range(shape.n_layers):
        b = f"blocks.{i}."
        h = rms_norm(x, w[b + "attention_norm.weight"], shape.eps)
        q = (h @ w[b + "attention.wq.weight"].T).view(length, shape.n_heads, -1)
        k = (h @ w[b + "attention.wk.weight"].T).view(length, shape.n_kv_heads, -1)
        v = (h @ w[b + "attention.wv.weight"].T).view(length, shape.n_kv_heads, -1)
        if shape.qk_norm:
            q = rms_norm(q, w[b + "attention.q_norm.weight"], shape.eps)
            k = rms_norm(k, w[b + "attention.k_norm.weight"], shape.eps)
        q, k = rotate(q.transpose(0, 1), shape.theta), rotate(k.transpose(0, 1), shape.theta)
        heads = []
        for head in range(shape.n_heads):
            group = head * shape.n_kv_heads // shape.n_heads
            scores = q[head] @ k[group].T / math.sqrt(q.shape[-1])
            observe("scores", i, scores)
            heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[:, group])
        x = x + torch.cat(heads, dim=-1) @ w[b + "attention.wo.weight"].T
        h = rms_norm(x, w[b + "ffn_norm.weight"], shape.eps)
        gate, up = h @ w[b + "feed_forward.w1.weight"].T, h @ w[b + "feed_forward.w3.weight"].T
        hidden = gate * torch.sigmoid(gate) * up
        observe("hidden", i, hidden)
        x = x + hidden @ w[b + "feed_forward.w2.weight"].T
        observe("residual", i, x)
    x = rms_norm(x, w["norm.weight"], shape.eps)
    return x @ w["embedding.weight" if shape.tied else "output.weight"].T


def pieces(tokens: Tensor, segment_ids: Tensor) -> list[Tensor]:
    """Return the pieces of packed rows [rows, seq_len + 1], in order, without padding, whatever their ids' signs."""
    return [
        row[segments == segment]
        for row, segments in zip(tokens, segment_ids.abs(), strict=True)
        for segment in segments.unique().tolist()
        if segment > 0
    ]


def batch_loss(w: Weights, shape: Shape, tokens: Tensor, segment_ids: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Return the mean negative log-likelihood over the batch's targets, and the weighted mean squared logsumexp."""
    nll, squares, n_targets = torch.zeros(()), torch.zeros(()), 0
    learned = pieces(segment_ids > 0, segment_ids)
    for piece, is_learned in zip(pieces(tokens, segment_ids), learned, strict=True):
        if len(piece) < 2:
            continue  # a single token predicts nothing
        logits = piece_logits(w, shape, piece[:-1])
        log_z = logits.logsumexp(-1)
        nll = nll + (log_z - logits.gather(1, piece[1:, None])[:, 0])[is_learned[1:]].sum()
        squares = squares + log_z.square()[is_learned[1:]].sum()
        n_targets += int(is_learned[1:].sum())
    return nll / max(1, n_targets), z_loss * squares / max(1, n_targets)


def target_counts(segment_ids: Tensor) -> Tensor:
    """Count the targets of each row [rows]: tokens that follow another of their piece and belong to no prompt."""
    return ((segment_ids[:, 1:].abs() == segment_ids[:, :-1].abs()) & (segment_ids[:, 1:] > 0)).sum(1)


def layer_figures(w: Weights, shape: Shape, tokens: Tensor, segment_ids: Tensor) -> dict[str, list[float]]:
    """Return figures of each block over the pieces of rows, by their definitions."""
    seen: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
    for piece in pieces(tokens, segment_ids):
        piece_logits(w, shape, piece, lambda what, block, values: seen[what, block].append(values.detach()))
    figures = defaultdict(list)
    for block in range(shape.n_layers):
        residual = torch.cat(seen["residual", block]).flatten()
        scores = [torch.tensor(row[: t + 1]) for s in seen["scores", block] for t, row in enumerate(s.tolist())]
        hidden = torch.cat(seen["hidden", block])
        largest, rms = hidden.abs().max(0).values, float(hidden.square().mean()) ** 0.5
        figures["residual_rms"].append(float(residual.square().mean()) ** 0.5)
        figures["residual_max"].append(float(residual.abs().max()))
        figures["residual_kurtosis"].append(float((residual**4).mean() / (residual**2).mean() ** 2))
        figures["attention_logit_max"].append(max(float(row.max()) for row in scores))
        entropies = [float(torch.distributions.Categorical(logits=row).entropy()) for row in scores]
        figures["attention_entropy"].append(sum(entropies) / len(entropies))
        figures["dead_units"].append(sum(float(unit) <= 0.01 * rms for unit in largest) / len(largest))
    return dict(figures)


def train(
    weights: Weights,
    shape: Shape,
    batches: list[tuple[Tensor, Tensor]],
    learning_rates: list[float],
    *,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    grad_clip: float,
    z_loss: float,
    momentum: float | None = None,
    scale_of: Callable[[str], Scale] = lambda name: Scale(),
    observe: Callable[[Weights, Weights, Weights], None] = lambda before, gradients, after: None,
) -> tuple[list[tuple[float, float]], Weights]:
    """Train with AdamW (Loshchilov and Hutter 2019); return (loss, gradient norm) per step, and the weights.

    Args:
        momentum: trains the blocks' matrices with Muon (Liu et al. 2025, arXiv 2502.16982); None: with AdamW too.
        scale_of: returns the factors of a weight's learning rate.
        observe: gets each step's weights before it, gradients before clipping, and weights after it.
    """
    w = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
    first = {name: torch.zeros_like(weight) for name, weight in w.items()}
    second = {name: torch.zeros_like(weight) for name, weight in w.items()}
    history = []
    for t, ((tokens, segment_ids), lr) in enumerate(zip(batches, learning_rates, strict=True), start=1):
        loss, z = batch_loss(w, shape, tokens, segment_ids, z_loss)
        gradients = dict(zip(w, torch.autograd.grad(loss + z, list(w.values())), strict=True))
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        clip = min(1.0, grad_clip / norm)
        history.append((loss.item(), norm))
        before = {name: weight.detach().clone() for name, weight in w.items()}
        with torch.no_grad():
            for name, weight in w.items():
                g = gradients[name] * clip
                decay = weight_decay if weight.dim() >= 2 else 0.0
                if momentum is not None and weight.dim() >= 2 and name.startswith("blocks."):
                    first[name] = momentum * first[name] + g  # a sum; its scale does not matter
                    update = 0.2 * math.sqrt(max(weight.shape)) * orthogonalized(momentum * first[name] + g)
                    update *= scale_of(name).muon_learning_rate
                else:
                    first[name] = betas[0] * first[name] + (1 - betas[0]) * g
                    second[name] = betas[1] * second[name] + (1 - betas[1]) * g * g
                    update = first[name] / (1 - betas[0] ** t) / ((second[name] / (1 - betas[1] ** t)).sqrt() + eps)
                    update *= scale_of(name).learning_rate
                weight -= lr * (update + decay * weight)
        observe(before, gradients, w)
    return history, {name: weight.detach() for name, weight in w.items()}


def orthogonalized(matrix: Tensor) -> Tensor:
    """Apply Muon's polynomial, five times, to the singular values of a matrix, in fp64."""
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    return (u * values @ v).to(matrix.dtype)
