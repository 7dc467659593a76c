"""The whole configuration of a run: it composes the parts that other modules own and checks them together.

file, overrides -> config_file -> RunConfig -> {start, loop, commands}. All problems are reported at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, JsonValue, TypeAdapter, ValidationError, model_validator

from pretrain.checkpoint.store import CheckpointConfig
from pretrain.config_file import dump, read_tree
from pretrain.config_problems import problems_of
from pretrain.deepspeed_keys import DeepSpeedConfig, batch_sizes, deepspeed_config, without_batch_sizes
from pretrain.evaluation.eval_set import EvaluationConfig
from pretrain.model.architecture import Precision
from pretrain.model.architectures import AnyModelConfig, StageModel, without_default
from pretrain.model.attention_choice import AttentionShape
from pretrain.model.sequence import copies_of_kv_heads
from pretrain.model.size import Workload, checkpoint_bytes
from pretrain.optim import OptimConfig, SchedulePart
from pretrain.parallel_config import ParallelConfig
from pretrain.run.metrics import MetricsConfig
from pretrain.run.run_folder import Rewind, RunFolder
from pretrain.run.wandb_tracker import WandbConfig
from pretrain.stages import RunStage, StageConfig, StageTrain, schedule_of, stage_of, stages_of
from pretrain.token_lengths import Pace, in_steps
from pretrain.train_config import TrainConfig
from shards import Config, ConfigError, DataConfig, Stage
from shards.config import check_split, with_recorded_plan
from shards.config_errors import explain

# The sizes in a Workload that DeepSpeed's section may set, by the key there.
_DEEPSPEED_SIZES = {"reduce_bucket": "reduce_bucket_size", "gathered_weights": "stage3_max_live_parameters"}


class RunPart(Config):
    """The name, place and seed of a run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")  # name of the run's folder and of its wandb run
    dir: Path = Path("runs")  # folder of all run folders; relative to the current folder
    seed: int = Field(0, ge=0)  # decides the order of the data, the initial weights and dropout


