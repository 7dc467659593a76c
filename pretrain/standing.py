"""What a run's evaluations say of it so far: which checkpoint is the best, and whether the run ends.

evals.jsonl, scores -> standing -> {store, trainer}. All of it follows from evals.jsonl, so that a run that was killed
comes to the same answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pretrain.checkpoint.store import CheckpointStore
from pretrain.evaluation.eval_set import EvalSet
from pretrain.evaluation.scores import labels, line_names
from pretrain.faults.patience import StopRule, ending
from pretrain.run.eval_figure import AVERAGED, EvalFigure, no_bytes
from pretrain.run.events import Event
from pretrain.run.run_folder import RunFolder
from pretrain.run.starts import read_starts
from pretrain.topology import Topology
from shards import ConfigError


class Standing:
    """Follows the evaluations of a training. Every rank has one and calls it alike.

    Args:
        rule: when the run ends; None: at its last step.
        store: its checkpoints, which keep the best one; only rank 0's is told.
        folder: cut back to the step that the run resumes from.
        suite: the label of the training's evaluations.
    Attributes:
        ending: why the run ends where it is; None if it goes on. It is the same on every rank.
    """

    def __init__(
        self, rule: StopRule | None, store: CheckpointStore, folder: RunFolder, suite: str, topology: Topology
    ) -> None:
        self._rule, self._store, self._suite, self._topology = rule, store, suite, topology
        self._costs: dict[int, float] = {}  # of the rule's metric, on rank 0
        records = list(folder.evals.read()) if topology.is_main else []
        self.ending = self._judged(records)

    def note(self, records: Sequence[Mapping[str, object]]) -> None:
        """Take in the lines of evals.jsonl of one evaluation; only rank 0 needs them."""
        self.ending = self._judged(records)

    def _judged(self, records: Sequence[Mapping[str, object]]) -> Event | None:
        found = None
        if self._topology.is_main:
            self._store.learn(costs_of_best(self._store, records, self._suite))
            if self._rule:
                self._costs |= EvalFigure.parse(self._rule.metric).costs(records, self._suite)
                found = ending(self._rule, self._costs)
        return self._topology.broadcast_object(found)


def costs_of_best(store: CheckpointStore, records: Sequence[Mapping[str, object]], suite: str) -> dict[int, float]:
    """Return the costs by which the best of a run's checkpoints is told; none if its config does not ask for it."""
    metric = store.config.best
    return EvalFigure.parse(metric).costs(records, suite) if metric else {}


def learn_from_records(store: CheckpointStore, folder: RunFolder) -> None:
    """Tell a store of a run that is not in training which checkpoint is the best."""
    starts = read_starts(folder)
    suite = (starts[-1].suite if starts else "") or next(iter(labels(folder)), "")
    store.learn(costs_of_best(store, list(folder.evals.read()), suite))


def check_figures(metrics: Mapping[str, str | None], eval_set: EvalSet | None, averaged: bool) -> None:
    """Check that a suite has the domains that a config names.

    Args:
        metrics: figures by the config's key.
        averaged: whether the moving average of the weights is scored as well.
    Raises:
        ConfigError: if it does not, with the domains that there are, or does not know the bytes of one that is compared
            by bits per byte.
    """
    for key, metric in metrics.items():
        if metric is None:
            continue
        domains = line_names(eval_set.domains, eval_set.sources, averaged) if eval_set else []
        figure = EvalFigure.parse(metric)
        if eval_set is None or figure.domain not in domains:
            raise ConfigError(f"{key}={metric}: the suite has no such domain; it has {', '.join(domains) or 'none'}")
        if figure.needs_bytes and not eval_set.knows_bytes(figure.domain.removeprefix(AVERAGED)):
            raise ConfigError(no_bytes(f"{key}={metric}", eval_set.label))
