"""The suite and the tasks that are scored between steps. engine, {EvalSet, TaskSet} -> held_out -> trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from pretrain.engine import Engine
from pretrain.evaluation.eval_set import EvalSet
from pretrain.evaluation.scores import Scores, ScoresOfAverage
from pretrain.evaluation.scoring import Part, evaluate
from pretrain.model.loss import Scores as TokenScores
from pretrain.model.loss import Targets
from pretrain.topology import Topology

_logger = logging.getLogger(__name__)


class EvaluationLeft(Exception):
    """All ranks abandon an evaluation because they have agreed to stop."""


def warn_of_unscored_average(parts: Sequence[Part[Scores]]) -> None:
    """Warn if a moving average of the weights is kept, and no suite is there to score it on."""
    if not any(isinstance(part, EvalSet) for part in parts):
        _logger.warning(
            "train.ema keeps an average of the weights, but nothing is scored with it: tasks are not, and"
            " evaluation.suite is null; name a suite, or score what launch/export.py --weights ema writes"
        )


class HeldOut:
    """Scores a suite and tasks with the model in training, and remembers the last step for which it did.

    Args:
        parts: the suite, if there is one, and the tasks; at least one of them.
        batch_size: rows that a rank scores at once.
        evaluated: by label, the last step whose evaluation was recorded; -1 if there is none.
        of_average: the same for the suite scored with the moving average of the weights; empty if there is no average
            to score at the step that the run resumes from, or no suite.
    """

    def __init__(
        self,
        parts: Sequence[Part[Scores]],
        engine: Engine,
        topology: Topology,
        batch_size: int,
        evaluated: Mapping[str, int],
        of_average: Mapping[str, int],
    ) -> None:
        self._parts = parts
        self._engine = engine
        self._topology = topology
        self._batch_size = batch_size
        self._evaluated = dict(evaluated)
        self._of_average = dict(of_average)

    def is_done(self, step: int) -> bool:
        """Return whether all of it was scored at a step, and recorded."""
        return all(last == step for last in (*self._evaluated.values(), *self._of_average.values()))

    def note_done(self, step: int) -> None:
        """Remember that all of it was scored at a step, and recorded."""
        self._evaluated = dict.fromkeys(self._evaluated, step)
        self._of_average = dict.fromkeys(self._of_average, step)

    def score(self, step: int, before_batch: Callable[[], None], averaged: bool = False) -> list[Scores]:
        """Score what was not yet scored at a step; every rank calls it.

        Args:
            before_batch: is called before each batch on all ranks; it may raise `EvaluationLeft`, on all of them.
            averaged: whether to score the suite with the moving average of the weights as well, which there then is.
        """

        def score(tokens: Tensor, segment_ids: Tensor, targets: Targets) -> TokenScores:
            before_batch()
            return self._engine.score(tokens, segment_ids, targets)

        due = [part for part in self._parts if self._evaluated[part.label] != step]
        suites = [part for part in self._parts if averaged and isinstance(part, EvalSet)]
        due_of_average = [part for part in suites if self._of_average.get(part.label) != step]
        scores = [evaluate(score, part, self._topology, self._batch_size) for part in due]
        if not due_of_average:
            return scores
        self._engine.average.show(True)
        try:
            of_average = [evaluate(score, part, self._topology, self._batch_size) for part in due_of_average]
        except EvaluationLeft:  # any other error may be that of one rank, which then cannot wait for the others
            self._engine.average.show(False)
            raise
        self._engine.average.show(False)
        # So a reader that has found the weights' last line, micro, has found the average's before it.
        return [*map(ScoresOfAverage, of_average), *scores]
