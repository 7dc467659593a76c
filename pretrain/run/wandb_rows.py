"""Make wandb's row of each step and compare it with the row sent before. run folder -> wandb_rows -> wandb_tracker.

wandb keeps a row for good, but a step may be trained again after a kill and come out differently, under another config
or layout or on another machine. So what was sent is recorded beside wandb's own files, and compared.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import msgspec
import xxhash

from pretrain.run.eval_figure import is_average, is_of_task, knows_bytes
from pretrain.run.run_folder import RunFolder
from pretrain.run.step_log import StepLog, step_of

Row = dict[str, object]

# The results of training in a step's row; everything else in it concerns time, memory and disks.
_FIGURES = ("loss", "z_loss", "grad_norm", "learning_rate", "tokens", "batch_hash", "nonfinite")
# Figures of which older programs know nothing; rows without them keep the hash that those recorded
_LATER_FIGURES = ("trained_hash",)
_EVAL, _TASKS = "eval/", "tasks/"
_NOT_SHOWN = ("step", "suite", "domain", "metric", "length")  # of a line of evals.jsonl
_BY_CONTEXT = "by_context"  # shown of the averages alone: hundreds of domains would each have a dozen figures more
_OF_BYTES = ("bits_per_byte", "bytes")  # what a line lacks that does not count bytes


class _Sent(msgspec.Struct, frozen=True, omit_defaults=True):
    """The hashes recorded for one row."""

    figures: str  # hash of the keys in _FIGURES
    evals: str | None  # hash of its evaluation on a suite; None without one
    tasks: dict[str, str] = {}  # hash of its evaluation on each task, by name or label


class SentRows:
    """The rows that were sent to one wandb run, over all sessions.

    Args:
        log: the log for all wandb runs of a run folder; the last record of a step counts.
        run_id: the wandb run's id.
    """

    def __init__(self, log: StepLog, run_id: str) -> None:
        self._log, self._run_id = log, run_id
        self._sent = {
            step_of(record): msgspec.convert(record, _Sent) for record in log.read() if record["run"] == run_id
        }

    def note(self, row: Row) -> None:
        """Record that a row is about to be sent."""
        self._log.append({"step": row["step"], "run": self._run_id, **msgspec.to_builtins(_summary(row))})

    def forget(self, until: int) -> None:
        """Free the memory of the steps up to one; they have been compared."""
        self._sent = {step: sent for step, sent in self._sent.items() if step > until}

    def differs(self, row: Row) -> bool:
        """Return whether a new row differs, or may differ, from the one that was sent."""
        return self._sent.get(step_of(row)) != _summary(row)

    def contradicts(self, row: Row) -> bool:
        """Return whether a row made from the files differs from the one that was sent.

        Unlike `differs`, it ignores steps that an older program sent without recording them, and an evaluation on one
        side only: `commands.evaluate` may have made it later, or the run's suite has changed.
        """
        sent, own = self._sent.get(step_of(row)), _summary(row)
        if sent is None:
            return False
        return (
            sent.figures != own.figures
            or (sent.evals != own.evals and None not in (sent.evals, own.evals))
            or any(sent.tasks[task] != own.tasks[task] for task in sent.tasks.keys() & own.tasks.keys())
        )


def _summary(row: Row) -> _Sent:
    # What older programs know nothing of, and what follows from the same forward passes, is not compared
    evals = {key: value for key, value in row.items() if key.startswith(_EVAL) and f"/{_BY_CONTEXT}/" not in key}
    figures = [row.get(key) for key in _FIGURES] + [row[key] for key in _LATER_FIGURES if key in row]
    tasks: dict[str, Row] = {}
    for key, value in row.items():
        if key.startswith(_TASKS):
            tasks.setdefault(key.split("/")[1], {})[key] = value
    return _Sent(_hash(figures), _hash(evals) if evals else None, {task: _hash(tasks[task]) for task in tasks})


def _hash(figures: object) -> str:
    # Compared as JSON, as read back from the files, where NaN is null.
    return xxhash.xxh3_64_hexdigest(msgspec.json.encode(figures, order="deterministic"))


def rows_of(
    folder: RunFolder, labels: Collection[str] | None, after: int = -1, until: float = math.inf
) -> Iterator[Row]:
    """Make the rows of a run's files, past one step and up to another, in order; one per step.

    Args:
        labels: those whose lines of evals.jsonl to include; None: all.
    """
    evals = (r for r in folder.evals.read(after, until) if labels is None or r["suite"] in labels)
    evaluated: dict[int, Row] = {}
    for row in eval_rows(evals, eval_prefixes(folder, labels)):
        evaluated.setdefault(step_of(row), {}).update(row)
    waiting = deque(sorted(evaluated))
    measured = _Following(folder.layers.read(after))
    for record in folder.metrics.read(after, until):
        step = step_of(record)
        while waiting and waiting[0] < step:  # for example, the evaluation before the first step
            yield evaluated[waiting.popleft()]
        yield step_row(record) | layer_figures(measured.at(step)) | evaluated.get(step, {})
        if waiting and waiting[0] == step:
            waiting.popleft()
    for step in waiting:
        yield evaluated[step]


class _Following:
    """Reads a log beside another one: at each of the other's steps, this one's record, if there is one."""

    def __init__(self, records: Iterator[dict[str, object]]) -> None:
        self._records = records
        self._next = next(records, None)

    def at(self, step: int) -> dict[str, object] | None:
        """Return the record of a step. Args: step: larger than in the last call."""
        while self._next is not None and step_of(self._next) < step:
            self._next = next(self._records, None)
        return self._next if self._next is not None and step_of(self._next) == step else None


def layer_figures(record: Mapping[str, object] | None) -> Row:
    """Return what wandb shows of a line of layers.jsonl: a section a figure, with a panel for each block.

    The keys are `layers.<figure>/<block>`, numbered with as many digits as the last block has.
    """
    layers = record["layers"] if record else {}
    assert isinstance(layers, Mapping)
    return {
        f"layers.{figure}/{block:0{len(str(len(values) - 1))}}": value
        for figure, values in layers.items()
        for block, value in enumerate(values)
    }


def eval_prefixes(folder: RunFolder, labels: Collection[str] | None) -> dict[str, str]:
    """Return the prefixes of a training's labels in wandb that are not the usual ones.

    The usual ones, `eval/` and `tasks/<name>/`, belong to the first suite in the file, and to the first label of each
    task; the figures of another suite or label go under `eval/<label>/` and `tasks/<label>/`.

    Args:
        labels: those of the training; None: all.
    """
    found: dict[str, str] = {}
    first: dict[str, str] = {}  # by task, and "" for suites: the first label in the file
    missing = set(labels or ())
    records = folder.evals.read()
    while missing and (record := next(records, None)) is not None:
        label, task = str(record["suite"]), str(record["domain"]) if is_of_task(record) else ""
        if first.setdefault(task, label) != label:
            found[label] = f"{_TASKS if task else _EVAL}{label}/"
        missing.discard(label)
    return found


def step_row(record: Mapping[str, object]) -> Row:
    """Return a line of metrics.jsonl as wandb's row: per-source figures flattened, under `<figure>/<source>`."""
    row: Row = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            row.update({f"{key}/{name}": figure for name, figure in value.items()})
        else:
            row[key] = value
    return row


