"""The held-out suite, scored between steps. engine, EvalSet -> held_out -> trainer."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pretrain.engine import Engine
from pretrain.evaluation.eval_set import EvalSet
from pretrain.evaluation.scores import DocumentScores
from pretrain.evaluation.scoring import evaluate
from pretrain.model.loss import Scores, Targets
from pretrain.topology import Topology


class HeldOut:
    """Scores a suite with the model in training, and remembers the last step for which it did.

    Args:
        batch_size: rows that a rank scores at once.
        evaluated: the last step whose evaluation was recorded; -1 if there is none.
    """

    def __init__(self, eval_set: EvalSet, engine: Engine, topology: Topology, batch_size: int, evaluated: int) -> None:
        self.evaluated = evaluated
        self._eval_set = eval_set
        self._engine = engine
        self._topology = topology
        self._batch_size = batch_size

    def score(self, before_batch: Callable[[], None]) -> DocumentScores:
        """Score every document; every rank calls it.

        Args:
            before_batch: is called before each batch on all ranks; it may raise, if it does so on all of them.
        """

        def score(tokens: Tensor, segment_ids: Tensor, targets: Targets) -> Scores:
            before_batch()
            return self._engine.score(tokens, segment_ids, targets)

        return evaluate(score, self._eval_set, self._topology, self._batch_size)
