"""Read all that a run has written down, as far as it can be read. {tail, run_folder} -> history -> {report, watch}.

It needs no torch, so that a login node can follow a run. Nothing is left out in silence: `problems` says what is
missing or damaged.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.config_file import Tree, read_tree
from pretrain.run.eval_figure import is_of_task
from pretrain.run.run_folder import RunFolder
from pretrain.run.step_log import step_of
from pretrain.run.tail import Tail
from shards import ConfigError

Floats = npt.NDArray[np.float64]

_NAMED = 5  # steps or lines that a message names


class Columns:
    """The numbers of many records, by key; those of a mapping under `key/name`. What a record lacks is NaN."""

    def __init__(self) -> None:
        self._columns: dict[str, array[float]] = {}
        self._count = 0
        self.last: dict[str, object] = {}  # the newest record
        self.texts: dict[str, tuple[int, str]] = {}  # the newest text of each key that holds texts, with its step

    def __len__(self) -> int:
        return self._count

    def add(self, record: dict[str, object]) -> None:
        """Append a record, which has a step."""
        values = dict(_numbers(record))
        for key in values.keys() - self._columns.keys():
            self._columns[key] = array("d", [math.nan] * self._count)
        for key, column in self._columns.items():
            column.append(values.get(key, math.nan))
        for key, text in record.items():
            if isinstance(text, str):
                self.texts[key] = step_of(record), text
        self._count += 1
        self.last = record

    def __getitem__(self, key: str) -> Floats:
        """Return a column [records]; all of it is NaN if no record has the key."""
        return np.array(self._columns.get(key, [math.nan] * self._count), np.float64)

    def names_of(self, key: str) -> list[str]:
        """List the names below a key that holds mappings, in the order of the newest record."""
        names = [name.partition("/")[2] for name in self._columns if name.startswith(f"{key}/")]
        newest = self.last.get(key)
        order = list(newest) if isinstance(newest, dict) else []
        return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))


def _numbers(record: dict[str, object]) -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, int | float):
            yield key, float(value)
        elif isinstance(value, dict):
            for name, number in value.items():
                if isinstance(number, int | float):
                    yield f"{key}/{name}", float(number)


class _Followed:
    """A file of which each new record is handed on, and all of them again after it was cut back."""

    def __init__(self, path: Path, clear: Callable[[], None], add: Callable[[dict[str, object]], None]) -> None:
        self.tail = Tail(path)
        self._clear, self._add = clear, add
        self.error = ""  # why the file could not be read at the last attempt

    def refresh(self) -> None:
        cuts, self.error = self.tail.cuts, ""
        try:
            for record in self.tail.read():
                if self.tail.cuts != cuts:
                    cuts = self.tail.cuts
                    self._clear()
                self._add(record)
        except OSError as error:
            self.error = str(error.strerror)
        if self.tail.cuts != cuts:
            self._clear()

    def problems(self) -> Iterator[str]:
        name, damaged = self.tail.path.name, self.tail.damaged
        if self.error:
            yield f"{name} cannot be read: {self.error}"
        if damaged:
            lines = ", ".join(str(found.line) for found in damaged[:_NAMED]) + (", …" if damaged[_NAMED:] else "")
            yield f"{name}: {len(damaged)} of its lines cannot be read and are left out ({lines}: {damaged[0].why})"
        if self.tail.is_torn:
            yield f"{name}: its last line is incomplete; it is being written, or the run was killed while writing it"


class History:
    """The records of one run.

    Attributes:
        folder: the run's.
        config: config.yaml as it stands there, unchecked; empty if it cannot be read.
        metrics: of metrics.jsonl.
        evals: the figures by suite, domain and step; of several evaluations, the newest.
        task_evals: those of tasks, by label and step.
        layers: by figure and step, one number for each layer.
        events, starts, samples: the records of events.jsonl, starts.jsonl and samples.jsonl.
        superseded: number of records of steps that were trained again.
    """

    def __init__(self, root: Path) -> None:
        self.folder = RunFolder(root)
        self.config: Tree = {}
        self.metrics = Columns()
        self.evals: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
        self.task_evals: dict[str, dict[int, dict[str, Any]]] = {}
        self.layers: dict[str, dict[int, list[float]]] = {}
        self.events: list[dict[str, Any]] = []
        self.starts: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []
        self.superseded = 0
        self._config_problem = ""
        self._odd_layers = 0
        self._files = [
            _Followed(self.folder.metrics.path, self._clear_metrics, lambda record: self.metrics.add(record)),
            _Followed(self.folder.evals.path, self._clear_evals, self._add_eval),
            _Followed(self.folder.layers.path, self.layers.clear, self._add_layers),
            _Followed(self.folder.root / "events.jsonl", self.events.clear, self.events.append),
            _Followed(self.folder.starts.path, self.starts.clear, self.starts.append),
            _Followed(self.folder.samples.path, self.samples.clear, self.samples.append),
            _Followed(self.folder.superseded / "metrics.jsonl", self._clear_superseded, self._count_superseded),
        ]

    @property
    def name(self) -> str:
        """Return the run's name; its folder's if the config is lost."""
        run = self.config.get("run")
        name = run.get("name") if isinstance(run, dict) else None
        return str(name or self.folder.root.resolve().name)

    @property
    def steps(self) -> npt.NDArray[np.int64]:
        """Return the step of each record of metrics.jsonl, [records]."""
        return self.metrics["step"].astype(np.int64)

    @property
    def last_step(self) -> int:
        """Return the last step of metrics.jsonl; 0 before the first."""
        return int(self.steps[-1]) if len(self.metrics) else 0

    @property
    def length(self) -> int | None:
        """Return the step at which the run ends, as far as it is known."""
        try:
            ended = self.folder.data_end()
        except (OSError, ValueError):
            ended = None
        steps = self.value("train.steps")
        return ended if ended is not None else steps if isinstance(steps, int) else None

    @property
    def is_finished(self) -> bool:
        """Return whether the run has come to its end; one whose end is not known has not."""
        return self.length is not None and self.last_step >= self.length

    @property
    def foreseen_length(self) -> int | None:
        """Return the step at which the run ends, or about the one at which its data will end it; None if unknown."""
        last = self.starts[-1].get("last_step") if self.starts else None
        return self.length or (last if isinstance(last, int) and last else None)

    def value(self, key: str) -> Any:
        """Return a value of the config by its dotted key; None if it has none."""
        found: Any = self.config
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return found

    def suite(self) -> str | None:
        """Return the label of the suite that the run was scored on last; None if on none."""
        last = {label: max(max(of_steps) for of_steps in domains.values()) for label, domains in self.evals.items()}
        return max(last, key=lambda label: last[label]) if last else None

    def scored(self, domain: str) -> dict[int, dict[str, Any]]:
        """Return the figures of a domain or an average of that suite by step; none if it was not scored."""
        return self.evals.get(self.suite() or "", {}).get(domain, {})

    def tasks(self) -> dict[str, dict[int, dict[str, Any]]]:
        """Return the figures of each task by step, under the label that it was scored with last."""
        newest: dict[str, tuple[int, str]] = {}  # by task: its last step and the label
        for label, of_steps in self.task_evals.items():
            last = max(of_steps)
            name = str(of_steps[last]["domain"])
            newest[name] = max(newest.get(name, (-1, "")), (last, label))
        return {name: self.task_evals[label] for name, (_, label) in newest.items()}

    def refresh(self) -> None:
        """Read what is new."""
        try:
            self.config, self._config_problem = read_tree(self.folder.config)[0], ""
        except ConfigError as error:
            self._config_problem = f"the config cannot be read, so nothing here comes from it: {error}"
        for file in self._files:
            file.refresh()

    def problems(self) -> list[str]:
        """Say what is missing or damaged, one sentence each."""
        found = [self._config_problem] if self._config_problem else []
        if not len(self.metrics):
            found.append("metrics.jsonl has no step")
        found += [problem for file in self._files for problem in file.problems()]
        if len(self.metrics):
            found += _holes(self.steps)
        if self._odd_layers:
            found.append(f"layers.jsonl: {self._odd_layers} lines without numbers by layer are left out")
        return found

    def _clear_metrics(self) -> None:
        self.metrics = Columns()

    def _clear_superseded(self) -> None:
        self.superseded = 0

    def _count_superseded(self, record: dict[str, object]) -> None:
        self.superseded += 1

    def _clear_evals(self) -> None:
        self.evals.clear()
        self.task_evals.clear()

    def _add_eval(self, record: dict[str, Any]) -> None:
        if is_of_task(record):
            self.task_evals.setdefault(str(record.get("suite")), {})[int(record["step"])] = record
            return
        of_suite = self.evals.setdefault(str(record.get("suite")), {})
        of_suite.setdefault(str(record.get("domain")), {})[int(record["step"])] = record

    def _add_layers(self, record: dict[str, Any]) -> None:
        layers = record.get("layers")
        if not isinstance(layers, dict):
            self._odd_layers += 1
            return
        for figure, values in layers.items():
            if isinstance(values, list) and all(isinstance(value, int | float | None) for value in values):
                numbers = [math.nan if value is None else float(value) for value in values]
                self.layers.setdefault(str(figure), {})[int(record["step"])] = numbers
            else:
                self._odd_layers += 1


def _holes(steps: npt.NDArray[np.int64]) -> Iterator[str]:
    """Say which steps of metrics.jsonl are missing, or not in order."""
    ahead = np.diff(np.concatenate([[0], steps]))
    holes = np.flatnonzero(ahead > 1)
    if len(holes):
        before = np.concatenate([[0], steps])
        spans = [
            f"{before[i] + 1}" if ahead[i] == 2 else f"{before[i] + 1} to {before[i + 1] - 1}" for i in holes[:_NAMED]
        ]
        more = ", …" if len(holes) > _NAMED else ""
        yield f"metrics.jsonl has no record of {int((ahead[holes] - 1).sum())} steps ({', '.join(spans)}{more})"
    if len(back := np.flatnonzero(ahead <= 0)):
        yield f"metrics.jsonl: {len(back)} records are not in the order of their steps (first step {steps[back[0]]})"
