"""Mirror metrics.jsonl and evals.jsonl to wandb; no other module imports wandb.

journal -> wandb_tracker -> {wandb/, server}. A run is one wandb run, however often it is restarted, and shows each step
once. The JSONL files are authoritative. When a run resumes from a checkpoint, wandb may already have steps past it, or
lack some before it (a kill loses what was not flushed or sent). So a start asks up to which step wandb has rows
(offline its local files, online the server), fills the gap from the JSONL files, and does not resend the rest. A row's
`_step` is our step, which makes the answer exact; `step` is the axis of every figure.

A step that is trained again may come out differently, with another learning rate, layout or machine. At the first row
that differs from wandb's, wandb is rewound to the step before; if that fails (offline, or if the server does not
support it), a new wandb run begins and gets all rows.

Tracking never stops a training: a failure is logged once, and the run's end or next start fills the gap.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from pretrain.run.eval_figure import is_of_task
from pretrain.run.events import Event
from pretrain.run.lease import Lease
from pretrain.run.run_folder import RunFolder
from pretrain.run.step_log import step_of
from pretrain.run.wandb_rows import (
    Row,
    SentRows,
    eval_prefixes,
    eval_rows,
    last_local_step,
    layer_figures,
    rows_of,
    step_row,
)
from shards import Config, ConfigError

if TYPE_CHECKING:
    import wandb

_logger = logging.getLogger(__name__)

_ALERT_SECONDS = 600  # between two alerts of a kind; those in between are in the log
_TITLE_LENGTH = 63  # of an alert, at most
_FLUSH_SECONDS = 0.2  # of the local file; with the default, a kill would lose 15 s
_INIT_SECONDS = 30.0  # before a start without a server goes offline
_FINISH_SECONDS = 30.0  # before giving up on the server at the end; the local file stays

_LATE_ROWS = "late_eval_rows"  # key of the wandb run's config: number of rows that are not training steps


class WandbConfig(Config):
    """The wandb run that figures go to, besides the run folder's own files."""

    # offline: to the run folder; `wandb sync` uploads it later
    mode: Literal["online", "offline", "disabled"] = "offline"
    project: str = "headrace"  # the run's wandb project
    entity: str | None = None  # user or team; None: the account's default
    group: str | None = None  # runs with the same group are shown together
    tags: tuple[str, ...] = ()  # labels to filter runs by
    system_metrics: bool = True  # utilization of GPUs, CPUs, memory and network, every 15 s


def log_late_evals(
    config: WandbConfig,
    folder: RunFolder,
    name: str,
    records: Sequence[Mapping[str, object]],
    lease: Lease,
    patience_seconds: float,
) -> None:
    """Add evaluations of old checkpoints to the run's wandb run, unless a training is writing to it.

    Their axis is `eval_step`, and their rows have no `step`: wandb accepts no rows for past steps, and a resumed
    training must not take them for its own. Figures go under `eval-<label>/<domain>/<figure>`, those of a task under
    `eval-<label>/<figure>`; those of a suite also into a table of domains. A failure is logged, since evals.jsonl has
    everything.

    Args:
        name: as in `Tracker`.
        records: lines of evals.jsonl, those of a step together.
        lease: the run's lease, not yet entered.
        patience_seconds: how long to wait for a training to end.
    """
    if config.mode == "disabled" or not records:
        return
    deadline = time.monotonic() + patience_seconds
    while not lease.is_free() and time.monotonic() < deadline:
        time.sleep(1.0)
    if not lease.is_free():
        _logger.warning("%s is in training, so its wandb run is not changed; evals.jsonl has the figures", folder.root)
        return
    tracker = Tracker(config, folder, name, folder.settle_run_id(name), {})
    with tracker._tolerated():
        tracker._log_late(records)


