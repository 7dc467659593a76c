"""Muon, an optimizer of matrices, on the pieces that ZeRO and tensor parallelism cut them into. engine -> muon.

Muon orthogonalizes a running mean of a matrix's gradient and applies that. AdamW works on single numbers, and so on any
piece of a matrix; an orthogonalization needs the whole. So each matrix has an owner among all ranks: the others send it
their pieces of the mean, and it returns to them their pieces of the update. Matrices are dealt to the ranks by size, as
many in a round as there are ranks, so that no rank ever holds more than one whole matrix and all work on equal ones.

A rank sends and receives its part of the matrices twice, in the type of the computation: 4 bytes a weight of its own in
bf16. What it computes and keeps does not depend on how the matrices are cut, so all layouts agree to the last bits of
the gradient.

Sources: Jordan et al. 2024, kellerjordan.github.io/posts/muon; the scale of the update and the decay, Liu et al. 2025,
arXiv 2502.16982.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.adamw import AdamW, rounded_at_random
from pretrain.model.parallel import full_shape, shard_dim
from pretrain.optim import ORTHOGONALIZATION_ITERATIONS, OptimConfig, ParameterGroup
from pretrain.topology import Topology
from pretrain.zero_pieces import OwnPiece

_COEFFICIENTS = (3.4445, -4.775, 2.0315)  # of X, (X X^T) X and (X X^T)^2 X, chosen for a steep start
_UPDATE_RMS = 0.2  # about that of AdamW's updates, so that its learning rates hold


def orthogonalize(matrix: Tensor) -> Tensor:
    """Move the singular values of a matrix [m, n] close to 1, by Newton-Schulz iterations in the matrix's type.

    Those above about 1/100 of the root of their sum of squares end between 0.68 and 1.14, which serves as well as 1.
    The scale of the matrix does not matter, and zeros stay zeros.
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if is_tall else matrix
    x = x / torch.linalg.vector_norm(x, dtype=torch.float32).clamp_min(torch.finfo(torch.float32).tiny)
    for _ in range(ORTHOGONALIZATION_ITERATIONS):
        square = x @ x.mT
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


@dataclass(frozen=True)
class _Matrix:
    """A matrix, and how it lies on the ranks.

    Attributes:
        shape: of the whole matrix.
        shard_dim: along which the tensor-parallel ranks split it.
        own: this rank's piece.
        sizes: elements of the pieces, by rank; in a slice, those of ZeRO's ranks follow each other.
    """

    shape: tuple[int, int]
    shard_dim: int
    own: OwnPiece
    sizes: tuple[int, ...]

    def join(self, pieces: Sequence[Tensor], tp_size: int) -> Tensor:
        """Return the whole matrix, given all ranks' flat pieces."""
        shape = list(self.shape)
        shape[self.shard_dim] //= tp_size
        slices = [torch.cat(list(pieces[tp_rank::tp_size])).view(shape) for tp_rank in range(tp_size)]
        return torch.cat(slices, self.shard_dim)

    def cut(self, whole: Tensor, tp_size: int) -> Sequence[Tensor]:
        """Return all ranks' flat pieces of a whole matrix."""
        pieces = [whole] * len(self.sizes)
        for tp_rank, part in enumerate(whole.chunk(tp_size, self.shard_dim)):
            pieces[tp_rank::tp_size] = torch.split(part.flatten(), list(self.sizes[tp_rank::tp_size]))
        return pieces