def eval_rows(records: Iterable[Mapping[str, object]], prefixes: Mapping[str, str] | None = None) -> Iterator[Row]:
    """Make one row from each run of lines of evals.jsonl with the same step.

    The keys are `eval/<domain>/<figure>` and `tasks/<task>/<figure>`, with what a figure goes by in between:
    `eval/micro/by_context/17-32/perplexity`.

    Args:
        prefixes: what stands for `eval/` or `tasks/<task>/`, by label, where it is another.
    """
    row: Row = {}
    for record in records:
        if row and row["step"] != record["step"]:
            yield row
            row = {}
        row["step"] = record["step"]
        task, own = is_of_task(record), (prefixes or {}).get(str(record["suite"]))
        usual = f"{_TASKS}{record['domain']}/" if task else _EVAL
        prefix = (own or usual) + ("" if task else f"{record['domain']}/")
        hidden = _NOT_SHOWN if knows_bytes(record) else (*_NOT_SHOWN, *_OF_BYTES)
        if not is_average(record):
            hidden = (*hidden, _BY_CONTEXT)
        row.update(_leaves(prefix, {key: value for key, value in record.items() if key not in hidden}))
    if row:
        yield row


def _leaves(prefix: str, figures: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for key, value in figures.items():
        if isinstance(value, Mapping):
            yield from _leaves(f"{prefix}{key}/", value)
        else:
            yield f"{prefix}{key}", value


def last_local_step(wandb_folder: Path, run_id: str) -> int:
    """Return the last step with a row in the local files of a run's sessions; -1 if there is none.

    Rows are never sent twice, so the newest session that has any has the last one. A killed session leaves a file that
    wandb's own reader reads up to where it is torn.
    """
    files = sorted(
        wandb_folder.glob(f"*run-*-{run_id}*/run-{run_id}.wandb"), key=lambda path: path.parent.name.split("run-", 1)[1]
    )
    for file in reversed(files):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        last_step = -1
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as reader:
            assert reader.stdout is not None
            for line in reader.stdout:  # read line by line, since a long run's output is gigabytes
                if '"type":"history"' in line:
                    last_step = max(last_step, int(json.loads(line)["history"]["item"].get("step", -1)))
        if last_step >= 0:
            return last_step
    return -1
