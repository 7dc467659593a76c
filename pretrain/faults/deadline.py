"""Decide when the last save must begin to finish before the job's time is up. Slurm -> deadline -> stop.

Only rank 0 looks at the clock; its decision travels with the request to stop.
"""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import datetime

from pretrain.checkpoint.duration import time_for_last_save

_logger = logging.getLogger(__name__)

_SPARE_SECONDS = 15.0  # for shutting down the workers, wandb and the process
_NEWS = 1.25  # the margin is logged again when it has grown by this factor


class Deadline:
    """Compares the remaining time with the time that saving takes.

    Args:
        end: end of the job, in seconds since the epoch; None if there is none.
        clock: returns the current time in the same unit.
    """

    def __init__(self, end: float | None, clock: Callable[[], float] = time.time) -> None:
        self._end = end
        self._clock = clock
        self._logged = 0.0  # the last margin that was logged
        self._reached = False

    def reached(self, step_seconds: float, save_seconds: float) -> bool:
        """Return whether to stop now; once true, it stays true.

        Args:
            step_seconds: duration of the slowest recent step; one more is trained before stopping.
            save_seconds: duration of the last save; a guess before the first one.
        """
        if self._end is None:
            return False
        margin = time_for_last_save(save_seconds) + 2 * step_seconds + _SPARE_SECONDS
        left = self._end - self._clock()
        if margin > _NEWS * self._logged:
            self._logged = margin
            _logger.info(
                "the job ends at %s, in %.0f s; the last save begins %.0f s before that: a save takes %.1f s, a"
                " step %.1f s",
                datetime.fromtimestamp(self._end).strftime("%F %T"), left, margin, save_seconds, step_seconds,
            )  # fmt: skip
        if left < margin and not self._reached:
            self._reached = True
            _logger.warning("the job ends in %.0f s: saving now, for which %.0f s were reserved", left, margin)
        return self._reached


def job_end(environment: Mapping[str, str]) -> float | None:
    """Return when this process's Slurm job will end, in seconds since the epoch; None without a job or a limit."""
    if end := environment.get("SLURM_JOB_END_TIME"):
        return float(end)
    if "SLURM_JOB_ID" not in environment:
        return None
    command = ["squeue", "--noheader", "--jobs", environment["SLURM_JOB_ID"], "--format", "%e"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
        if found in ("", "NONE", "N/A", "Unknown"):
            return None
        return datetime.fromisoformat(found).timestamp()  # squeue prints this node's local time
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        _logger.warning("the job's end is unknown, so no save will be made ahead of it: %s", error)
        return None
