"""Read what a run recorded about the steps of an interval. run folder -> interval -> {replay, comparison}."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from pretrain.checkpoint.state import RunState
from pretrain.checkpoint.state_hash import StateHash
from pretrain.config import RunConfig, load_config
from pretrain.config_changes import may_change
from pretrain.faults.spikes import StepFigures, last_figures
from pretrain.run.run_folder import RunFolder
from pretrain.run.starts import StartRecord, read_starts, start_of
from pretrain.run.step_log import step_of
from pretrain.stepper import Step
from shards import ConfigError

_FREE = ("parallel.", "train.micro_batch_size")  # what an audit may choose, besides where the data lies


class Figures(msgspec.Struct, frozen=True):
    """The figures of one step that are compared, under the names of metrics.jsonl.

    Attributes:
        loss, grad_norm: None if they are not finite.
        trained_hash: None if all that was read was trained on.
        weight_hash, optimizer_hash: None where none was taken.
    """

    step: int
    batch_hash: str
    learning_rate: float | None = None
    loss: float | None = None
    grad_norm: float | None = None
    weight_hash: str | None = None
    optimizer_hash: str | None = None
    trained_hash: str | None = None

    @classmethod
    def of_step(cls, made: Step, hashes: StateHash | None) -> Figures:
        """Return the figures of a step that was just trained."""
        loss, norm = (value if math.isfinite(value) else None for value in (made.stats.loss, made.stats.grad_norm))
        state = made.state
        words = _words(hashes)
        return cls(state.step, state.batch_hash, made.learning_rate, loss, norm, *words, state.trained_hash or None)

    @classmethod
    def of_state(cls, state: RunState, hashes: StateHash) -> Figures:
        """Return the figures of a state that was just loaded."""
        return cls(state.step, state.batch_hash, None, None, None, *_words(hashes), state.trained_hash or None)


@dataclass(frozen=True)
class Interval:
    """The figures of consecutive steps, recorded or found.

    Attributes:
        before: those of the state that the first step begins with; of a recorded state without a hash, only the chain
            of batches.
        steps: at least one.
    """

    before: Figures
    steps: list[Figures]

    @property
    def described(self) -> str:
        """Return the steps in words, such as "steps 9 to 12"."""
        first, last = self.steps[0].step, self.steps[-1].step
        return f"step {first}" if first == last else f"steps {first} to {last}"


@dataclass(frozen=True)
class Training:
    """All that an interval was trained with.

    Attributes:
        config: the run's, of the start that trained the interval, with what the audit changes.
        starts: those that trained its steps, each once; empty if the run did not record all of them.
        recorded: the run's configs, those of `starts` or, without these, that of its newest start.
        figures: of the steps before, from which the run tells spikes.
    """

    config: RunConfig
    starts: list[StartRecord]
    recorded: list[RunConfig]
    figures: list[StepFigures]


def read_interval(folder: RunFolder, from_step: int, steps: int) -> Interval:
    """Read the recorded figures of the `steps` steps after `from_step`.

    Raises:
        ConfigError: if metrics.jsonl does not have each of them once.
    """
    if from_step < 0 or steps < 1:
        raise ConfigError(f"--from-step {from_step} --steps {steps}: give a step from 0 on, and at least one step")
    path, newest = folder.metrics.path, folder.metrics.last()
    last = step_of(newest) if newest else 0
    if last < from_step + steps:
        most = max(0, last - from_step)
        fits = f"--steps may be at most {most}" if most else f"--from-step must be below {last}"
        raise ConfigError(
            f"--from-step {from_step} --steps {steps}: {path} has records up to step {last}, so {fits} (a last line"
            " that a kill has torn does not count)"
        )
    wanted = range(max(1, from_step), from_step + steps + 1)
    records = list(folder.metrics.read(wanted[0] - 1, wanted[-1]))
    found = [step_of(record) for record in records]
    if odd := [step for step in wanted if found.count(step) != 1]:
        state = "is missing or torn" if odd[0] not in found else "has several records"
        raise ConfigError(
            f"{path}: step {odd[0]} {state}, so the run does not say what it trained; the interval cannot be audited,"
            " another one can"
        )
    try:
        figures = msgspec.convert(records, list[Figures])
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: a record of {wanted[0]} to {wanted[-1]} is damaged: {error}") from None
    before = figures.pop(0) if from_step else Figures(0, "")
    return Interval(before, figures)


def read_training(folder: RunFolder, interval: Interval, overrides: Sequence[str]) -> Training:
    """Read the config that an interval was trained with, with an audit's overrides, and who trained it.

    Raises:
        ConfigError: if an override changes what was trained, a config is missing, or the config changed in between.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if not key.startswith(_FREE) and not (key.startswith("data.") and may_change(key)):
            raise ConfigError(
                f"{override}: an audit trains what the run trained; it may set parallel.*, train.micro_batch_size, and"
                " where and how the data is read, such as data.sources.0.paths and data.num_workers"
            )
    every = read_starts(folder)
    found = [start_of(every, figures.step) for figures in interval.steps]
    # One that an older version trained in part is no better known than one that it trained as a whole.
    starts = [start for i, start in enumerate(found) if start and start not in found[:i]] if None not in found else []
    paths = [folder.config_of(start.config_hash) for start in starts] or [folder.config]
    missing = next((path for path in paths if not path.exists()), None)
    if missing:
        raise ConfigError(f"{missing} is missing, the config that {interval.described} were trained with; put it back")
    configs = [load_config(path, begun=True) for path in paths]
    for start, config in zip(starts, configs, strict=False):
        if _schedule(config) != _schedule(configs[0]):
            raise ConfigError(
                f"{interval.described}: the start after step {start.step} changed optim or the run's length, on which"
                f" the schedule is based, the positions of a stage, train.ema, or what is skipped as a spike; audit the"
                f" steps up to {start.step} and those after it one by one"
            )
    config = load_config(paths[0], overrides, begun=True)
    # A later start knows all steps of the past that were passed over, and may not change them.
    skipped = {"skip_steps": configs[-1].data.skip_steps}
    config = config.model_copy(update={"data": config.data.model_copy(update=skipped)})
    figures = last_figures(folder, interval.before.step, config.train.spike_window)
    return Training(config, starts, configs, figures)


def _schedule(config: RunConfig) -> dict[str, object]:
    """Return what a run may change from start to start although figures depend on it."""
    plain = config.model_dump(mode="json")
    length = {key: plain["train"][key] for key in ("steps", "epochs")}
    stages = [{key: stage[key] for key in ("step", "optim", "model")} for stage in plain["stages"]]
    is_constant = all(part.optim.schedule == "constant" for part in config.schedule)
    spikes = {key: plain["train"][key] for key in ("on_spike", "spike_window", "spike_score")}
    refusing = spikes if config.train.on_spike == "skip" else {}
    always = {"optim": plain["optim"], "stages": stages, "ema": plain["train"]["ema"]}
    return always | ({} if is_constant else length) | refusing


def _words(hashes: StateHash | None) -> tuple[str | None, str | None]:
    return (hashes.weights, hashes.optimizer) if hashes else (None, None)
