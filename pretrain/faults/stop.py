"""Decide when a run stops before its end: {interrupt, deadline} -> stop -> trainer.

Each rank knows only its own signals, and only rank 0 looks at the clock. So a rank that wants to stop says so in the
collective of the next step or evaluation batch, and all ranks stop at the same place.
"""

from __future__ import annotations

import logging

from pretrain.checkpoint.duration import time_for_last_save
from pretrain.faults.deadline import Deadline
from pretrain.faults.interrupt import LAUNCHER_GRACE_SECONDS, Interrupt

_logger = logging.getLogger(__name__)

_FORGETTING = 0.9  # decay of the slowest step's time with each later step


class StopPolicy:
    """Decides whether this rank wants to stop, and keeps what all ranks have agreed on.

    Args:
        interrupt: records the signals that this process receives.
        deadline: the end of the job; only rank 0's has an end.
        save_seconds: estimated duration of a save, used until the first one.
    Attributes:
        agreed: whether all ranks have agreed to stop. It is the same on every rank.
    """

    def __init__(self, interrupt: Interrupt, deadline: Deadline, save_seconds: float) -> None:
        self.agreed = False
        self._interrupt = interrupt
        self._deadline = deadline
        self._save_seconds = save_seconds
        self._slowest_step = 0.0  # seconds, of the last few steps

    def wanted(self) -> bool:
        """Return whether this rank wants to stop."""
        return self._deadline.reached(self._slowest_step, self._save_seconds) or bool(self._interrupt.requested)

    def agree(self, stop: bool) -> None:
        """Record what all ranks decided together; a decision to stop is final."""
        self.agreed = self.agreed or stop

    def note_step(self, seconds: float) -> None:
        """Record how long a step took."""
        self._slowest_step = max(seconds, _FORGETTING * self._slowest_step)

    def note_save(self, seconds: float | None) -> None:
        """Record how long the newest save took, None if none is complete yet; warn if it is too long."""
        if seconds is None or seconds == self._save_seconds:
            return
        self._save_seconds = seconds
        if self._interrupt.has_launcher and time_for_last_save(seconds) + self._slowest_step > LAUNCHER_GRACE_SECONDS:
            _logger.warning(
                "a step takes up to %.0f s and a save, which may have to wait for another, %.0f s, but the"
                " deepspeed launcher kills its processes %.0f s after it was asked to stop: a stopped run may resume"
                " from an older checkpoint; start it with torchrun or srun",
                self._slowest_step, seconds, LAUNCHER_GRACE_SECONDS,
            )  # fmt: skip
