"""Lay out the folder of a run, identify its wandb run, and cut its records back at a resume.

Only rank 0 writes here, except for the engine's files in a checkpoint. {start, journal} -> run_folder -> step_log.
"""

from __future__ import annotations

import logging
import re
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec

from pretrain.config_file import read_tree
from pretrain.run.step_log import StepLog
from shards import ConfigError
from shards.storage.atomic import fsync_folder, is_there, names_in, write_atomically

_logger = logging.getLogger(__name__)


class Ancestor(msgspec.Struct, frozen=True):
    """A run that another one was forked from."""

    name: str
    folder: str  # where it was then
    run_id: str  # of its wandb run
    step: int  # the last one that the two have in common
    batch_hash: str  # of that step


class Rewind(msgspec.Struct, frozen=True):
    """A decision of a run to go back before a spike; see `pretrain.rewind`."""

    spike: int  # the step that stood out
    step: int  # of the checkpoint
    passed_over: tuple[int, int]  # steps, first and last


@dataclass(frozen=True)
class RunFolder:
    """The paths of everything that belongs to a run. Creating this object touches nothing on disk."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def metrics(self) -> StepLog:
        return StepLog(self.root / "metrics.jsonl")

    @property
    def evals(self) -> StepLog:
        return StepLog(self.root / "evals.jsonl")

    def document_scores(self, step: int, suite: str) -> Path:
        """Return the file with a suite's sums per document at a step, on which comparisons are based."""
        return self.root / "evals" / suite / f"step_{step:08d}.npz"

    @property
    def layers(self) -> StepLog:
        """Return the log of each layer's figures; see `pretrain.layer_figures`."""
        return StepLog(self.root / "layers.jsonl")

    @property
    def bad_records(self) -> StepLog:
        return StepLog(self.root / "bad_records.jsonl")

    def nonfinite(self, step: int) -> Path:
        """Return the tab-separated list of documents of a step whose loss or gradient was not finite."""
        return self.root / "nonfinite" / f"step_{step:08d}.tsv"

    @property
    def contaminated(self) -> StepLog:
        """Return the log of the documents that data.decontaminate removed."""
        return StepLog(self.root / "contaminated.jsonl")

    @property
    def cursors(self) -> StepLog:
        return StepLog(self.root / "cursors.jsonl.zst")

    @property
    def events(self) -> StepLog:
        """Return the log of what was worth telling; see `pretrain.run.events`."""
        return StepLog(self.root / "events.jsonl")

    @property
    def starts(self) -> StepLog:
        """Return the log of the run's starts; see `pretrain.run.starts`."""
        return StepLog(self.root / "starts.jsonl")

    @property
    def samples(self) -> StepLog:
        """Return the log of what the run has written as continuations of a prompt."""
        return StepLog(self.root / "samples.jsonl")

    @property
    def report(self) -> Path:
        """Return the page about the run; see `pretrain.report`."""
        return self.root / "report.html"

    def config_of(self, config_hash: str) -> Path:
        """Return the copy of a config that the run was started with, by its hash."""
        return self.root / "configs" / f"{config_hash}.yaml"

    @property
    def wandb_rows(self) -> StepLog:
        """Return the log of what was sent to wandb for each step; see `pretrain.run.wandb_rows`."""
        return StepLog(self.wandb / "rows.jsonl")

    @property
    def profiles(self) -> Path:
        """Return the folder of the profiles of single steps; see `pretrain.profiling`."""
        return self.root / "profiles"

    @property
    def lease(self) -> Path:
        return self.root / "lease"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def logs(self) -> Path:
        """Return the folder of the logs of Slurm jobs."""
        return self.root / "logs"

    @property
    def wandb(self) -> Path:
        """Return the folder `wandb/` that wandb creates in the root."""
        return self.root / "wandb"

    @property
    def _data_end(self) -> Path:
        return self.root / "data_end"

    def data_end(self) -> int | None:
        """Read the run's last step, if it has reached the end of its data; None before that."""
        try:
            return int(self._data_end.read_text())
        except FileNotFoundError:
            return None

    def note_data_end(self, step: int) -> None:
        """Record that the data ends with this step."""
        write_atomically(self._data_end, str(step))

    @property
    def _run_id(self) -> Path:
        return self.wandb / "run_id"

    def run_id(self) -> str:
        """Read the id of the run's wandb run. Raises FileNotFoundError if it has none; see `settle_run_id`."""
        return self._run_id.read_text().strip()

    def settle_run_id(self, name: str) -> str:
        """Determine this run's wandb run, the existing one or a new one; return its id.

        An id belongs to a run.name and a folder, which config.yaml records from the last start. Under another name the
        run gets a new one. A folder at a new place is a copy if the old one still exists with the same id, and gets a
        new id too; otherwise it was moved and keeps its id.

        Args:
            name: the current run.name.
        """
        try:
            found = self.run_id()
        except FileNotFoundError:
            return self.new_run_id()
        run = (
            read_tree(self.config)[0]["run"] if is_there(self.config) else {"name": name, "dir": str(self.root.parent)}
        )
        was = RunFolder(Path(run["dir"], run["name"]))
        if run["name"] != name:
            reason = f"this run was called {run['name']} before"
        elif is_there(was.root) and was.root.samefile(self.root):
            return found
        elif is_there(was._run_id) and was.run_id() == found:
            reason = f"{self.root} is a copy of {was.root}"
        else:
            moved = "%s was in %s before and continues its wandb run %s; if it is a copy, remove %s"
            _logger.info(moved, self.root, was.root, found, self._run_id)
            return found
        drawn = self.new_run_id()
        _logger.warning("%s: all its figures go to a new wandb run, %s, and none to %s", reason, drawn, found)
        return drawn

    def new_run_id(self) -> str:
        """Create an id for a new wandb run, to which all of the run's figures go from now on."""
        drawn = secrets.token_hex(4)
        self.wandb.mkdir(exist_ok=True)
        write_atomically(self._run_id, drawn)
        return drawn

    def begin(self, name: str, config: str, step: int, rewound: bool = False) -> None:
        """Make the folder belong to a start that nothing can refuse any more.

        Args:
            name: name of the run.
            config: its config as YAML.
            step: the step that it resumes from; -1 if it begins with an evaluation of the untrained model.
            rewound: whether it goes back on purpose, so that what follows may come out differently.
        """
        self.settle_run_id(name)  # while config.yaml is still that of the last start
        write_atomically(self.config, config)
        self._data_end.unlink(missing_ok=True)  # where it ends is found anew, perhaps later under another config
        self.cut_back(step, "went back" if rewound else "resumed")
        if rewound:
            self._retract_files(step)
            self._going_back.unlink()

    @property
    def _going_back(self) -> Path:
        return self.root / "going_back"

    def going_back(self) -> int | None:
        """Return the step that a start has begun to go back to without coming to its end; None for most starts."""
        try:
            return int(self._going_back.read_text())
        except FileNotFoundError:
            return None

    def note_going_back(self, step: int) -> None:
        """Record that a start goes back to a step, which any other start has to bring to its end if this one cannot."""
        write_atomically(self._going_back, str(step))

    @property
    def _rewinds(self) -> Path:
        return self.root / "rewinds.json"

    def rewinds(self) -> list[Rewind]:
        """Return how often the run went back before a spike, the oldest first; never for most runs."""
        try:
            return msgspec.json.decode(self._rewinds.read_bytes(), type=list[Rewind])
        except FileNotFoundError:
            return []

    def note_rewind(self, rewind: Rewind) -> None:
        """Record that the run goes back; what it passes over is passed over by every start from now on."""
        rewinds = [*self.rewinds(), rewind]
        write_atomically(self._rewinds, msgspec.json.format(msgspec.json.encode(rewinds)))

    def _retract_files(self, step: int) -> None:
        """Move files of single steps past one aside, which otherwise would pass for those of steps yet to come."""
        for path in [*self.root.glob("evals/*/step_*.npz"), *self.root.glob("nonfinite/step_*.tsv")]:
            if int(path.stem.removeprefix("step_")) > step:
                target = self.superseded / path.relative_to(self.root)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target)

    def note_start(self, record: Mapping[str, object], config_hash: str) -> None:
        """Record a start that has begun, and keep its config, which a later start may replace in config.yaml."""
        kept = self.config_of(config_hash)
        if not is_there(kept):
            kept.parent.mkdir(exist_ok=True)
            write_atomically(kept, self.config.read_text())
        self.starts.append(record)

    def check_there(self) -> None:
        """Raise ConfigError, listing existing runs, if there is no run here."""
        if not is_there(self.config):
            runs = sorted(str(path.parent) for path in self.root.parent.glob("*/config.yaml"))
            there = f"runs beside it: {', '.join(runs)}" if runs else "name a run's folder, e.g. runs/quickstart"
            raise ConfigError(f"--run {self.root}: no run there (it has no config.yaml); {there}")

    def has_begun(self) -> bool:
        """Return whether anything of a run is here that another config could corrupt."""
        return any(True for _ in self.metrics.read()) or any(
            name.startswith("step_") for name in names_in(self.checkpoints)
        )

    def create(self) -> None:
        """Create the folder and its subfolders as needed, and check that it is writable.

        Raises:
            ConfigError: if that fails.
        """
        try:
            for folder in (self.root, self.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.root, prefix=".probe-") as probe:
                probe.write(b"?")
                probe.flush()
        except OSError as error:
            raise ConfigError(
                f"cannot write to the run folder {self.root}: {error.strerror}; "
                "set run.dir to a writable folder on a disk with room"
            ) from error

    @property
    def _lineage(self) -> Path:
        return self.root / "lineage.json"

    def ancestors(self) -> list[Ancestor]:
        """Return the runs that this one was forked from, the oldest first; none for most runs."""
        try:
            return msgspec.json.decode(self._lineage.read_bytes(), type=list[Ancestor])
        except FileNotFoundError:
            return []

    def note_ancestors(self, ancestors: Sequence[Ancestor]) -> None:
        """Record the runs that this one was forked from."""
        write_atomically(self._lineage, msgspec.json.format(msgspec.json.encode(ancestors)))

    def copy_records(self, target: RunFolder, step: int) -> None:
        """Copy the records of the steps up to one into another run's folder."""
        for log, copy in zip(self._records, target._records, strict=True):
            if is_there(log.path):
                log.copy_until(step, copy.path)
        for record in target.starts.read():
            config_hash = str(record["config_hash"])
            kept = target.config_of(config_hash)
            kept.parent.mkdir(exist_ok=True)
            kept.write_bytes(self.config_of(config_hash).read_bytes())

    @property
    def superseded(self) -> Path:
        """Return the folder for records that were cut off because their steps are trained again."""
        return self.root / "superseded"

    @property
    def _records(self) -> tuple[StepLog, ...]:
        """Return the files that follow the checkpoints: durable before a save is complete, cut back at a resume."""
        logs = (self.metrics, self.evals, self.layers, self.bad_records, self.contaminated, self.cursors, self.starts)
        return (*logs, self.samples, self.events)

    def cut_back(self, step: int, why: str) -> None:
        """Move aside what was written about steps past a checkpoint's, each record marked with why and when."""
        reason = f"{why} after step {max(step, 0)}, {datetime.now().astimezone().isoformat(timespec='seconds')}"
        for log in self._records:
            aside = self.superseded / log.path.name
            if cut := log.cut_back(step, aside, reason):
                _logger.info("%s: %d records past step %d are now in %s", log.path, cut, max(step, 0), aside)

    def sync(self) -> None:
        """Make all records durable, as required before a checkpoint is declared complete."""
        for log in self._records:
            log.sync()
        fsync_folder(self.root)  # one of the files may be new

    def move_aside(self) -> Path:
        """Free the run's name for a fresh start by renaming the folder to `<name>.<n>`; delete nothing.

        The caller holds the lease, which moves with the folder. Return the new path.
        """
        numbered = re.compile(re.escape(self.root.name) + r"\.(\d+)")
        numbers = [int(m[1]) for path in self.root.parent.iterdir() if (m := numbered.fullmatch(path.name))]
        aside = self.root.with_name(f"{self.root.name}.{max(numbers, default=0) + 1}")
        self.root.rename(aside)
        RunFolder(aside).lease.unlink(missing_ok=True)
        fsync_folder(self.root.parent)
        return aside
