"""PyTorch's AdamW, with moments in fp32 or in bf16, which takes half their memory. engine -> {adamw, muon}.

A running mean that forgets a thousandth a step changes by less than half of bf16's last digit, so rounding to the
nearest would leave it where it is for good. Rounded up or down at random, in proportion to the distance, it is right on
average (Gupta et al. 2015, arXiv 1502.02551). What is drawn depends on the seed, the step and the rank alone, so a run
that resumes in its layout draws the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from pretrain.optim import OptimConfig, ParameterGroup
from pretrain.rng import derive_seed
from pretrain.topology import Topology

_MOMENTS = ("exp_avg", "exp_avg_sq")  # PyTorch's names of AdamW's

_AT_ONCE = 1 << 24  # elements of which an fp32 copy exists at a time


class AdamW(torch.optim.AdamW):
    """PyTorch's fused AdamW; DeepSpeed shows it this rank's flat partitions of the weights.

    Args:
        groups: the weights.
        optim: the learning rate, decay rates, type of the moments and so on.
        topology: this rank's place.
        seed: the run's seed.
    """

    def __init__(self, groups: Sequence[ParameterGroup], optim: OptimConfig, topology: Topology, seed: int) -> None:
        super().__init__(
            [{key: group[key] for key in ("params", "weight_decay", "muon")} for group in groups],
            lr=optim.learning_rate,
            betas=optim.betas,
            eps=optim.eps,
            fused=True,  # one pass over ZeRO's flat partition, on CPU and GPU
        )
        self._rounds_moments = optim.moments == "bf16"
        self._seed = derive_seed(seed, "moments", topology.rank)
        self._numbers: dict[Tensor, int] = {}  # of the partitions, in the order of their first update

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the partitions in the groups as they are now."""
        if not self._rounds_moments:
            super().step()
            return
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    self._update_rounded(flat, group)

    def settle(self) -> None:
        """Give moments that were loaded their type, which PyTorch replaces by that of the weights."""
        if self._rounds_moments:
            for state in self.state.values():
                state.update({key: state[key].bfloat16() for key in _MOMENTS if key in state})

    def _update_rounded(self, flat: Tensor, group: dict[str, Any]) -> None:
        """Update a partition, part by part, with moments that are in fp32 only meanwhile."""
        state = self._begun(flat, _MOMENTS)
        generator = self._generator(flat, state["step"])
        for begin in range(0, flat.numel(), _AT_ONCE):
            part = slice(begin, begin + _AT_ONCE)
            mean, square = (state[key][part].float() for key in _MOMENTS)
            adamw(
                [flat[part]], [flat.grad[part]], [mean], [square], [], [state["step"].clone()],  # type: ignore[index]
                fused=True, amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
                weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
            )  # fmt: skip
            for key, values in zip(_MOMENTS, (mean, square), strict=True):
                state[key][part] = rounded_at_random(values, generator)
        state["step"] += 1

    def _begun(self, flat: Tensor, keys: Sequence[str]) -> dict[str, Any]:
        """Return a partition's state; the first time, moments are zeros of their type."""
        state: dict[str, Any] = self.state[flat]
        if keys[0] not in state:
            state["step"] = torch.zeros((), device=flat.device)
            dtype = torch.bfloat16 if self._rounds_moments else torch.float32
            state.update({key: torch.zeros_like(flat, dtype=dtype) for key in keys})
        return state

    def _generator(self, flat: Tensor, step: Tensor) -> torch.Generator:
        """Return the generator for the rounding of a partition's moments in the update after so many."""
        number = self._numbers.setdefault(flat, len(self._numbers))
        return torch.Generator(flat.device).manual_seed(derive_seed(self._seed, number, int(step)))


def rounded_at_random(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round fp32 to bf16, up or down at random, such that the mean is the value."""
    drawn = torch.randint(1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    # To the bits that are cut off; those that overflow make the last digit that stays one larger
    return (values.view(torch.int32) + drawn).bitwise_and_(-(1 << 16)).view(torch.float32).bfloat16()