class Tracker:
    """One process's session of the run's wandb run, on rank 0 only: `with Tracker(...) as tracker`."""

    def __init__(
        self,
        config: WandbConfig,
        folder: RunFolder,
        name: str,
        run_id: str,
        described: Mapping[str, object],
        labels: Collection[str] | None = None,
        rewound_to: int | None = None,
    ):
        """Prepare a session; `with` opens it.

        Args:
            config: the `wandb` section.
            folder: cut back to the checkpoint that this session resumes from.
            name: the run's name in wandb.
            run_id: from the folder; at most 64 letters, digits, `-` and `_`.
            described: config and provenance, as JSON-able values.
            labels: the training's own labels in evals.jsonl, of its suite and its tasks; None: all.
            rewound_to: the step that the run has gone back to on purpose; wandb's rows past it go at once.
        """
        self._rewound_to = rewound_to
        self._labels = labels
        self._config = config
        self._folder = folder
        self._name = name
        self._id = run_id
        self._described = described
        self._run: wandb.Run | None = None
        self._sent: SentRows
        self._last_step = -1  # the last step whose row wandb has in full
        self._late_rows = 0  # the server's rows for evaluations of old checkpoints
        self._held: Row | None = None
        self._evals_follow = False  # whether the held row waits for its evaluation
        self._alerted: dict[str, float] = {}  # kind -> time.monotonic() of its last alert

    def __enter__(self) -> Tracker:
        """Open the session and bring wandb up to date.

        Raises:
            ConfigError: if online mode has no API key; a server that does not respond is not an error.
        """
        if self._config.mode != "disabled":
            with self._tolerated():
                self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._config.mode == "disabled":
            return
        if self._run is None:
            # A launcher that stops a run sends SIGTERM to wandb's process too; a new one gets the rows that it lacked.
            with self._tolerated():
                _forget_process()
                self._open()
        if not self._evals_follow:  # otherwise the next start makes the evaluation and sends both
            self._send_held()
        if self._run is not None:
            with self._tolerated():
                self._run.finish(exit_code=0 if kind is None else 1)

    def log_step(
        self, record: Mapping[str, object], layers: Mapping[str, object] | None = None, more: bool = False
    ) -> None:
        """Send a line of metrics.jsonl.

        Args:
            record: includes `step`; a step that wandb already has is skipped.
            layers: the step's line of layers.jsonl, if it has one.
            more: whether the step's evaluation follows; both then go out as one row, if need be from the next session.
                A step that is evaluated without this, as at the data's end, is held until the next one too.
        """
        self._send_held()
        self._held = step_row(record) | layer_figures(layers)
        self._evals_follow = more

    def log_evals(self, records: Sequence[Mapping[str, object]]) -> None:
        """Send one step's lines of evals.jsonl, with the step's own figures if they were held back for it."""
        for row in eval_rows(records, eval_prefixes(self._folder, self._labels)):
            if self._held is None and self._run is not None and step_of(row) <= self._last_step:
                with self._tolerated():
                    self._complete(step_of(row))
                continue
            if self._held is not None and self._held["step"] != row["step"]:
                self._send_held()
            self._held = {**(self._held or {}), **row}
        self._evals_follow = False
        self._send_held()

    def alert(self, event: Event) -> None:
        """Send an event as an alert of the run, online; one of a kind within `_ALERT_SECONDS`."""
        since = time.monotonic() - self._alerted.get(event.kind, -math.inf)
        if self._run is None or self._run.offline or since < _ALERT_SECONDS:
            return
        self._alerted[event.kind] = time.monotonic()
        level = {logging.INFO: "INFO", logging.WARNING: "WARN", logging.ERROR: "ERROR"}[event.level]
        title = f"{event.kind.replace('_', ' ')}: {self._name}"[:_TITLE_LENGTH]
        try:
            self._run.alert(title, f"step {event.step}: {event.text}", level, _ALERT_SECONDS)
        except Exception as error:  # it is in the log and in events.jsonl
            _logger.warning("wandb was not told: %r", error)

    def _send_held(self) -> None:
        row, self._held = self._held, None
        if row is None or self._run is None:
            return
        with self._tolerated():
            if step_of(row) > self._last_step:
                self._send(row)
            elif self._sent.differs(row):
                self._rewind(step_of(row))
                for made in self._made_rows(until=step_of(row)):
                    self._send(made)

    def _complete(self, step: int) -> None:
        """Deal with a step that was sent before all of its evaluation was made, such as on a task added since."""
        (whole,) = rows_of(self._folder, self._labels, after=step - 1, until=step)
        if self._sent.contradicts(whole):
            self._held = whole
            self._send_held()
        elif self._sent.differs(whole):
            _logger.info("wandb has step %d already; what was evaluated since is in %s", step, self._folder.evals.path)

    def _send(self, row: Row) -> None:
        assert self._run is not None
        self._last_step = step_of(row)
        self._sent.note(row)  # before it is sent, so that wandb has no unknown rows
        self._run.log(row, step=self._last_step + self._late_rows, commit=True)

    def _rewind(self, step: int, why: str = "came out differently when trained again") -> None:
        """Remove rows from a step on in wandb, since they come from a training that was undone."""
        import wandb

        assert self._run is not None
        offline = self._run.offline
        self._run.finish()
        self._run = None
        # Rewinding would remove evaluations of old checkpoints too, which are never resent.
        if not offline and not self._late_rows and step > 0:
            try:
                self._run = self._init("online", rewound_to=step - 1)
            except wandb.errors.Error as error:
                _logger.warning("wandb cannot rewind the run %s to step %d: %s", self._id, step - 1, error)
                _forget_process()
        if self._run is not None:
            self._last_step = step - 1
            _logger.info("step %d %s: wandb was rewound to the one before", step, why)
        else:
            old, self._id = self._id, self._folder.new_run_id()
            self._sent = SentRows(self._folder.wandb_rows, self._id)
            _logger.warning(
                "step %d %s: all figures go to a new wandb run, %s, from the first step on; %s keeps the superseded"
                " ones", step, why, self._id, old,
            )  # fmt: skip
            self._run, self._last_step = self._start()
        self._define_axis(self._run)

    def _log_late(self, records: Sequence[Mapping[str, object]]) -> None:
        import wandb

        run, _ = self._start()
        axis = "eval_step"
        run.define_metric(axis, hidden=True)
        prefixes = {label: f"eval-{label}/" for label in dict.fromkeys(str(record["suite"]) for record in records)}
        for prefix in prefixes.values():
            run.define_metric(f"{prefix}*", step_metric=axis)
        rows = list(eval_rows(records, prefixes))
        of_suites = {
            label: [record for record in records if record["suite"] == label and not is_of_task(record)]
            for label in prefixes
        }
        tables = {label: found for label, found in of_suites.items() if found}
        # The count goes first: rows that are there but not counted would pass for steps of the training.
        late = _late_rows(run) + len(rows) + len(tables)
        run.config.update({_LATE_ROWS: late}, allow_val_change=True)  # type: ignore[no-untyped-call]
        for row in rows:
            run.log({axis: row.pop("step"), **row})
        for label, found in tables.items():
            columns = [key for key, value in found[0].items() if key != "suite" and not isinstance(value, Mapping)]
            data = [[record[key] for key in columns] for record in found]
            run.log({f"{prefixes[label]}domains": wandb.Table(columns=list[str | int](columns), data=data)})
        run.finish()

    def _made_rows(self, until: float = math.inf) -> Iterator[Row]:
        """Make the rows from the JSONL files that wandb does not have: all past its last one, up to a step."""
        return rows_of(self._folder, self._labels, after=self._last_step, until=until)

    def _fill_gap(self) -> None:
        """Send the rows that wandb lacks; hold the last one, since its step may be evaluated only now."""
        self._held = None  # it is in the files too
        for row in self._made_rows():
            self._send_held()
            self._held = row

    @contextlib.contextmanager
    def _tolerated(self) -> Iterator[None]:
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:  # training continues whatever wandb does
            _logger.warning(
                "wandb failed and gets nothing until the run ends or is restarted, which fills the gap: %r", error
            )
            self._run = None

    def _open(self) -> None:
        """Open a session and bring wandb up to date with the JSONL files."""
        self._run, self._last_step = self._start()
        self._define_axis(self._run)
        self._sent = SentRows(self._folder.wandb_rows, self._id)
        there = rows_of(self._folder, self._labels, until=self._last_step)
        if (wrong := next((row for row in there if self._sent.contradicts(row)), None)) is not None:
            self._rewind(step_of(wrong))
        elif self._rewound_to is not None and self._last_step > self._rewound_to:
            self._rewind(self._rewound_to + 1, "is retracted, since the run has gone back before it")
        newest = self._folder.metrics.last()
        self._sent.forget(step_of(newest) if newest else -1)
        self._fill_gap()

    def _define_axis(self, run: wandb.Run) -> None:
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")

    def _start(self) -> tuple[wandb.Run, int]:
        """Open a session; return it and the last step that wandb has, -1 if it has none."""
        import wandb  # takes a second and starts a process, so only if wandb is used

        if self._config.mode == "online":
            try:
                run = self._init("online")
                # `_step` is our step, apart from rows without a step, and the server says which comes next.
                self._late_rows = _late_rows(run)
                return run, run.starting_step - 1 - self._late_rows
            except wandb.errors.UsageError as error:
                raise ConfigError(
                    f"wandb.mode=online: {error}; run `wandb login`, set WANDB_API_KEY, or choose wandb.mode=offline"
                ) from None
            except wandb.errors.Error as error:
                _logger.warning("wandb continues offline; upload with `wandb sync`: %s", error)
                _forget_process()  # otherwise it reports that the run is in use
        last_step = last_local_step(self._folder.wandb, self._id)
        return self._init("offline"), last_step

    def _init(self, mode: Literal["online", "offline"], rewound_to: int | None = None) -> wandb.Run:
        import wandb

        return wandb.init(
            mode=mode,
            id=self._id,
            resume="allow" if rewound_to is None else None,
            resume_from=None if rewound_to is None else f"{self._id}?_step={rewound_to}",
            name=self._name,
            project=self._config.project,
            entity=self._config.entity,
            group=self._config.group,
            tags=self._config.tags,
            dir=self._folder.root,
            config=dict(self._described),
            settings=wandb.Settings(
                console="off",  # the terminal belongs to us
                silent=True,
                init_timeout=_INIT_SECONDS,
                finish_timeout=_FINISH_SECONDS,
                x_transaction_log_flush_interval=_FLUSH_SECONDS,
                x_disable_stats=not self._config.system_metrics,
            ),
        )


def _late_rows(run: wandb.Run) -> int:
    return int(run.config.get(_LATE_ROWS, 0))  # type: ignore[no-untyped-call]


def _forget_process() -> None:
    """Let the next `init` start a new wandb process."""
    import wandb

    with contextlib.suppress(Exception, SystemExit):  # it contacts the dead process, after forgetting it
        wandb.teardown()
