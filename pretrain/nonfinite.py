"""Steps whose loss or gradient was no number: what was in them, and when a run has had too many. trainer -> nonfinite.

The engine has left such a step out already, on every rank. Whether the run goes on is decided by figures that all ranks
share, so all of them decide alike.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from pretrain.engine import StepStats
from pretrain.run_folder import RunFolder
from pretrain.topology import Topology
from shards import HeadraceError, Origin
from shards.durable import write_atomically

_logger = logging.getLogger(__name__)

_NAMED = 3  # documents in the message; the file has all


class NonFiniteSteps:
    """Counts them.

    Args:
        limit: how many in a row end the run.
    """

    def __init__(self, limit: int, folder: RunFolder, topology: Topology) -> None:
        self._limit = limit
        self._folder = folder
        self._topology = topology
        self._in_a_row = 0

    def note(self, step: int, stats: StepStats, origins: Callable[[], Sequence[Origin]]) -> None:
        """Takes up what a step came to; every rank calls it.

        Args:
            step: counted from 1, as in metrics.jsonl.
            origins: of all pieces of the global batch; asked of all ranks together.
        Raises:
            HeadraceError: on all ranks, if the run is to end; nothing of the step has been kept.
        """
        if stats.applied:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        pieces = origins()
        found = f"step {step}: loss {stats.loss:g}, gradient norm {stats.grad_norm:g}"
        if self._topology.is_main:
            table = self._folder.nonfinite(step)
            table.parent.mkdir(exist_ok=True)
            lines = ["\t".join(Origin._fields), *("\t".join(map(str, piece)) for piece in pieces)]
            write_atomically(table, "\n".join(lines) + "\n")
            documents = list(dict.fromkeys((piece.source, piece.shard, piece.line) for piece in pieces))
            named = "; ".join(f"{source}: {shard}, line {line}" for source, shard, line in documents[:_NAMED])
            found += f"; its {len(documents)} documents ({named}, ...) are listed in {table}"
        if self._in_a_row >= self._limit:
            raise HeadraceError(
                f"{found}. That is {self._in_a_row} in a row: the run ends without saving, and the last checkpoint"
                " stands; lower optim.learning_rate, or leave documents out, or see train.on_nonfinite"
            )
        if self._topology.is_main:
            _logger.warning("%s; it changed nothing", found)
