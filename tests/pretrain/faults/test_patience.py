"""A run ends at the evaluation at which a plain search over all of them says so, whenever it was killed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pretrain.checkpoint.store import CheckpointConfig, CheckpointStore
from pretrain.config import load_config
from pretrain.evaluation.scores import line_names
from pretrain.faults.patience import StopRule, ending
from pretrain.run.eval_figure import EvalFigure
from pretrain.run.run_folder import RunFolder
from pretrain.standing import Standing
from pretrain.topology import Topology
from shards import CheckpointError, ConfigError
from tests.tiny_run import write_config

METRIC = "eval/macro/perplexity"
SUITE = {"suite": "shards/sample/eval", "every": 2}


def first_end(costs: list[float], patience: int, min_delta: float, explode: float) -> tuple[int, str] | None:
    """Search from the front, with nothing carried from one evaluation to the next."""
    for now in range(len(costs)):
        if now and costs[now] > explode * min(costs[:now]):
            return now, "explosion"
        improved = [0]
        for at in range(1, now + 1):
            if costs[at] < costs[improved[-1]] - min_delta:
                improved.append(at)
        if now - improved[-1] >= patience:
            return now, "patience"
    return None


@given(
    st.lists(st.one_of(st.floats(1, 9), st.sampled_from([2.0, 2.05, 90.0, math.inf])), min_size=1, max_size=30),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from([1.5, 10.0]),
)
def test_a_run_ends_where_a_plain_search_says(costs: list[float], patience: int, delta: float, explode: float) -> None:
    if math.isinf(costs[0]):
        costs[0] = 9.0
    rule = StopRule(metric=METRIC, patience=patience, min_delta=delta, explode=explode)
    # As a run asks: after each evaluation, with all before it, wherever it was resumed in between
    found = (ending(rule, {10 * i: cost for i, cost in enumerate(costs[: now + 1])}) for now in range(len(costs)))
    ends = [(event.step // 10, event.kind) for event in found if event]
    assert (ends[0] if ends else None) == first_end(costs, patience, delta, explode)


def test_an_end_says_why_and_how_to_go_on() -> None:
    rule = StopRule(metric="eval/wiki/accuracy", patience=2)
    event = ending(rule, {0: -0.1, 10: -0.5, 20: -0.4, 30: -0.45})
    assert event is not None
    assert "eval/wiki/accuracy has not improved in 2 evaluations (0.45 now, 0.5 at step 10)" in event.text
    assert "train.stop=null" in event.text
    assert event.figures["best_step"] == 10


@pytest.mark.parametrize(
    ("train", "checkpoint", "evaluation", "problem"),
    [
        ({"stop": {"metric": METRIC}}, {}, SUITE, "needs patience"),
        ({"stop": {"metric": "macro/perplexity", "patience": 1}}, {}, SUITE, "eval/"),
        ({"stop": {"metric": "eval/wiki/accuracy", "explode": 10.0}}, {}, SUITE, "a metric that grows"),
        ({"stop": {"metric": METRIC, "explode": 1.0}}, {}, SUITE, "train.stop.explode"),
        ({"stop": {"metric": METRIC, "patience": 1}}, {}, {}, "set evaluation.suite and evaluation.every"),
        ({}, {"best": METRIC, "every": 3}, SUITE, "a multiple of evaluation.every=2"),
        ({}, {"best": METRIC}, {}, "there is no figure"),
        ({}, {"best": "eval/macro/tokens"}, SUITE, "checkpoint.best"),
    ],
)
def test_a_rule_that_cannot_work_is_refused(
    tmp_path: Path, train: Any, checkpoint: Any, evaluation: Any, problem: str
) -> None:
    path = write_config(tmp_path, "a", train=train, checkpoint=checkpoint, evaluation=evaluation)
    with pytest.raises((ConfigError, ValidationError), match=problem):
        load_config(path)


def evaluation(step: int, value: float | None, suite: str = "s@1") -> list[dict[str, object]]:
    lines = [("wiki", 1.0), ("macro", value), ("micro", 1.0)]
    return [{"step": step, "suite": suite, "domain": domain, "bits_per_byte": found} for domain, found in lines]


def test_the_best_checkpoint_is_kept_and_found(tmp_path: Path, topology: Topology) -> None:
    folder, config = RunFolder(tmp_path), CheckpointConfig(keep=1, best="eval/macro/bits_per_byte")
    store = CheckpointStore(folder.checkpoints, config)
    standing = Standing(None, store, folder, "s@1", topology)
    kept = []
    values: list[float | None] = [9.0, 3.0, 2.0, 4.0, None, 2.0, 1.5]
    for number, value in enumerate(values):
        step = 10 * number
        if step:
            store.folder_of(step).mkdir(parents=True)
            store.complete(step, [], 0.0)
            store.prune()
        if step == 40:  # a start that resumes knows the same
            store = CheckpointStore(folder.checkpoints, config)
            standing = Standing(None, store, folder, "s@1", topology)
        folder.evals.append(*evaluation(step, value), *evaluation(step, 0.0, "another@2"))
        standing.note(evaluation(step, value))
        kept.append(store.steps())
    assert kept == [[], [10], [10, 20], [20, 30], [20, 40], [20, 50], [20, 60]]
    assert store.find("best").step == 60
    store.prune()
    assert store.steps() == [60]
    with pytest.raises(ConfigError, match=r"checkpoint\.best"):
        CheckpointStore(folder.checkpoints, CheckpointConfig()).find("best")
    with pytest.raises(CheckpointError, match="evaluated"):
        CheckpointStore(folder.checkpoints, config).find("best")


def test_figures_are_named_as_in_evals() -> None:
    assert EvalFigure.parse("eval/source:pile/code/accuracy") == ("source:pile/code", "accuracy")
    assert line_names(("a", "b", "c"), ("x", "x", "y")) == ["a", "b", "c", "source:x", "macro", "micro"]
