"""Score the checkpoints of a run afterwards, or as they appear.

store, forward_model -> checkpoints -> evals.jsonl. The run may be training meanwhile: nothing in its folder changes
except that lines are added to evals.jsonl, and a checkpoint that is removed while it is read is skipped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from pretrain.checkpoint.resume import open_verified
from pretrain.checkpoint.store import CheckpointStore, WantedStep
from pretrain.evaluation.plausibility import warn_of_doubts
from pretrain.evaluation.scores import Scores, evaluated_steps, record_scores
from pretrain.evaluation.scoring import Part, evaluate
from pretrain.exchange.base import Base, run_weights
from pretrain.inference.forward_model import ForwardModel
from pretrain.model.architecture import ModelConfig
from pretrain.model.weights import Weights
from pretrain.run.run_folder import RunFolder
from pretrain.topology import Topology
from shards import HeadraceError

_logger = logging.getLogger(__name__)

ModelOf = Callable[[int], ModelConfig]  # a run's model as a checkpoint of a step has it

_PATIENCE_SECONDS = 3600.0  # how long to wait for an idle run


@dataclass(frozen=True)
class Evaluator:
    """One model, and a suite, tasks or both, for evaluating any number of weights.

    Attributes:
        model_of: whose positions differ between the stages of a run, if it has some.
        base: the model under the adapters, if it is of a run that trains some.
    """

    model: ForwardModel
    parts: Sequence[Part[Scores]]
    topology: Topology
    batch_size: int
    model_of: ModelOf
    base: Base | None = None

    @property
    def labels(self) -> list[str]:
        """Return what its results are called in evals.jsonl."""
        return [part.label for part in self.parts]

    def num_targets(self, labels: Collection[str]) -> int:
        """Return the number of tokens that are predicted in some of its parts."""
        return sum(int(part.targets.sum()) for part in self.parts if part.label in labels)

    def score(self, weights: Weights) -> list[Scores]:
        """Score one set of weights. Every rank must call it."""
        self.model.set_weights(weights)
        return self._score(self.labels)

    def score_checkpoint(self, store: CheckpointStore, step: int, labels: Collection[str]) -> list[Scores]:
        """Score one checkpoint of a run. Every rank must call it.

        Args:
            labels: of the parts to score.
        Raises:
            HeadraceError: on all ranks, if any of them cannot read the checkpoint.
        """
        try:
            load_checkpoint(self.model, store, step, self.topology, self.model_of, self.base)
        except HeadraceError as error:
            raise HeadraceError(f"the checkpoint of step {step} cannot be evaluated: {error}") from None
        return self._score(labels)

    def _score(self, labels: Collection[str]) -> list[Scores]:
        due = (part for part in self.parts if part.label in labels)
        return [evaluate(self.model.score, part, self.topology, self.batch_size) for part in due]


def missing_labels(folder: RunFolder, labels: Sequence[str], step: int) -> list[str]:
    """Return the labels under which a step has not been evaluated."""
    done = evaluated_steps(folder)
    return [label for label in labels if step not in done[label]]


def load_checkpoint(
    model: ForwardModel,
    store: CheckpointStore,
    step: WantedStep,
    topology: Topology,
    model_of: ModelOf,
    base: Base | None = None,
) -> int:
    """Load one checkpoint's weights, and its positions, into a model, the same one on every rank, which all call it.

    The files are compared with their hashes first, each by one rank, so that not every rank reads all of them.

    Args:
        step: None: the newest that rank 0 sees; others may see a newer one if a training saves meanwhile.
        base: the model under the run's adapters, as `open_base` returned it.
    Returns:
        The step.
    Raises:
        HeadraceError: on all ranks, if any of them cannot read the checkpoint.
    """
    chosen = topology.broadcast_object(topology.together(lambda: store.find(step).step if topology.is_main else -1))
    checkpoint = open_verified(store, chosen, topology)
    topology.together(lambda: model.adopt(model_of(chosen)))
    topology.together(lambda: model.set_weights(run_weights(checkpoint, model.config, base)))
    return chosen


def score_steps(
    evaluator: Evaluator, store: CheckpointStore, folder: RunFolder, steps: Iterator[int | None], must_be_there: bool
) -> list[dict[str, object]]:
    """Score checkpoints in turn and record the results. Every rank must call it.

    Args:
        steps: read on rank 0 only; yields None while there is nothing new.
        must_be_there: whether an unreadable checkpoint is an error rather than skipped with a warning.
    Returns:
        The lines of evals.jsonl, on rank 0.
    """
    topology = evaluator.topology
    records: list[dict[str, object]] = []

    def named() -> tuple[int | None, list[str]]:
        step = next(steps, -1) if topology.is_main else None
        return step, missing_labels(folder, evaluator.labels, step) if step not in (None, -1) else []

    while (found := topology.broadcast_object(topology.together(named)))[0] != -1:
        step, labels = found
        if step is None:
            continue  # nothing new yet; this keeps the other ranks' collective from timing out
        begin = time.perf_counter()
        try:
            evaluation = evaluator.score_checkpoint(store, step, labels)
        except HeadraceError as error:
            if must_be_there:
                raise
            _logger.warning("%s; it is skipped", error)
            continue
        if topology.is_main:
            still = missing_labels(folder, labels, step)  # the training may have scored some meanwhile
            fresh = record_scores(folder, step, *(scores for scores in evaluation if scores.suite in still))
            warn_of_doubts(fresh, evaluator.model.config)
            records += fresh
            rate = evaluator.num_targets(labels) / (seconds := time.perf_counter() - begin)
            names = ", ".join(labels)
            _logger.info("step %d: %s scored in %.1f s, %.0f tokens/s with loading", step, names, seconds, rate)
    return records


def new_checkpoints(
    store: CheckpointStore,
    done: set[int],
    last_step: Callable[[], int],
    is_idle: Callable[[], bool],
    poll_seconds: float,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[int | None]:
    """Yield the steps of new checkpoints, oldest first, until the run's last; None whenever there is no new one yet.

    Args:
        done: steps not to yield again.
        last_step: returns the run's last step according to its current config.
        is_idle: whether no process is working on the run; after an hour of that, waiting ends.
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
                _logger.warning("no process has worked on %s for an hour, and it is not finished", store.root.parent)
                return
            yield None
            sleep(poll_seconds)
