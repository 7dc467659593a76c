"""Mirrors metrics.jsonl and evals.jsonl into wandb. The only importer of wandb. loop -> tracking -> {wandb/, server}.

A run is one wandb run, however often it is restarted, and shows each step once. The JSONL files are the truth. When a
run resumes from a checkpoint, wandb may already hold steps past it, or lack some before it (a kill loses what was not
flushed or sent). So a start asks up to which step wandb has rows (offline its local files, online the server), fills
the gap from the JSONL files, and does not send again what is there. A row's `_step` is our step, which is what makes
the question exact; `step` is the axis of every figure.

Tracking never stops a training: what fails is said once in the log, and the run's end or next start fills the gap.
"""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from pretrain.lease import Lease
from pretrain.run_folder import RunFolder
from shards import Config, ConfigError

if TYPE_CHECKING:
    import wandb

_logger = logging.getLogger(__name__)

_FLUSH_SECONDS = 0.2  # of the local file; the default of 15 s is what a kill would lose
_INIT_SECONDS = 30.0  # until a start without a server goes on offline
_FINISH_SECONDS = 30.0  # until the end gives up on a server; the local file stays

_LATE_ROWS = "late_eval_rows"  # key of the wandb run's config: how many of its rows are no training step's

Row = dict[str, object]


class WandbConfig(Config):
    """Where the figures go besides the run folder's own files."""

    # offline: to the run folder; `wandb sync` uploads it later
    mode: Literal["online", "offline", "disabled"] = "offline"
    project: str = "headrace"
    entity: str | None = None  # user or team; None: the account's default
    group: str | None = None  # runs that are shown together
    tags: tuple[str, ...] = ()
    system_metrics: bool = True  # utilization of GPUs, CPUs, memory and network, every 15 s


def log_late_evals(
    config: WandbConfig,
    folder: RunFolder,
    name: str,
    suite: str,
    records: Sequence[Mapping[str, object]],
    lease: Lease,
    patience_seconds: float,
) -> None:
    """Adds evaluations of old checkpoints to the run's wandb run, unless a training is writing to it.

    Their axis is `eval_step`, and their rows have no `step`: wandb takes no row for a step that is past, and a training
    that goes on must not take them for its own. Figures stand under `eval-<suite>/<domain>/<figure>`, and once more in
    a table of domains. What fails is logged: evals.jsonl has it all.

    Args:
        name: as in `Tracker`.
        records: lines of evals.jsonl, of one suite.
        lease: the run's, not entered.
        patience_seconds: how long to wait for a training to end.
    """
    if config.mode == "disabled" or not records:
        return
    deadline = time.monotonic() + patience_seconds
    while not lease.is_free() and time.monotonic() < deadline:
        time.sleep(1.0)
    if not lease.is_free():
        _logger.warning("%s is being trained, so its wandb run is left alone; evals.jsonl has the figures", folder.root)
        return
    tracker = Tracker(config, folder, name, folder.run_id(), {})
    with tracker._tolerated():
        tracker._log_late(suite, records)


