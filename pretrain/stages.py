"""What a run's config says of its stages, and each stage with all that it keeps. config -> stages -> trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from pretrain.model.architecture import ModelConfig
from pretrain.model.architectures import StageModel, parse_model
from pretrain.optim import OptimConfig, SchedulePart, StageSchedule
from shards import Config, ConfigError, DataConfig, Stage, StageData
from shards.config import with_recorded_plan
from shards.stages import stage_after


class StageTrain(Config):
    """A stage's changes of its batches; null: as before."""

    global_batch_size: int | None = Field(None, ge=1)  # rows of one optimizer step, over all ranks
    micro_batch_size: int | None = Field(None, ge=1)  # rows of one forward pass on one dp rank


class StageConfig(Config):
    """A stage's changes from a step on; everything else stays as it was. It may not be edited once it has begun."""

    step: int = Field(ge=1)  # optimizer steps that are done when the stage begins, or a text such as "9e9 tokens"
    model: StageModel = StageModel()
    data: StageData = StageData()
    train: StageTrain = StageTrain()
    # A schedule of its own, up to the next stage that has one; null: the old goes on
    optim: StageSchedule | None = None


@dataclass(frozen=True)
class StageBatches:
    """The rows and batches of one stage of a run, with all that it does not change.

    Attributes:
        step: optimizer steps that are done when it begins.
        global_batch_size: rows of one optimizer step, over all ranks.
        micro_rows: train.micro_batch_size in this stage.
    """

    step: int
    data: DataConfig
    global_batch_size: int
    micro_rows: int | None

    @property
    def tokens_per_step(self) -> int:
        """Return the tokens of one optimizer step, padding included."""
        return self.global_batch_size * self.data.seq_len

    def micro_batch_size(self, dp_size: int) -> int:
        """Return the rows per forward pass on one dp rank."""
        return self.micro_rows or self.global_batch_size // dp_size

    def micro_steps(self, dp_size: int) -> int:
        """Return the number of forward passes per optimizer step on one dp rank."""
        return self.global_batch_size // (dp_size * self.micro_batch_size(dp_size))

    @property
    def of_loader(self) -> Stage:
        """Return the stage as the loader takes it."""
        return Stage(self.step, self.data, self.global_batch_size)


@dataclass(frozen=True)
class RunStage(StageBatches):
    """One stage of a run, with all that it does not change.

    Attributes:
        model: the run's, with the positions of this stage.
    """

    model: ModelConfig


def batches_of(data: DataConfig, train: StageTrain, later: Sequence[StageConfig]) -> list[StageBatches]:
    """Return the batches of all stages of a run.

    Args:
        data, train: those of the first stage.
        later: what the stages after it change.
    Raises: ConfigError if a stage does not fit the one before.
    """
    assert train.global_batch_size is not None
    stages = [StageBatches(0, data, train.global_batch_size, train.micro_batch_size)]
    for i, changes in enumerate(later):
        before, at = stages[-1], f"stages.{i}"
        found = stage_after(before.of_loader, changes.step, changes.data, changes.train.global_batch_size, at)
        micro_rows = changes.train.micro_batch_size or before.micro_rows
        stages.append(StageBatches(found.step, found.data, found.global_batch_size, micro_rows))
    return stages


def stages_of(model: ModelConfig, data: DataConfig, train: StageTrain, later: Sequence[StageConfig]) -> list[RunStage]:
    """Return all stages of a run.

    Args:
        model, data, train: those of the first stage.
        later: what the stages after it change.
    Raises: ConfigError if a stage does not fit the one before.
    """
    models = [model]
    for i, changes in enumerate(later):
        models.append(models[-1].with_positions(changes.model.changes, f"stages.{i}.model"))
    return [
        RunStage(one.step, one.data, one.global_batch_size, one.micro_rows, of_stage)
        for one, of_stage in zip(batches_of(data, train, later), models, strict=True)
    ]


def recorded_stages(tree: Mapping[str, Any], file: str) -> list[RunStage]:
    """Return all stages of a run, given the sections of the config in its folder.

    Args:
        file: what the sections were read from, for messages.
    Raises: ConfigError if one of them is missing, or cannot be read.
    """
    if missing := [key for key in ("model", "data", "train") if not isinstance(tree.get(key), Mapping)]:
        raise ConfigError(f"{file} has no section {missing[0]}; the config in a run's folder has")
    if "global_batch_size" not in tree["train"]:
        raise ConfigError(f"{file} has no train.global_batch_size; the config in a run's folder has")
    return stages_of(
        parse_model(tree["model"], f"{file}: model"),
        DataConfig.parse(with_recorded_plan(tree["data"]), f"{file}: data"),
        StageTrain(global_batch_size=tree["train"]["global_batch_size"]),
        [StageConfig.parse(stage, f"{file}: stages.{i}") for i, stage in enumerate(tree.get("stages") or ())],
    )


def begun_by(step: int, later: Sequence[StageConfig]) -> list[StageConfig]:
    """Return the stages after the first of which a run that has done `step` steps has done any.

    One that begins at this very step is still to come: what there is of the run by then is the stage's before it.
    """
    return [stage for stage in later if stage.step < step]


def stage_of(step: int, stages: Sequence[RunStage]) -> RunStage:
    """Return the stage that a step belongs to, counted from 1, and so a checkpoint of it; of step 0 the first.

    Args:
        stages: all of the run.
    """
    return next(stage for stage in reversed(stages) if stage.step < step or not stage.step)


def schedule_of(optim: OptimConfig, later: Sequence[StageConfig], stages: Sequence[RunStage]) -> list[SchedulePart]:
    """Return the schedules of a run, each with the step at which it begins.

    Args:
        later: what the stages after the first change.
        stages: all stages, by whose batches optim.batch_size_rule scales the learning rate.
    """
    power = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[optim.batch_size_rule]
    tokens = [stage.tokens_per_step for stage in stages]

    def factors(base: int) -> tuple[tuple[int, float], ...]:
        """Return the factors of a rate that is set for this many tokens a step."""
        scaled = [(stage.step, (count / base) ** power) for stage, count in zip(stages, tokens, strict=True)]
        return tuple(scaled) if power else ()

    parts = [SchedulePart(0, optim, factors(tokens[0]))]
    for changes, count in zip(later, tokens[1:], strict=True):
        if changes.optim is not None:
            base = tokens[0] if changes.optim.learning_rate is None else count
            parts.append(SchedulePart(changes.step, changes.optim.over(optim), factors(base)))
    return parts
