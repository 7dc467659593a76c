"""Go back before a spike and pass its batches over, while the run goes on. trainer -> rewind -> {run folder, start}.

What `--from-step` and `data.skip_steps` do by hand. The steps to pass over follow from the spike alone, and not from
which checkpoint is there: the steps between are trained again, and come out as before. So a run that is killed at any
point comes to the same weights.
"""

from __future__ import annotations

import logging

from pretrain.checkpoint.resume import open_verified
from pretrain.checkpoint.store import CheckpointStore
from pretrain.run.run_folder import Rewind, RunFolder
from pretrain.topology import Topology
from shards import CheckpointError

_logger = logging.getLogger(__name__)


class Rewinder:
    """Decides where a run goes back to.

    Args:
        steps: passed over before a run goes on, the spike's being the last of them.
        limit: how often a run goes back, in all its starts together.
    """

    def __init__(self, store: CheckpointStore, folder: RunFolder, topology: Topology, steps: int, limit: int) -> None:
        self._store, self._folder, self._topology = store, folder, topology
        self._steps, self._limit = steps, limit

    def decide(self, spike: int) -> Rewind | str:
        """Decide to go back before a spike, and record it, so that any start brings it to its end; all ranks call it.

        Args:
            spike: the step; no save is in progress.
        Returns:
            Where to, or why the run cannot go back.
        """
        topology = self._topology
        first = max(1, spike - self._steps + 1)
        candidates = [step for step in self._store.steps() if step < first] if topology.is_main else []
        made = len(self._folder.rewinds()) if topology.is_main else 0
        candidates, made = topology.broadcast_object((candidates, made))
        if made >= self._limit:
            return f"the run went back {made} times already (train.max_rewinds), so this time it goes on"
        for step in reversed(candidates):
            try:
                open_verified(self._store, step, topology)
            except CheckpointError as error:
                _logger.warning("the run cannot go back to step %d: %s", step, error)
                continue
            rewind = Rewind(spike=spike, step=step, passed_over=(first, spike))
            if topology.is_main:
                # In this order: a start that finds only the first goes back, meets the spike again and comes here.
                self._folder.note_going_back(step)
                self._folder.note_rewind(rewind)
            return rewind
        return f"there is no checkpoint before step {first} to go back to, so the run goes on"