class RunConfig(Config):
    """A run's config. It is consistent in all that does not depend on the number of ranks; `check` covers the rest."""

    run: RunPart
    model: AnyModelConfig
    # A model to take initial weights from: a folder that was exported or downloaded, or a run's, with @STEP for another
    # checkpoint than the newest; None: random initialization. With model.lora it is read at every start, and may have
    # moved as long as its files are the same
    init_from: Path | None = None
    init_optimizer: bool = False  # also take the optimizer's state of the run that init_from names
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    precision: Precision = "bf16"  # type of the weights in the forward and backward pass; the optimizer's are fp32
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    metrics: MetricsConfig = MetricsConfig()
    wandb: WandbConfig = WandbConfig()
    stages: tuple[StageConfig, ...] = ()  # what changes in the course of the run, in order; docs/branching.md
    # DeepSpeed's own keys, beyond those derived from the sections above
    deepspeed: dict[str, JsonValue] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _lengths_in_steps(cls, values: Any) -> Any:
        return in_steps(values) if isinstance(values, Mapping) else values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if problems := list(problems_of(self.__dict__)):
            raise ValueError("\n".join(problems))
        return self

    @property
    def judging_figures(self) -> dict[str, str | None]:
        """Return the figures of evaluations by which something is decided, by the keys that name them."""
        rule = self.train.stop
        return {"train.stop.metric": rule.metric if rule else None, "checkpoint.best": self.checkpoint.best}

    @property
    def folder(self) -> RunFolder:
        """Return the folder of the run."""
        return RunFolder(self.run.dir / self.run.name)

    @property
    def all_stages(self) -> list[RunStage]:
        """Return all stages of the run, the first of which is what the sections model, data and train describe."""
        train = StageTrain(global_batch_size=self.train.global_batch_size, micro_batch_size=self.train.micro_batch_size)
        return stages_of(self.model, self.data, train, self.stages)

    @property
    def later_stages(self) -> list[Stage]:
        """Return the stages after the first, as the loader takes them."""
        return [stage.of_loader for stage in self.all_stages[1:]]

    def stage_at(self, step: int) -> RunStage:
        """Return the stage in which a run goes on that has done `step` steps; one that begins there has begun."""
        return next(stage for stage in reversed(self.all_stages) if stage.step <= step)

    def stage_of(self, step: int) -> RunStage:
        """Return the stage that a step belongs to, counted from 1, and so a checkpoint of it; of step 0 the first.

        One that begins at this very step has not changed anything yet.
        """
        return stage_of(step, self.all_stages)

    @property
    def schedule(self) -> list[SchedulePart]:
        """Return the learning-rate schedules, each with the step at which it begins."""
        return schedule_of(self.optim, self.stages, self.all_stages)

    def tokens_until(self, step: int) -> int:
        """Return the tokens of the steps up to one, padding included."""
        return Pace([(stage.step, stage.tokens_per_step) for stage in self.all_stages]).tokens_until(step)

    def check(self, dp_size: int) -> None:
        """Check what depends on the number of data-parallel ranks.

        Raises:
            ConfigError: naming each value that does not fit, and those that would.
        """
        for i, stage in enumerate(self.all_stages):
            key = f"stages.{i - 1}.train" if i else "train"
            check_split(stage.global_batch_size, dp_size, stage.micro_rows or 1, key)

    @property
    def bytes_per_weight(self) -> int:
        """Return the bytes of a weight in the forward and backward pass."""
        return 2 if self.precision == "bf16" else 4

    @property
    def checkpoint_bytes(self) -> int:
        """Return the bytes of a checkpoint of the whole model."""
        averaged, optim = self.train.ema is not None, self.optim
        return checkpoint_bytes(self.model, self.bytes_per_weight, optim.name, averaged, optim.moment_bytes)

    def settled(self, begun: RunConfig | None) -> RunConfig:
        """Return this config with its plan version: its own if set, else that of the run it continues."""
        version = self.data.plan_version or (begun or self).data.plan
        return self.model_copy(update={"data": self.data.model_copy(update={"plan_version": version})})

    def passing_over(self, rewinds: Sequence[Rewind]) -> RunConfig:
        """Return this config with the steps that the run itself has decided to pass over, as far as the run goes."""
        end = self.train.steps or sys.maxsize
        decided = [rewind.passed_over for rewind in rewinds]
        within = [(first, min(last, end)) for first, last in decided if first <= end]
        skipped = _joined(self.data.skip_steps, within)
        return self.model_copy(update={"data": self.data.model_copy(update={"skip_steps": skipped})})

    def to_yaml(self) -> str:
        """Return all values, including defaults, as YAML that `load_config` reads back to an equal config."""
        return dump(self.model_dump(mode="json"))

    def describe(self, dp_size: int = 1) -> str:
        """Return the output of `--print-config`: the config, and the DeepSpeed config derived from it.

        Raises:
            ConfigError: if the config does not fit this number of data-parallel ranks.
        """
        self.check(dp_size)
        first = self.stage_at(0)
        zero_size = dp_size * self.parallel.sp_size
        batch = batch_sizes(first.micro_batch_size(dp_size), first.micro_steps(dp_size), zero_size)
        derived = dump({"derived for DeepSpeed": batch | self.deepspeed_config()})
        commented = "".join(f"# {line}\n" for line in derived.splitlines())
        return f"{self.to_yaml()}\n# On {dp_size} data-parallel ranks:\n{commented}"

    def deepspeed_config(self) -> DeepSpeedConfig:
        """Return DeepSpeed's configuration, except for the batch sizes."""
        return deepspeed_config(self.parallel, self.optim, self.precision, self.deepspeed)

    def workload(self, dp_size: int, stage: RunStage | None = None) -> Workload:
        """Return one rank's workload in a stage, by default the first, from which its memory can be estimated."""
        stage = stage or self.stage_at(0)
        zero = self.deepspeed_config()["zero_optimization"]
        return Workload(
            model=stage.model,
            parallel=self.parallel,
            dp_size=dp_size,
            micro_batch_size=stage.micro_batch_size(dp_size),
            seq_len=stage.data.seq_len,
            bytes_per_weight=self.bytes_per_weight,
            layers_measured=self.metrics.layers_every is not None,
            averaged=self.train.ema is not None,
            optimizer=self.optim.name,
            moment_bytes=self.optim.moment_bytes,
            **{name: zero[key] for name, key in _DEEPSPEED_SIZES.items() if key in zero},
        )

    def attention_shape(self, dp_size: int, stage: RunStage) -> AttentionShape | None:
        """Return the attention of one layer on one rank in a stage, from which the fastest backend can be found."""
        tp_size, sp_size, heads = self.parallel.tp_size, self.parallel.sp_size, self.model.heads
        if heads is None:
            return None
        kv_heads = heads.n_kv_heads // tp_size
        return AttentionShape(
            rows=stage.micro_batch_size(dp_size),
            length=stage.data.seq_len,
            longest=max(each.data.seq_len for each in self.all_stages),
            n_heads=heads.n_heads // (tp_size * sp_size),
            n_kv_heads=kv_heads * copies_of_kv_heads(kv_heads, sp_size) // sp_size,
            head_dim=heads.head_dim,
            dtype=torch.bfloat16 if self.precision == "bf16" else torch.float32,
            dropout=heads.dropout,
        )

    def hash(self) -> str:
        """Return 16 hex digits that differ whenever a value differs."""
        values = self.model_dump(mode="json")
        # Configs of before there was a choice have the same hash
        _leave_out(values["parallel"], sp_size=1, feed_forward_tokens=None)
        _leave_out(values["evaluation"], needles=None)
        for stage in values["stages"]:
            _leave_out(stage, model=StageModel().model_dump(mode="json"))
        for section in (values, *values["stages"]):
            for source in section["data"]["sources"]:
                _leave_out(source, min_tokens=None, max_tokens=None)
        canonical = json.dumps(values | {"model": without_default(values["model"])}, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _joined(skipped: tuple[tuple[int, int], ...], more: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return `data.skip_steps` with more steps; without any, as it was written."""
    if not more:
        return skipped
    joined: list[tuple[int, int]] = []
    for first, last in sorted([*skipped, *more]):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
        else:
            joined.append((first, last))
    return tuple(joined)


def load_config(path: Path, overrides: Sequence[str] = (), begun: bool = False) -> RunConfig:
    """Read a config from YAML and `key.path=value` overrides.

    Args:
        begun: it is the config in a run's folder, where a missing plan version means an older run.
    Raises:
        ConfigError: with a line for each problem: its place, the key, the value, and what would be right.
    """
    tree, origins = read_tree(path, overrides)
    _fill_in(tree, begun)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = explain(error, RunConfig, origins=origins, file=str(path))
        if {finding["type"] for finding in error.errors()} != {"value_error"}:
            # pydantic does not compare sections while one is invalid, which would hide the other problems.
            lines += [f"{path}: {problem}" for problem in problems_of(_valid_parts(tree))]
    raise ConfigError("\n".join(lines))


def _fill_in(tree: dict[str, Any], begun: bool) -> None:
    """Spell out what follows from other keys, so that each part of the program finds it in its own section."""
    if begun and isinstance(tree.get("data"), dict):
        tree["data"] = with_recorded_plan(tree["data"])
    if begun and isinstance(tree.get("deepspeed"), dict):
        tree["deepspeed"] = without_batch_sizes(tree["deepspeed"])
    data, train = tree.get("data"), tree.get("train")
    if not isinstance(data, dict):
        return
    if isinstance(train, dict) and train.get("epochs") is not None and isinstance(data.get("sources"), list):
        for source in data["sources"]:
            if isinstance(source, dict) and source.get("max_epochs") is None:
                source["max_epochs"] = train["epochs"]


def _valid_parts(tree: Mapping[str, object]) -> dict[str, Any]:
    """Return the sections that are valid by themselves; a missing section gets its default."""
    parts = {}
    for name, field in RunConfig.model_fields.items():
        if name not in tree and not field.is_required():
            parts[name] = field.get_default(call_default_factory=True)
        elif name in tree:
            with contextlib.suppress(ValidationError):
                parts[name] = TypeAdapter[Any](field.rebuild_annotation()).validate_python(tree[name])
    return parts


def _leave_out(values: dict[str, Any], **former: object) -> None:
    """Remove the keys that have these values."""
    for key, value in former.items():
        if values[key] == value:
            del values[key]
