"""An evaluation is complete with the lines of the average that is kept; what is there already is not scored again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pretrain import held_out
from pretrain.evaluation.eval_set import EvalSet
from pretrain.evaluation.scores import DocumentScores, ScoresOfAverage, evaluated_steps, record_scores
from pretrain.evaluation.task_scores import TaskItems
from pretrain.evaluation.tasks import TaskSet
from pretrain.held_out import HeldOut, warn_of_unscored_average
from pretrain.run.run_folder import RunFolder

ONE = np.ones(1, np.int64)
DOMAIN, KEY = np.zeros(1, np.int32), np.ones(1, np.uint64)
SUITE = EvalSet("s@1", 8, ("d",), ("d",), DOMAIN, KEY, ONE, ONE, [], 0)
TASK = TaskSet("t@1", 8, "t", "acc_raw", TaskItems(ONE, ONE, ONE, ONE, ONE), [], 0, 0)
SCORES = DocumentScores("s@1", ("d",), ("d",), DOMAIN, KEY, np.ones(1), ONE, ONE, ONE)


class Scored:
    """What a `HeldOut` scores, with an average that says when it is shown."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.swaps = 0
        self._shown = False
        self.engine: Any = SimpleNamespace(average=SimpleNamespace(show=self._show))
        monkeypatch.setattr(held_out, "evaluate", self._evaluate)

    def _show(self, average: bool) -> None:
        self._shown, self.swaps = average, self.swaps + 1

    def _evaluate(self, score: object, part: EvalSet | TaskSet, *others: object) -> DocumentScores:
        self.done.append("ema:" * self._shown + part.label)
        return SCORES

    def at(self, step: int, averaged: bool, evaluated: dict[str, int], of_average: dict[str, int]) -> list[str]:
        """Return what is scored at a step."""
        self.done.clear()
        topology: Any = None
        found = HeldOut([SUITE, TASK], self.engine, topology, 1, evaluated, of_average)
        assert not found.is_done(step)
        scores = found.score(step, lambda: None, averaged)
        assert sum(isinstance(one, ScoresOfAverage) for one in scores) == sum("ema:" in name for name in self.done)
        found.note_done(step)
        assert found.is_done(step)
        assert not found.is_done(step + 1)
        return list(self.done)


def test_what_is_missing_at_a_step_is_scored_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    scored = Scored(monkeypatch)
    old, both = {"s@1": 4, "t@1": 4}, {"s@1": 8, "t@1": 8}
    assert scored.at(8, False, old, {}) == ["s@1", "t@1"]
    assert scored.at(8, True, old, {"s@1": 4}) == ["s@1", "t@1", "ema:s@1"]
    assert scored.at(8, True, both, {"s@1": 4}) == ["ema:s@1"], "launch/evaluate.py scored the weights"
    assert scored.swaps == 4
    assert scored.at(8, True, old | {"s@1": 8}, {"s@1": 8}) == ["t@1"]
    assert scored.swaps == 4, "the weights stay where no suite is due"


def test_an_evaluation_is_complete_with_the_average_where_one_is_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    record_scores(folder, 4, ScoresOfAverage(SCORES), SCORES)
    record_scores(folder, 8, SCORES)  # as launch/evaluate.py does
    assert evaluated_steps(folder)["s@1"] == {4, 8}
    assert evaluated_steps(folder, averaged=True)["s@1"] == {4}


def test_an_average_that_no_suite_scores_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_unscored_average([SUITE, TASK])
    assert caplog.text == ""
    for parts in ([], [TASK]):
        caplog.clear()
        warn_of_unscored_average(parts)
        assert "train.ema keeps an average of the weights, but nothing is scored with it" in caplog.text
