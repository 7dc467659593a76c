"""Record what a run does: in the JSONL files of its folder, in wandb and on the console.

Only rank 0 writes. trainer -> journal -> {run folder, wandb_tracker, console}.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType

from pretrain.evaluation.scores import Scores, evaluated_steps, labels, record_scores
from pretrain.run.eval_figure import UNIT_OF, described_depths, is_of_task, loss_key
from pretrain.run.events import Event, Events, Hook, Kind
from pretrain.run.metrics import MetricsConfig, StepProgress, StepRecord
from pretrain.run.run_folder import RunFolder
from pretrain.run.step_log import step_of
from pretrain.run.wandb_tracker import Tracker
from shards import Skipped

_logger = logging.getLogger(__name__)


class Journal:
    """Writes each record everywhere it belongs. On ranks without a tracker it does nothing.

    Args:
        folder: the run's folder, cut back to the step that the run resumes from.
        tracker: not yet entered; None on all ranks but rank 0.
        config: settings of the console's progress, and the command that is told of events.
        steps: length of the whole run.
        name: the run's name.
        work_until: returns how much work the steps up to one are, from which the time left is estimated.
    """

    def __init__(
        self,
        folder: RunFolder,
        tracker: Tracker | None,
        config: MetricsConfig,
        steps: int,
        name: str,
        work_until: Callable[[int], float] = float,
    ) -> None:
        self._folder = folder
        self._tracker = tracker
        self._progress = StepProgress(steps, config, work_until=work_until)
        self._hook = Hook(config.on_event, name)
        self._events = Events(folder.events, tracker.alert, self._hook) if tracker else None
        self._stack = ExitStack()

    def __enter__(self) -> Journal:
        if self._tracker:
            self._stack.enter_context(self._hook)
            self._stack.enter_context(self._tracker)
            self._stack.enter_context(self._progress)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def tell(self, event: Event) -> None:
        """Tell of something that happened; from any thread."""
        if self._events:
            self._events.tell(event)

    def tell_last(self, event: Event) -> None:
        """Tell of what ends the process, and wait for the command that is told of events."""
        self.tell(event)
        self._hook.finish()

    def has_told(self, step: int, kind: Kind) -> bool:
        """Return whether an event of a kind was told of a step, in this start or one before."""
        return any((record["step"], record["kind"]) == (step, kind) for record in self._folder.events.read(step - 1))

    def log_step(self, record: StepRecord, layers: Mapping[str, object] | None, evals_follow: bool) -> None:
        """Log one trained step.

        Args:
            layers: its line of layers.jsonl, if the layers were measured.
            evals_follow: whether the same step is evaluated next; wandb shows both in one row.
        """
        if self._tracker:
            if layers:
                self._folder.layers.append(layers)
            self._folder.metrics.append(record.as_json())
            self._tracker.log_step(record.as_json(), layers, more=evals_follow)
            self._progress.show(record)

    def log_evals(self, step: int, evaluation: Sequence[Scores]) -> list[dict[str, object]]:
        """Log one evaluation, of the suite and the tasks: the lines of evals.jsonl, which it returns; on rank 0."""
        records: list[dict[str, object]] = []
        if self._tracker:
            records = record_scores(self._folder, step, *evaluation)
            self._tracker.log_evals(records)
            for record in records:
                if is_of_task(record):
                    _logger.info(
                        "step %d: task %s: accuracy %.3f (%s), %.3f bits per byte%s", step, record["domain"],
                        record["accuracy"], record["metric"], record["bits_per_byte"], described_depths(record),
                    )  # fmt: skip
                elif record["domain"] == "macro":
                    key = loss_key([record])
                    _logger.info(
                        "step %d: held-out macro average %.3f %s, perplexity %.1f",
                        step, record[key], UNIT_OF[key], record["perplexity"],
                    )  # fmt: skip
        return records

    def earlier_evals(self, records: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
        """Return the lines of the evaluations before one, on the same suite."""
        step, suite = step_of(records[0]), records[0]["suite"]
        return [r for r in self._folder.evals.read(until=step - 1) if r["suite"] == suite]

    def log_skipped(self, step: int, skipped: Sequence[Skipped], contaminated: Sequence[Skipped]) -> None:
        """Log the bad records and contaminated documents that were skipped on the way to a step's rows."""
        if self._tracker:
            for log, records in ((self._folder.bad_records, skipped), (self._folder.contaminated, contaminated)):
                for record in records:
                    log.append({"step": step, **record._asdict()})

    def log_data_end(self, step: int) -> None:
        """Record the step at which the data ends."""
        if self._tracker:
            self._folder.note_data_end(step)

    def log_cursors(self, step: int, cursors: Mapping[str, object] | None) -> None:
        """Log the lanes' cursors after a step, for provenance."""
        if self._tracker and cursors is not None:
            self._folder.cursors.append({"step": step, **cursors})

    def last_averaged(self, label: str) -> int:
        """Return the last step whose evaluation of the weights' average on a suite is in evals.jsonl; -1 if none is."""
        return max(evaluated_steps(self._folder, averaged=True)[label], default=-1)

    def last_evaluated(self, label: str, task: str | None = None) -> int:
        """Return the last step whose evaluation under a label is complete in evals.jsonl; -1 if there is none.

        Warn if there are evaluations under other labels only, since training then begins a new series.

        Args:
            task: the task's name, if the label is that of a task.
        """
        steps = evaluated_steps(self._folder)[label]
        if self._tracker and not steps and (others := labels(self._folder, task)):
            _logger.warning(
                "%s has evaluations labelled %s; those of this start are labelled %s, since text, tokenizer, seq_len or"
                " precision differ, or an older version wrote them: one series never mixes two",
                self._folder.evals.path, ", ".join(others), label,
            )  # fmt: skip
        return max(steps, default=-1)