class Tracker:
    """One process's session of the run's wandb run. Entered on rank 0 alone: `with Tracker(...) as tracker`."""

    def __init__(
        self,
        config: WandbConfig,
        folder: RunFolder,
        name: str,
        run_id: str,
        described: Mapping[str, object],
        suite: str | None = None,
    ):
        """
        Args:
            config: the `wandb` section.
            folder: cut back to the checkpoint from which this session goes on.
            name: of the run, as wandb shows it.
            run_id: the same for all sessions of a run; at most 64 letters, digits, `-` and `_`.
            described: config and provenance, as JSON-able values.
            suite: whose lines of evals.jsonl are the training's own; None: all. The first in the file is shown under
                `eval/`, any other, which a run goes on with that changed, under `eval/<suite>/`.
        """
        self._suite = suite
        self._config = config
        self._folder = folder
        self._name = name
        self._id = run_id
        self._described = described
        self._run: wandb.Run | None = None
        self._last_step = -1  # the last whose row wandb has in full
        self._late_rows = 0  # that the server has of evaluations of old checkpoints
        self._held: Row | None = None
        self._evals_follow = False  # whether what is held waits for its evaluation

    def __enter__(self) -> Tracker:
        """
        Raises:
            ConfigError: if online mode has no API key; a server that does not answer is no error.
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
            # A launcher that stops a run sends SIGTERM to wandb's process too; a new one gets what that had not
            with self._tolerated():
                _forget_process()
                self._open()
        if not self._evals_follow:  # else the next start makes the evaluation, and sends both
            self._send_held()
        if self._run is not None:
            with self._tolerated():
                self._run.finish(exit_code=0 if kind is None else 1)

    def log_step(self, record: Mapping[str, object], more: bool = False) -> None:
        """Sends a line of metrics.jsonl.

        Args:
            record: with its `step`; a step that wandb already has is passed over.
            more: the step's evaluation follows; both then go out as one row, if need be from the next session. A step
                that is evaluated all the same, as where the data ends, is held until the next one too.
        """
        self._send_held()
        self._held = step_row(record)
        self._evals_follow = more

    def log_evals(self, records: Sequence[Mapping[str, object]]) -> None:
        """Sends the lines of evals.jsonl of one step, with the step's own figures if they were held back for it."""
        for row in eval_rows(records, self._eval_prefix()):
            if self._held is not None and self._held["step"] != row["step"]:
                self._send_held()
            self._held = {**(self._held or {}), **row}
        self._evals_follow = False
        self._send_held()

    def _eval_prefix(self) -> str:
        first = next(self._folder.evals.read(), None)
        if self._suite is None or first is None or first["suite"] == self._suite:
            return "eval/"
        return f"eval/{self._suite}/"

    def _send_held(self) -> None:
        row, self._held = self._held, None
        if row is None or self._run is None:
            return
        step = int(str(row["step"]))
        if step > self._last_step:
            self._last_step = step
            with self._tolerated():
                self._run.log(row, step=step + self._late_rows, commit=True)

    def _log_late(self, suite: str, records: Sequence[Mapping[str, object]]) -> None:
        import wandb

        run, _ = self._start()
        axis, prefix = "eval_step", f"eval-{suite}/"
        run.define_metric(axis, hidden=True)
        run.define_metric(f"{prefix}*", step_metric=axis)
        rows = list(eval_rows(records, prefix))
        # First the count: rows that are there but not counted would pass for steps of the training
        run.config.update({_LATE_ROWS: _late_rows(run) + len(rows) + 1}, allow_val_change=True)  # type: ignore[no-untyped-call]
        for row in rows:
            run.log({axis: row.pop("step"), **row})
        columns = [key for key in records[0] if key != "suite"]
        table = wandb.Table(
            columns=list[str | int](columns), data=[[record[key] for key in columns] for record in records]
        )
        run.log({f"{prefix}domains": table})
        run.finish()

    def _fill_gap(self) -> None:
        """Sends what the JSONL files have and wandb has not; the last row is held: it may be evaluated only now."""
        self._held = None  # it stands in the files too
        rows: dict[int, Row] = {}
        for record in self._folder.metrics.read(after=self._last_step):
            row = step_row(record)
            rows[int(str(row["step"]))] = row
        evals = self._folder.evals.read(after=self._last_step)
        own = (record for record in evals if self._suite in (None, record["suite"]))
        for row in eval_rows(own, self._eval_prefix()):
            rows.setdefault(int(str(row["step"])), {}).update(row)
        for step in sorted(rows):
            self._send_held()
            self._held = rows[step]

    @contextlib.contextmanager
    def _tolerated(self) -> Iterator[None]:
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:  # whatever wandb does, the training goes on
            _logger.warning(
                "wandb failed and is left out until the run's next end or start, which fills the gap: %r", error
            )
            self._run = None

    def _open(self) -> None:
        """Opens a session and brings wandb up to the JSONL files."""
        self._run, self._last_step = self._start()
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self._fill_gap()

    def _start(self) -> tuple[wandb.Run, int]:
        """Opens a session. Returns it and the last step that wandb has; -1 if none."""
        import wandb  # takes a second and starts a process: only for those who want it

        if self._config.mode == "online":
            try:
                run = self._init("online")
                # `_step` is our step, apart from rows that are none, and the server names the next
                self._late_rows = _late_rows(run)
                return run, run.starting_step - 1 - self._late_rows
            except wandb.errors.UsageError as error:
                raise ConfigError(
                    f"wandb.mode=online: {error}; type `wandb login` or set WANDB_API_KEY, or choose wandb.mode=offline"
                ) from None
            except wandb.errors.Error as error:
                _logger.warning("wandb goes on offline, for `wandb sync` to upload: %s", error)
                _forget_process()  # it would say that the run is in use
        last_step = last_local_step(self._folder.wandb, self._id)
        return self._init("offline"), last_step

    def _init(self, mode: Literal["online", "offline"]) -> wandb.Run:
        import wandb

        return wandb.init(
            mode=mode,
            id=self._id,
            resume="allow",
            name=self._name,
            project=self._config.project,
            entity=self._config.entity,
            group=self._config.group,
            tags=self._config.tags,
            dir=self._folder.root,
            config=dict(self._described),
            settings=wandb.Settings(
                console="off",  # the terminal is ours
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
    """Lets the next `init` start wandb's process anew."""
    import wandb

    with contextlib.suppress(Exception, SystemExit):  # it says good-bye to the dead one, after forgetting it
        wandb.teardown()


def step_row(record: Mapping[str, object]) -> Row:
    """A line of metrics.jsonl as wandb shows it: per-source figures flat, under `<figure>/<source>`."""
    row: Row = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            row.update({f"{key}/{name}": figure for name, figure in value.items()})
        else:
            row[key] = value
    return row


def eval_rows(records: Iterable[Mapping[str, object]], prefix: str = "eval/") -> Iterator[Row]:
    """Lines of evals.jsonl, a row for each run of lines of one step, figures under `<prefix><domain>/<figure>`."""
    row: Row = {}
    for record in records:
        if row and row["step"] != record["step"]:
            yield row
            row = {}
        figures = {key: value for key, value in record.items() if key not in ("step", "suite", "domain")}
        row["step"] = record["step"]
        row.update({f"{prefix}{record['domain']}/{key}": value for key, value in figures.items()})
    if row:
        yield row


def last_local_step(wandb_folder: Path, run_id: str) -> int:
    """The last step of which the local files of a run's sessions have a row; -1 if there is none.

    Rows are never sent twice, so the newest session that has any has the last one. A session that was killed leaves a
    file that wandb's own reader reads up to where it is torn.
    """
    files = sorted(
        wandb_folder.glob(f"*run-*-{run_id}*/run-{run_id}.wandb"), key=lambda path: path.parent.name.split("run-", 1)[1]
    )
    for file in reversed(files):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        last_step = -1
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as reader:
            assert reader.stdout is not None
            for line in reader.stdout:  # a long run's file prints gigabytes
                if '"type":"history"' in line:
                    last_step = max(last_step, int(json.loads(line)["history"]["item"].get("step", -1)))
        if last_step >= 0:
            return last_step
    return -1
