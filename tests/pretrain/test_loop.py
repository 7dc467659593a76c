"""Wherever a run is stopped, its starts together train, save and evaluate what an undisturbed start does."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain.checkpoint.state import RunState
from pretrain.checkpoint.state_hash import StateHash
from pretrain.checkpoint.store import CheckpointConfig
from pretrain.evaluation.eval_set import EvaluationConfig
from pretrain.faults.interrupt import Interrupt
from pretrain.faults.spikes import SpikeWatch
from pretrain.faults.stop import StopPolicy
from pretrain.faults.stragglers import RankSeconds, StragglerWatch
from pretrain.faults.watchdog import Watchdog
from pretrain.feed import FeedLeft, StepBatch
from pretrain.loop import train
from pretrain.optim import OptimConfig, SchedulePart
from pretrain.run.events import Event
from pretrain.run.metrics import Meter, MetricsConfig
from pretrain.step_stats import StepStats
from pretrain.stepper import Step
from pretrain.trainer import Trainer
from shards import CheckpointError

SAVED_EVERY, EVALUATED_EVERY, BATCHES = 4, 3, 2  # steps, steps, batches of an evaluation
HASHED_EVERY = 5  # steps
HASHES = StateHash("0", "1")
DATA_END = 8  # number of steps that the data lasts
GAP_AFTER, EMPTY = 5, 4  # a step, and batches without a row that follow it


class Run:
    """A run folder's content over several starts, and the parts of a start that write to it."""

    def __init__(self, steps: int | None, with_suite: bool = True) -> None:
        self.steps, self.with_suite = steps, with_suite
        self.state = RunState(0, 0, {}, "", restarts=0, config_hash="", tp_size=1, dp_size=1, zero_stage=1)
        self.trained: list[int] = []
        self.saved: list[int] = []
        self.evaluated: list[int] = []
        self.data_end: int | None = None
        self.saves_fail = False
        self.hashed: list[int] = []
        self.told: list[Event] = []
        self.ends_by_rule_at: int | None = None

    def start(self, looks: int = 10**9) -> bool:
        """Train until the run is finished, or has checked this many times whether to stop."""
        looked, self.scored = 0, max(self.evaluated, default=-1)

        def is_over(step_seconds: float, save_seconds: float) -> bool:
            nonlocal looked
            looked += 1
            return looked >= looks

        deadline: Any = SimpleNamespace(reached=is_over)
        parts: Any = SimpleNamespace(
            engine=SimpleNamespace(
                train_step=lambda *arguments: StepStats(1.0, 0.0, 1.0, applied=True), state_hash=lambda: HASHES,
                average=None, adopt=lambda model: None, topology=SimpleNamespace(is_main=False),
            ),
            feed=SimpleNamespace(
                next=self.next, state=lambda: None, cursors=lambda: None, origins=list, skipped_at_end=([], []),
            ),
            journal=SimpleNamespace(
                log_step=self.log_step, log_evals=self.log_evals,
                log_data_end=self.end_data, log_cursors=lambda *arguments: None, log_skipped=lambda *arguments: None,
                tell=self.told.append, has_told=self.has_told,
            ),
            recorder=SimpleNamespace(
                meter=Meter(), note_save=lambda seconds: None, seconds=RankSeconds(),
                record=self.record,
            ),
            saver=SimpleNamespace(
                save=self.save, finish=self.finish, check_lease=lambda: None, settle=lambda busy: None,
                pulse=lambda: None, busy=False, seconds=None, failed=0,
            ),
            held_out=SimpleNamespace(
                score=self.score, is_done=lambda step: step == self.scored, note_done=self.note_done
            ),
            stop=StopPolicy(Interrupt(), deadline, save_seconds=0.0),
            watchdog=Watchdog(None, 0, self.told.append),
            unapplied=SimpleNamespace(note=lambda *arguments: None),
            spikes=SpikeWatch(4, 8.0, []),
            stragglers=StragglerWatch(["node"]),
            profiler=SimpleNamespace(begin_step=lambda step: None, end_step=lambda step: None),
            tripwires=SimpleNamespace(note=lambda record: []),
            standing=SimpleNamespace(note=self.judge, ending=self.ending),
        )  # fmt: skip
        if not self.with_suite:
            parts.held_out = None
        config: Any = SimpleNamespace(
            train=SimpleNamespace(steps=self.steps, weight_hash_every=HASHED_EVERY, on_spike="mark", ema=None),
            checkpoint=CheckpointConfig(every=SAVED_EVERY),
            evaluation=EvaluationConfig(every=EVALUATED_EVERY),
            data=SimpleNamespace(skip_steps=()),
            metrics=MetricsConfig(layers_every=None),
            all_stages=[None],
            stage_of=lambda step: None,
            schedule=[SchedulePart(0, OptimConfig(learning_rate=1.0))],
        )
        topology: Any = SimpleNamespace(is_main=False, any=bool)
        self.trainer = Trainer(config, parts, topology, self.steps or DATA_END, self.state)
        self.at = self.state.step
        return train(self.trainer)

    def next(self, wants_stop: Callable[[], bool], saving: bool, seconds: RankSeconds) -> StepBatch | None:
        if self.at >= DATA_END:
            return None
        for _ in range(EMPTY if self.at == GAP_AFTER else 0):
            if wants_stop():
                raise FeedLeft
        self.at += 1
        nothing = torch.zeros(0)
        return StepBatch(
            nothing, nothing, stage=0, n_targets=1, n_tokens=1, n_padding=0, squared_lengths=1, row_hash=1,
            trained_hash=1, n_forgotten=0, tokens_per_source={},
            epoch_per_source={}, skipped=[], skipped_so_far=0, replays=0, contaminated=[],
            stop_requested=wants_stop(), saving=saving,
        )  # fmt: skip

    def record(self, made: Step, *others: Any) -> SimpleNamespace:
        *_, hashes = others
        if hashes:
            self.hashed.append(made.state.step)
        return SimpleNamespace(step_seconds=0.0)

    def log_step(self, record: object, layers: object, evals_follow: bool) -> None:
        self.trained.append(self.trainer.state.step)
        assert evals_follow == (self.with_suite and (self.at % EVALUATED_EVERY == 0 or self.at == self.steps))

    def has_told(self, step: int, kind: str) -> bool:
        return any((event.step, event.kind) == (step, kind) for event in self.told)

    def log_evals(self, step: int, scores: object) -> list[dict[str, object]]:
        self.evaluated.append(step)
        return []

    def judge(self, records: object) -> None:
        standing = self.trainer._parts.standing
        standing.ending = self.ending

    @property
    def ending(self) -> Event | None:
        """What the evaluations so far say; a new start finds the same in the records."""
        late = self.ends_by_rule_at is not None and max(self.evaluated, default=-1) >= self.ends_by_rule_at
        return Event(self.ends_by_rule_at or 0, "patience", "no progress", {}) if late else None

    def end_data(self, step: int) -> None:
        self.data_end = step

    def save(self, state: RunState, data: object) -> float:
        self.under_way = state
        return 0.0

    def finish(self) -> None:
        if self.saves_fail:
            raise CheckpointError("the disk is full")
        self.state = self.under_way
        self.saved.append(self.state.step)

    def note_done(self, step: int) -> None:
        self.scored = step

    def score(self, step: int, before_batch: Any, averaged: bool) -> None:
        for _ in range(BATCHES):
            before_batch()
            assert not self.trainer.stopping, "no batch is scored once all ranks have agreed to stop"


