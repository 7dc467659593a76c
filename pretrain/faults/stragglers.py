"""Find the rank that holds the others up for long. feed's collective -> stragglers -> trainer.

In a step all ranks wait for the slowest, so each of them takes as long. What tells them apart is how long each works
and how long it waits: a slow rank's loading, forward or backward pass is longer, and its communication shorter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pretrain.run.events import Event

_STEPS = 20  # over which a rank's seconds are compared, by their medians
_SLOW = 0.1  # of its seconds by which a rank has to be slower than the typical one to be told
_RECOVERED = 0.05  # of the same, below which it is no longer slow


class RankSeconds(NamedTuple):
    """What a rank did in a step.

    Attributes:
        loading: waiting for its own data, without what it then waits for other ranks.
        forward, backward: computing; with tensor parallelism and ZeRO-3 also waiting for others within it. Where
            communication overlaps with it, less by that.
        communication: DeepSpeed's within the two, which is mostly waiting for slower ranks.
    """

    loading: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    communication: float = 0.0


_WORK = ("loading", "forward", "backward")  # the first fields of RankSeconds: in them a rank does not wait for others


class Straggler(NamedTuple):
    """A rank that holds the others up.

    Attributes:
        seconds: that it works longer than the typical rank, in a step.
    """

    rank: int
    seconds: float


class StragglerWatch:
    """Compares the ranks over the last steps.

    Args:
        hosts: each rank's node.
    Attributes:
        straggler: the rank that was told of and is still slow; None for most steps.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = hosts
        self._recent: deque[npt.NDArray[np.float64]] = deque(maxlen=_STEPS)  # of each step: [ranks, RankSeconds]
        self.straggler: Straggler | None = None

    def note(self, step: int, seconds: Sequence[RankSeconds]) -> Event | None:
        """Take in what all ranks did in a step; return an event if one of them begins to be slow for long."""
        self._recent.append(np.array(seconds))
        if len(self._hosts) < 2 or len(self._recent) < _STEPS:
            return None
        recent = np.stack(self._recent)
        work = np.median(recent[:, :, : len(_WORK)].sum(2), axis=0)
        slowest = int(work.argmax())
        # Of an even number of ranks the lower of the two in the middle, so of two ranks the faster
        other = int(work.argsort(kind="stable")[(len(work) - 1) // 2])
        found = Straggler(slowest, float(work[slowest] - work[other]))
        told = self.straggler.rank if self.straggler else None
        share = found.seconds / max(float(np.median(recent[:, slowest].sum(1))), 1e-9)
        if share < (_RECOVERED if told == slowest else _SLOW):
            self.straggler = None
            return None
        self.straggler = found
        return None if told == slowest else self._event(step, recent, work, slowest, other)

    def _event(
        self, step: int, recent: npt.NDArray[np.float64], work: npt.NDArray[np.float64], slow: int, other: int
    ) -> Event:
        """Describe that a rank is slow.

        Args:
            recent: [steps, ranks, RankSeconds].
            work: [ranks], the seconds of each in a step.
            slow, other: the rank and a typical one.
        """
        parts = dict(zip(_WORK, np.median(recent[:, slow] - recent[:, other], axis=0).tolist(), strict=False))
        most = max(parts, key=parts.__getitem__)
        host, seconds, typical = self._hosts[slow], float(work[slow]), float(work[other])
        text = (
            f"rank {slow} on {host} holds the others up: in the last {_STEPS} steps it worked {seconds:.3g} s a step"
            f" without waiting for others, the typical rank {typical:.3g} s; most of the difference is {most}"
            f" ({parts[most]:.3g} s)"
        )
        figures = {"rank": slow, "host": host, "seconds": seconds, "typical": typical, "most": most}
        return Event(step, "straggler", text, figures)
