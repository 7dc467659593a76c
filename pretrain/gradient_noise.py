"""Estimate the gradient noise scale from the gradients of micro-batches. engine -> gradient_noise -> recorder.

It says how large a batch is worth its tokens. The gradient of every micro-batch is computed anyway, so that only its
norm is to be taken, before ZeRO reduces, splits or adds it to others.

Source: McCandlish et al. 2018, arXiv 1812.06162, appendix A.1.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pretrain.model.parallel import counts_in_sums
from pretrain.run.run_folder import RunFolder
from pretrain.run.step_log import step_of
from pretrain.topology import Topology

HALF_LIFE = 64  # steps after which an estimate counts half
_WINDOW = 512  # steps that count at all, so that a start can read them back


class GradientNoise(NamedTuple):
    """Unbiased estimates by one step; a single one is far off, and may be negative.

    Attributes:
        signal: squared L2 norm of the gradient that a batch without end would have.
        variance: trace of the covariance of a single target's gradient; the squared norm of the gradient of B targets
            is signal + variance / B on average.
    """

    signal: float
    variance: float


def estimate(whole: float, parts: float, n_targets: int, squared_targets: float) -> GradientNoise | None:
    """Estimate signal and variance from a batch and its parts, which need not be equally large.

    With n_m targets in part m, N in all, and q the sum of (n_m / N)^2, the squared norms have the means
    whole: signal + variance / N, and parts: q signal + variance / N. For equal parts this is the source's formula.

    Args:
        whole: squared norm of the batch's gradient, the mean over its targets.
        parts: sum over the parts of the squared norms of what each adds to it.
        n_targets: N.
        squared_targets: sum of the n_m^2.
    Returns:
        None if one part has all targets, from which nothing follows.
    """
    share = squared_targets / n_targets**2
    if share >= 1:
        return None
    signal = (whole - parts) / (1 - share)
    return GradientNoise(signal, n_targets * (parts - share * signal))


class MicroBatchNorms:
    """Takes the norms of the gradients of each micro-batch of a step. Every rank calls the same methods.

    Args:
        model: already given to DeepSpeed; hooks on its weights see each gradient whole, as this tensor-parallel rank
            has it, whatever the ZeRO stage.
        is_on: whether to take them at all.
    """

    def __init__(self, model: nn.Module, topology: Topology, is_on: bool) -> None:
        self._topology = topology
        self._measures = False
        self._norms: list[Tensor] = []
        for parameter in model.parameters() if is_on else ():
            if parameter.requires_grad and counts_in_sums(parameter, topology.tp_rank):
                parameter.register_hook(self._note)  # type: ignore[no-untyped-call]
        self._is_on = is_on

    def begin(self, micro_steps: int) -> None:
        """Begin a step of this many micro-batches a rank."""
        self._measures = self._is_on and micro_steps * self._topology.dp_size > 1
        self._norms = []
        self._squares = torch.zeros((), dtype=torch.float64, device=self._topology.device)
        self._squared_targets = 0

    def _note(self, gradient: Tensor) -> None:
        if self._measures:
            # Of each row: one sum of all squares in fp32 is off by 1e-3 at 50 million values.
            self._norms.append(torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.float32).flatten())

    def end_micro_batch(self, n_targets: int) -> None:
        """Add up the norms of a micro-batch whose backward pass is done.

        Args:
            n_targets: those of the micro-batch.
        """
        if self._measures:
            if self._norms:
                self._squares += torch.cat(self._norms).double().square().sum()
                self._norms = []
            self._squared_targets += n_targets**2

    def finish(self, grad_norm: float, n_targets: int) -> GradientNoise | None:
        """Return the step's estimates; None if they cannot be made.

        Args:
            grad_norm: of the global batch.
            n_targets: of the global batch, by which the micro-batches' losses were divided, times dp_size.
        """
        if not self._measures:
            return None
        counted = self._squared_targets if self._topology.tp_rank == 0 else 0
        own = torch.stack((self._squares, torch.full_like(self._squares, counted)))
        squares, squared_targets = self._topology.sum_over_all(own).tolist()
        return estimate(grad_norm**2, squares / self._topology.dp_size**2, n_targets, squared_targets)


class NoiseScale:
    """Smooths the estimates of a run's steps: means of both, in which a step counts half after `HALF_LIFE` others.

    What it returns follows from the last `_WINDOW` steps alone, which metrics.jsonl holds unrounded, so that a run that
    was killed goes on with the same figures.

    Args:
        noted: the steps before, each with its estimates.
    """

    def __init__(self, noted: Iterable[tuple[int, GradientNoise]] = ()) -> None:
        self._noted = deque(noted)

    def note(self, step: int, noise: GradientNoise | None) -> float | None:
        """Return the noise scale after a step, in targets; None while the means show no signal.

        Args:
            noise: the step's estimates, if there are any.
        """
        if noise is not None:
            self._noted.append((step, noise))
        while self._noted and self._noted[0][0] <= step - _WINDOW:
            self._noted.popleft()
        weights = [0.5 ** ((step - noted) / HALF_LIFE) for noted, _ in self._noted]
        signal, variance = (
            sum(weight * noise[i] for weight, (_, noise) in zip(weights, self._noted, strict=True)) for i in (0, 1)
        )
        return variance / signal if signal > 0 else None


def last_noise(folder: RunFolder, step: int) -> Iterator[tuple[int, GradientNoise]]:
    """Read the estimates of the steps up to one that `NoiseScale` has to know."""
    for record in folder.metrics.read(step - _WINDOW, step):
        if (found := _noise_in(record)) is not None:
            yield step_of(record), found


def _noise_in(record: Mapping[str, object]) -> GradientNoise | None:
    signal, variance = record.get("gradient_signal"), record.get("gradient_variance")
    return GradientNoise(signal, variance) if isinstance(signal, float) and isinstance(variance, float) else None