@pytest.mark.parametrize("steps", [7, DATA_END, 100, None])
@pytest.mark.parametrize("with_suite", [True, False])
def test_a_run_stopped_anywhere_is_completed_by_its_next_start(steps: int | None, with_suite: bool) -> None:
    last = min(steps or DATA_END, DATA_END)
    wanted = sorted({0, last, *range(0, last, EVALUATED_EVERY)}) if with_suite else []
    for looks in range(1, 30):
        run = Run(steps, with_suite)
        starts = 0
        while not run.start(looks if starts == 0 else 10**9):
            starts += 1
            assert run.state.step == run.trainer.state.step, "all that was trained is saved before the process ends"
            assert starts < 2, "an undisturbed start finishes the run"
        assert run.trained == list(range(1, last + 1)), looks
        assert run.evaluated == wanted, looks
        assert [event.kind for event in run.told] == [*["stopped"] * starts, "finished"], looks
        assert run.state.step == last
        assert run.data_end == (None if steps == 7 or steps == DATA_END else last)


@pytest.mark.parametrize("steps", [7, DATA_END])
def test_weights_are_hashed_at_intervals_and_wherever_they_are_saved(steps: int) -> None:
    for looks in range(1, 12):
        run = Run(steps, with_suite=False)
        while not run.start(looks if not run.saved else 10**9):
            pass
        due = {step for step in range(1, steps + 1) if step % SAVED_EVERY == 0 or step % HASHED_EVERY == 0}
        assert run.hashed == sorted(due | set(run.saved)), looks


def test_a_finished_run_is_left_unchanged() -> None:
    run = Run(steps=7)
    assert run.start()
    before = (list(run.trained), list(run.saved), list(run.evaluated))
    assert run.start()
    assert (run.trained, run.saved, run.evaluated) == before


def test_only_the_last_save_of_a_finished_run_must_succeed() -> None:
    run = Run(steps=7)
    run.saves_fail = True
    assert not run.start(looks=5 + BATCHES)  # stopped: it resumes from its previous checkpoint
    run = Run(steps=7)
    run.saves_fail = True
    with pytest.raises(CheckpointError, match="the disk is full"):
        run.start()


def test_a_run_that_its_evaluations_end_is_saved_there_and_does_not_go_on() -> None:
    for looks in range(1, 25):
        run = Run(steps=100)
        run.ends_by_rule_at = 6
        starts = 0
        while not run.start(looks if starts == 0 else 10**9):
            starts += 1
            assert starts < 2, "an undisturbed start finishes the run"
        assert (run.trained, run.evaluated, run.state.step) == ([*range(1, 7)], [0, 3, 6], 6), looks
        kinds = [event.kind for event in run.told if event.kind != "stopped"]
        assert kinds == ["patience", "finished"], looks
        assert run.start()
        assert (run.trained, run.state.step, len(run.told)) == ([*range(1, 7)], 6, 2 + starts), (
            "again, and no word more"
        )
