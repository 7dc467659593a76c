"""Find the rank that holds the others up for long. feed's collective -> stragglers -> trainer.

In a step all ranks wait for the slowest, so each of them takes as long. What tells them apart is how long each works
and how long it waits: a slow rank's loading, forward or backward pass is longer, and its communication shorter.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

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

    @property
    def work(self) -> float:
        """Seconds in which it does not wait for others."""
        return self.loading + self.forward + self.backward


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
        self._recent: deque[Sequence[RankSeconds]] = deque(maxlen=_STEPS)
        self.straggler: Straggler | None = None

    def note(self, step: int, seconds: Sequence[RankSeconds]) -> Event | None:
        """Take in what all ranks did in a step; return an event if one of them begins to be slow for long."""
        self._recent.append(seconds)
        if len(self._hosts) < 2 or len(self._recent) < _STEPS:
            return None
        work = [statistics.median(step[rank].work for step in self._recent) for rank in range(len(self._hosts))]
        slowest = max(range(len(work)), key=work.__getitem__)
        typical = statistics.median_low(work)
        found = Straggler(slowest, work[slowest] - typical)
        told = self.straggler.rank if self.straggler else None
        share = found.seconds / max(statistics.median(sum(step[slowest]) for step in self._recent), 1e-9)
        if share < (_RECOVERED if told == slowest else _SLOW):
            self.straggler = None
            return None
        self.straggler = found
        return None if told == slowest else self._event(step, found, work, typical)

    def _event(self, step: int, found: Straggler, work: Sequence[float], typical: float) -> Event:
        other = work.index(typical)
        parts = {
            name: statistics.median(getattr(s[found.rank], name) - getattr(s[other], name) for s in self._recent)
            for name in ("loading", "forward", "backward")
        }
        most = max(parts, key=parts.__getitem__)
        host = self._hosts[found.rank]
        text = (
            f"rank {found.rank} on {host} holds the others up: in the last {_STEPS} steps it worked"
            f" {work[found.rank]:.3g} s a step without waiting for others, the typical rank {typical:.3g} s; most of"
            f" the difference is {most} ({parts[most]:.3g} s)"
        )
        figures = {"rank": found.rank, "host": host, "seconds": work[found.rank], "typical": typical, "most": most}
        return Event(step, "straggler", text, figures)