class Muon(AdamW):
    """Muon on the groups that are its own, and AdamW on the others.

    DeepSpeed replaces the weights of a group by this rank's flat partitions of them; `locate` says what lies in these.
    The only moment of a weight under Muon is the running mean of its gradient, which has the name of AdamW's first.

    Args:
        groups, optim, topology, seed: as for AdamW.
        dtype: in which matrices are orthogonalized.
    """

    def __init__(
        self, groups: Sequence[ParameterGroup], optim: OptimConfig, topology: Topology, seed: int, dtype: torch.dtype
    ) -> None:
        super().__init__(groups, optim, topology, seed)
        self._momentum = optim.momentum
        self._dtype = dtype
        self._topology = topology
        # ZeRO-3 leaves a weight without a shape
        self._weights = [
            (weight, full_shape(weight), number)
            for number, group in enumerate(groups)
            if group["muon"]
            for weight in group["params"]
        ]
        self._rounds: Mapping[Tensor, Sequence[Sequence[_Matrix]]] = {}

    def locate(self, optimizer: Any) -> None:
        """Find the matrices in the flat partitions of DeepSpeed's optimizer, which wraps this one.

        Every rank must call it, once.
        """
        topology = self._topology
        pieces = [OwnPiece(weight, optimizer, topology.zero_rank) for weight, _, _ in self._weights]
        of_ranks = topology.gather_objects([piece.size for piece in pieces])
        found: dict[Tensor, list[_Matrix]] = defaultdict(list)
        for (weight, (rows, columns), group), piece, *sizes in zip(self._weights, pieces, *of_ranks, strict=True):
            dim = shard_dim(weight)
            assert dim is not None or topology.tp_size == 1, "the blocks' matrices are all split"
            before = sum(sizes[topology.tp_rank : topology.rank : topology.tp_size])
            assert piece.size == 0 or piece.start == before, "ZeRO's ranks hold consecutive pieces"
            # Every rank has a partition of each group, even if it has no part of a weight.
            flat = self.param_groups[group]["params"][0] if piece.flat is None else piece.flat
            found[flat].append(_Matrix((rows, columns), dim or 0, piece, tuple(sizes)))
        self._rounds = {flat: list(_rounds(matrices, topology.world_size)) for flat, matrices in found.items()}

    def has(self, flat: Tensor) -> bool:
        """Return whether a flat partition is of weights that Muon trains."""
        return flat in self._rounds

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the partitions in the groups as they are now: DeepSpeed shows one at a time, the same on all ranks."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        super().step()
        self.param_groups = groups
        for group in groups:
            for flat in group["params"] if group["muon"] else ():
                self._update(flat, group["lr"], group["weight_decay"])

    def _update(self, flat: Tensor, learning_rate: float, weight_decay: float) -> None:
        state = self._begun(flat, ("exp_avg",))
        assert flat.grad is not None, "DeepSpeed updates only what has a gradient"
        mean = state["exp_avg"].float()  # itself, if that is its type
        mean.lerp_(flat.grad, 1 - self._momentum)
        if self._rounds_moments:
            state["exp_avg"] = rounded_at_random(mean, self._generator(flat, state["step"]))
        state["step"] += 1
        for matrices in self._rounds[flat]:
            updates = self._orthogonalized(matrices, flat.grad, mean)
            for matrix, update in zip(matrices, updates, strict=False):
                step = learning_rate * _UPDATE_RMS * max(matrix.shape) ** 0.5
                weights = matrix.own.cut(flat)
                weights.mul_(1 - learning_rate * weight_decay).add_(update.to(weights), alpha=-step)

    def _orthogonalized(self, matrices: Sequence[_Matrix], gradient: Tensor, mean: Tensor) -> Sequence[Tensor]:
        """Return this rank's pieces of a round's matrices, orthogonalized: the means with Nesterov's look ahead."""
        topology, device = self._topology, self._topology.device  # where the partitions are too, if not offloaded
        nothing = [torch.empty(0, dtype=self._dtype, device=device)] * (topology.world_size - len(matrices))
        sent = [
            matrix.own.cut(gradient).lerp(matrix.own.cut(mean), self._momentum).to(device, self._dtype)
            for matrix in matrices
        ]
        own = matrices[topology.rank] if topology.rank < len(matrices) else None
        sizes = own.sizes if own else [0] * topology.world_size
        pieces: Sequence[Tensor] = topology.all_to_all([*sent, *nothing], sizes)
        if own:
            pieces = own.cut(orthogonalize(own.join(pieces, topology.tp_size)), topology.tp_size)
        return topology.all_to_all(pieces, [matrix.own.size for matrix in matrices] + [0] * len(nothing))


def make_optimizer(
    groups: Sequence[ParameterGroup], optim: OptimConfig, topology: Topology, seed: int, dtype: torch.dtype
) -> AdamW:
    """Make the optimizer of a config, which DeepSpeed then shows its flat partitions of the weights; see `Muon`."""
    if optim.name == "muon":
        return Muon(groups, optim, topology, seed, dtype)
    return AdamW(groups, optim, topology, seed)


def _rounds(matrices: Sequence[_Matrix], world_size: int) -> Iterator[Sequence[_Matrix]]:
    """Deal the matrices in rounds, one to each rank, the largest first."""
    by_size = sorted(matrices, key=lambda matrix: -matrix.shape[0] * matrix.shape[1])
    for begin in range(0, len(by_size), world_size):
        yield by_size[begin : begin + world_size]
