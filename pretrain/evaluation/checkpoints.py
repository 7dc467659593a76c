"""Scores the checkpoints of a run after the fact, or as they appear. store, BareModel -> checkpoints -> evals.jsonl.

The run may be training meanwhile: nothing of it is changed but that lines are added to evals.jsonl, and a checkpoint
that is removed while it is read is passed over.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pretrain.checkpoint.store import CheckpointStore
from pretrain.checkpoint.weights import CheckpointWeights
from pretrain.evaluation.bare_model import BareModel
from pretrain.evaluation.eval_set import EvalSet
from pretrain.evaluation.scores import DocumentScores, eval_records
from pretrain.evaluation.scoring import evaluate
from pretrain.model.weights import Weights, weight_specs
from pretrain.run_folder import RunFolder
from pretrain.topology import Topology
from shards import CheckpointError, HeadraceError

_logger = logging.getLogger(__name__)

_PATIENCE_SECONDS = 3600.0  # after which a run that nobody works on is not waited for any longer


@dataclass(frozen=True)
class Evaluator:
    """One model and one suite, for any number of weights."""

    model: BareModel
    eval_set: EvalSet
    topology: Topology
    batch_size: int

    def score(self, weights: Weights) -> DocumentScores:
        """Every rank calls it."""
        self.model.take(weights)
        return evaluate(self.model.logits, self.eval_set, self.topology, self.batch_size)

    def score_checkpoint(self, store: CheckpointStore, step: int) -> DocumentScores:
        """Every rank calls it.

        Raises:
            HeadraceError: on all ranks, if any of them cannot read the checkpoint.
        """
        failure = ""
        try:
            self.model.take(CheckpointWeights(store.open(step), weight_specs(self.model.config)))
        except (CheckpointError, OSError) as error:  # the other ranks must not wait for this one
            failure = str(error)
        if failures := [found for found in self.topology.gather_objects(failure) if found]:
            raise HeadraceError(f"the checkpoint of step {step} cannot be evaluated: {failures[0]}")
        return evaluate(self.model.logits, self.eval_set, self.topology, self.batch_size)


def write_down(folder: RunFolder, step: int, scores: DocumentScores) -> list[dict[str, object]]:
    """Adds one evaluation to a run's folder, or to that of a model; rank 0 alone. Returns the lines of evals.jsonl."""
    scores.save(folder.document_scores(step, scores.suite))
    records = eval_records(step, scores)
    for record in records:
        folder.evals.append(record)
    return records


def evaluated_steps(folder: RunFolder, suite: str) -> set[int]:
    """The steps of which the evaluation on a suite stands whole in evals.jsonl."""
    last = {"suite": suite, "domain": "micro"}
    return {int(str(record["step"])) for record in folder.evals.read() if record.items() >= last.items()}


def as_they_appear(
    store: CheckpointStore,
    done: set[int],
    last_step: Callable[[], int],
    is_idle: Callable[[], bool],
    poll_seconds: float,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[int | None]:
    """Steps of checkpoints, oldest first, until the run's last one; None each time that there is nothing new yet.

    Args:
        done: steps not to be named again.
        last_step: of the run, as its config says now.
        is_idle: whether nobody is at work on the run; if so for an hour, it is waited for no longer.
    """
    seen = set(done)
    idle = 0.0
    while True:
        fresh = [step for step in store.steps() if step not in seen]
        for step in fresh:
            seen.add(step)
            yield step
        if seen and max(seen) >= last_step():
            return
        if not fresh:
            idle = idle + poll_seconds if is_idle() else 0.0
            if idle >= _PATIENCE_SECONDS:
                _logger.warning("nobody has worked on %s for an hour, and it is not finished", store.root.parent)
                return
            yield None
            sleep(poll_seconds)
