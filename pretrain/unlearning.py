"""The plan of exact unlearning: where to begin again without some documents, and what it costs.

A fork of the last checkpoint before the first step that was trained on them, which forgets them from there on, is the
run that never saw them: every batch has the same rows, with padding in their place. {exposure, fork} -> unlearning ->
commands.exposure.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pretrain.checkpoint.state import read_state
from pretrain.config import RunConfig, load_config
from pretrain.config_changes import compare_for_resume
from pretrain.config_file import read_tree
from pretrain.exposure import Trained, checkpoints_of
from pretrain.fork import forked_config
from pretrain.run.run_folder import RunFolder
from shards import installation


class Restart(NamedTuple):
    """A checkpoint from which a run's history can be trained again."""

    folder: RunFolder  # the run's, or that of an ancestor
    step: int


class Unlearning(NamedTuple):
    """What to do so that a run was never trained on some documents."""

    restart: Restart | None  # None = no checkpoint is left from before the first step that was trained on them
    command: str  # begins the run that forgets them
    steps: int  # to train again
    tokens: int  # that the run was trained on in these steps
    seconds: float  # that these steps take, at the run's median


def plan(folder: RunFolder, config: RunConfig, trained: Trained, first: int, listed: Path) -> Unlearning:
    """Plan to unlearn documents.

    Args:
        config: the run's.
        first: the first step that was trained on any of them.
        listed: the list that names them, and all that the run forgets already.
    Raises: ConfigError if the fork cannot be made.
    """
    restart = find_restart(folder, first)
    step = restart.step if restart else 0
    if restart is None:
        forget = [f"{key}={listed}" for key in ("data.forget", *_later_lists(config, 0))]
        command = installation.typed("train", "--config", str(folder.config), f"run.name={_name(config)}", *forget)
        command = f"deepspeed {command.removeprefix('python ')}"
    else:
        overrides = list(_overrides(folder, config, restart, listed))
        forked_config(restart.folder, step, _name(config), overrides)  # says what is wrong, if anything is
        words = ("--run", str(restart.folder.root), "--step", str(step), "--name", _name(config), *overrides)
        command = installation.typed("fork", *words)
    again = trained.steps - step
    return Unlearning(restart, command, again, trained.tokens[-1] - trained.tokens[step], again * trained.step_seconds)


def _name(config: RunConfig) -> str:
    return f"{config.run.name}-without"


def find_restart(folder: RunFolder, first: int) -> Restart | None:
    """Find the last checkpoint before a step that this run's history has, here or in an ancestor's folder."""
    runs = [(folder, first - 1)]
    runs += [(RunFolder(Path(one.folder)), min(one.step, first - 1)) for one in reversed(folder.ancestors())]
    found = [Restart(run, step) for run, last in runs for step in checkpoints_of(run).steps() if step <= last]
    # The newest; this run's before its ancestors', as sorting is stable. A run that went back since has other history.
    for restart in sorted(found, key=lambda one: one.step, reverse=True):
        record = folder.metrics.last(restart.step)
        state = read_state(checkpoints_of(restart.folder).open(restart.step))
        if record is not None and (record["step"], record["batch_hash"]) == (restart.step, state.batch_hash):
            return restart
    return None


def _later_lists(config: RunConfig, step: int) -> Iterator[str]:
    """Yield the keys of the lists of stages that begin at a step or later and forget other documents than before."""
    for i, stage in enumerate(config.stages):
        if stage.step > step and stage.data.forget is not None:
            yield f"stages.{i}.data.forget"


def _overrides(folder: RunFolder, config: RunConfig, restart: Restart, listed: Path) -> Iterator[str]:
    """Yield what the fork changes: the list, and all in which this run differs from the one that is forked."""
    stages: list[dict[str, Any]] = list(read_tree(folder.config)[0].get("stages") or [])
    begins = [stage["step"] for stage in stages]
    own = restart.folder == folder
    forget = [f"stages.{begins.index(restart.step)}.data.forget"] if restart.step in begins else ["stage.data.forget"]
    forget += _later_lists(config, restart.step)
    if not own:
        before = load_config(restart.folder.config, begun=True)
        _, changes = compare_for_resume(before, config, restart.step)
        values = config.model_dump(mode="json")
        for key in dict.fromkeys(_settable(change.key) for change in changes):
            if key.split(".")[0] not in ("run", "stages"):
                yield f"{key}={_flow(_value_of(values, key))}"
        if stages:
            yield f"stages={_flow([_without_defaults(stage) for stage in stages])}"
    for key in forget:
        yield f"{key}={listed}"


def _settable(key: str) -> str:
    """Return the part of a key up to the first list, which can only be set as a whole where it grows."""
    return ".".join(itertools.takewhile(lambda part: not part.isdecimal(), key.split(".")))


def _value_of(values: Any, key: str) -> object:
    for part in key.split("."):
        values = values[part]
    return values


def _flow(value: object) -> str:
    """Write a value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**9, sort_keys=False).removesuffix("...\n").strip()


def _without_defaults(value: Any) -> Any:
    """Leave out of a stage what says nothing: null, and empty sections."""
    if not isinstance(value, dict):
        return value
    kept = {key: _without_defaults(item) for key, item in value.items()}
    return {key: item for key, item in kept.items() if item not in (None, {}, [])}
