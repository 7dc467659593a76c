"""Handle optimizer steps that changed nothing: report why and with which documents, and end a run with too many.

trainer -> unapplied_steps. The engine skips three kinds of steps on every rank: those whose loss or gradient is not
finite; those whose global batch has no target, where weight decay and momentum would move the weights although nothing
is learned; and, if the config says so, spikes. All ranks decide from the same figures whether to continue,
so they decide alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

from pretrain.run.events import Event, Kind, Tell
from pretrain.run.run_folder import RunFolder
from pretrain.step_stats import StepStats
from pretrain.topology import Topology
from shards import HeadraceError, Origin
from shards.storage.atomic import write_atomically

_NAMED = 3  # documents listed in the message; the file lists all


class UnappliedSteps:
    """Counts consecutive steps that changed nothing, and ends the run if there are too many.

    Args:
        limit: steps in a row that end the run.
        nonfinite_limit: the same, if the last of them was not finite.
        tell: tells of such steps, on rank 0.
        in_a_row: how many of them a resumed run has just made.
    """

    def __init__(
        self, limit: int, nonfinite_limit: int, folder: RunFolder, topology: Topology, tell: Tell, in_a_row: int = 0
    ) -> None:
        self._limit, self._nonfinite_limit = limit, nonfinite_limit
        self._folder = folder
        self._topology = topology
        self._tell = tell
        self._in_a_row = in_a_row

    def note(self, step: int, stats: StepStats, n_targets: int, origins: Callable[[], Sequence[Origin]]) -> None:
        """Record a step's outcome; every rank calls it.

        Args:
            step: counted from 1, as in metrics.jsonl.
            n_targets: targets in the global batch.
            origins: returns the origins of all pieces of the global batch; a collective call.
        Raises:
            HeadraceError: on all ranks, if the run has to end; nothing of the step is kept.
        """
        if stats.applied:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        if stats.refused:
            self._check_refused(step)
            return
        pieces = origins()
        kind: Kind = "nonfinite" if n_targets else "no_targets"
        figures = {"loss": stats.loss, "grad_norm": stats.grad_norm, "in_a_row": self._in_a_row}
        if n_targets:
            found, limit = self._nonfinite(step, stats, pieces), self._nonfinite_limit
            advice = "lower optim.learning_rate, leave documents out, or see train.on_nonfinite"
        else:
            found, limit = _without_targets(step, pieces), self._limit
            advice = "check the sources' texts, text_key, bos and eos, and where there are prompts template and loss_on"
        if self._in_a_row >= limit:
            self._end(step, kind, f"{found}. That is {self._in_a_row} in a row that changed nothing", advice)
        if n_targets or self._in_a_row == 1:
            self._tell(Event(step, kind, f"{found}; it changed nothing", figures))

    def _check_refused(self, step: int) -> None:
        """End the run if too many steps were refused as spikes, each of which was told as one."""
        if self._in_a_row >= self._limit:
            found = f"step {step} is the last of {self._in_a_row} in a row that changed nothing, and stands out"
            advice = "lower optim.learning_rate, raise train.spike_score, or set train.on_spike=mark"
            self._end(step, "spike", found, advice)

    def _end(self, step: int, kind: Kind, found: str, advice: str) -> NoReturn:
        """Tell that the run ends, and raise HeadraceError, which says more."""
        text = f"step {step}: {self._in_a_row} steps in a row have changed nothing, so the run ends without saving"
        self._tell(Event(step, kind, text, {"in_a_row": self._in_a_row}))
        raise HeadraceError(f"{found}: the run ends without saving, and the last checkpoint is kept; {advice}")

    def _nonfinite(self, step: int, stats: StepStats, pieces: Sequence[Origin]) -> str:
        """List the documents of a non-finite step in the run's folder; return a description."""
        found = f"step {step}: loss {stats.loss:g}, gradient norm {stats.grad_norm:g}"
        if not self._topology.is_main:
            return found
        table = self._folder.nonfinite(step)
        table.parent.mkdir(exist_ok=True)
        lines = ["\t".join(Origin._fields), *("\t".join(map(str, piece)) for piece in pieces)]
        write_atomically(table, "\n".join(lines) + "\n")
        return f"{found}; its {_documents(pieces)} are listed in {table}"


def _without_targets(step: int, pieces: Sequence[Origin]) -> str:
    found = f"step {step}: there is nothing to predict in its batch, hence no loss, since"
    if not pieces:
        return f"{found} its rows are empty"
    return f"{found} none of its pieces has a second token ({_documents(pieces)})"


def _documents(pieces: Sequence[Origin]) -> str:
    documents = list(dict.fromkeys((piece.source, piece.shard, piece.line) for piece in pieces))
    named = "; ".join(f"{source}: {shard}, line {line}" for source, shard, line in documents[:_NAMED])
    return f"{len(documents)} documents ({named}{', ...' if len(documents) > _NAMED else ''})"
