"""Refuse an update in DeepSpeed's step, and time its collectives. {engine, DeepSpeed} -> step_hooks.

Both replace a function of DeepSpeed's for the duration of a block, and put it back.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from pretrain.run.metrics import Meter

_COLLECTIVES = ("all_reduce", "reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")


@contextlib.contextmanager
def refusing(optimizer: object, exceeds: Callable[[float], bool]) -> Iterator[list[float]]:
    """Let DeepSpeed skip a step as it skips one whose gradient is not finite.

    All its optimizers ask one function, by its name in their module, whether the norm of the whole gradient is valid,
    and clear what they keep of the step if it is not.

    Args:
        optimizer: DeepSpeed's.
        exceeds: returns whether to skip a step with this gradient norm, the same on all ranks.
    Yields:
        A list, which then has the gradient norm if the step was refused.
    """
    module: Any = sys.modules[type(optimizer).__module__]
    is_invalid, refused = module.is_invalid_grad_norm, list[float]()

    def is_refused(norm: Any) -> bool:
        if is_invalid(norm):
            return True
        if exceeds(float(norm)):
            refused.append(float(norm))
        return bool(refused)

    module.is_invalid_grad_norm = is_refused
    try:
        yield refused
    finally:
        module.is_invalid_grad_norm = is_invalid


class CommunicationTimer:
    """Times DeepSpeed's blocking collectives by the phase of the step in which they are.

    Args:
        backend: DeepSpeed's, through which all of them go.
    """

    def __init__(self, backend: object) -> None:
        self._backend = backend
        self._phase = "optimizer"

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name the phase inside the block; elsewhere it is "optimizer"."""
        self._phase = name
        try:
            yield
        finally:
            self._phase = "optimizer"

    @contextlib.contextmanager
    def charging(self, meter: Meter) -> Iterator[None]:
        """Charge the collectives inside the block to the meter, as PHASE_communication."""

        def timed(collective: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **named: object) -> object:
                with meter.device_part(f"{self._phase}_communication"):
                    return collective(*arguments, **named)

            return call

        for name in _COLLECTIVES:
            setattr(
                self._backend, name, timed(getattr(self._backend, name))
            )  # of the instance; its class keeps its own
        try:
            yield
        finally:
            for name in _COLLECTIVES:
                delattr(self._backend, name)
