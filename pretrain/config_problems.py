"""What the sections of a config have in them that cannot work together. sections -> config_problems -> config."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pretrain.checkpoint.store import CheckpointConfig
from pretrain.deepspeed_keys import deepspeed_config
from pretrain.evaluation.eval_set import EvaluationConfig
from pretrain.model.architecture import ModelConfig
from pretrain.model.attention import MASK_LIMIT, mask_bytes
from pretrain.model.weights import split_problems, trained_specs
from pretrain.optim import OptimConfig, is_named
from pretrain.parallel_config import ParallelConfig
from pretrain.stages import RunStage, StageConfig, StageTrain, batches_of
from pretrain.train_config import TrainConfig
from shards import ConfigError, DataConfig
from shards.config_errors import not_divisible


def problems_of(parts: Mapping[str, Any]) -> Iterator[str]:
    """Yield what of a run's config cannot work for any number of data-parallel ranks.

    Args:
        parts: its sections by name, those that are valid by themselves.
    """
    model: ModelConfig | None = parts.get("model")
    parallel: ParallelConfig | None = parts.get("parallel")
    train: TrainConfig | None = parts.get("train")
    checkpoint: CheckpointConfig | None = parts.get("checkpoint")
    data: DataConfig | None = parts.get("data")
    if train and train.epochs and data:
        for source in data.sources:
            if source.max_epochs != train.epochs:
                yield (
                    f"data.sources: {source.name} has max_epochs={source.max_epochs}, but train.epochs={train.epochs} "
                    "applies to all sources; leave max_epochs out, or set train.steps instead of train.epochs"
                )
    if model:
        yield from _model_problems(model, parts.get("parallel"), parts.get("optim") or OptimConfig())
        if model.adapters and "init_from" in parts and parts["init_from"] is None:
            yield "model.lora: adapters are trained on a model that exists; set init_from to its folder"
        if model.adapters and parts.get("init_optimizer"):
            yield (
                "model.lora: the state of an optimizer of all weights means nothing to adapters; leave init_optimizer"
                " out"
            )
    if parts.get("init_optimizer") and not parts.get("init_from"):
        yield "init_optimizer: needs the run in init_from whose optimizer's state is to be taken"
    if model:
        yield from _position_problems(model, parts.get("stages") or ())
    if data and train:
        yield from _stage_problems(data, train, parts.get("stages") or (), parallel)
    if checkpoint and checkpoint.keep_every:
        every = ("checkpoint.every", checkpoint.every)
        yield from not_divisible("checkpoint.keep_every", checkpoint.keep_every, *every)
    evaluation: EvaluationConfig | None = parts.get("evaluation")
    if evaluation and train and train.stop and not (evaluation.suite and evaluation.every):
        yield "train.stop: needs evaluations to judge by; set evaluation.suite and evaluation.every"
    if evaluation and checkpoint and checkpoint.best:
        if not (evaluation.suite and evaluation.every):
            yield f"checkpoint.best={checkpoint.best}: set evaluation.suite and evaluation.every, or there is no figure"
        elif checkpoint.every % evaluation.every:
            yield (
                f"checkpoint.best={checkpoint.best}: every checkpoint needs an evaluation, so make checkpoint.every="
                f"{checkpoint.every} a multiple of evaluation.every={evaluation.every}"
            )
    if parallel:
        yield from parallel.problems()
    if {"parallel", "optim", "precision", "deepspeed"} <= parts.keys():
        try:
            deepspeed_config(parts["parallel"], parts["optim"], parts["precision"], parts["deepspeed"])
        except ConfigError as error:
            yield str(error)


def check_masks(stages: Sequence[RunStage], model: ModelConfig, parallel: ParallelConfig) -> None:
    """Check, before training starts, that no stage's rows need an attention mask that is too large to be made.

    Raises:
        ConfigError: naming each stage whose rows do.
    """
    heads = model.heads
    if heads is None or not (heads.dropout or parallel.attention == "sdpa"):
        return
    asked = f"model.attention_dropout={heads.dropout}" if heads.dropout else "parallel.attention=sdpa"
    right = "model.attention_dropout=0" if heads.dropout else "parallel.attention=auto"
    problems = [
        f"{f'stages.{i - 1}.' if i else ''}data.seq_len={stage.data.seq_len}: {asked} needs a whole mask, which grows"
        f" with the square of a row's length, here {mask_bytes(stage.data.seq_len) / 1e9:.1f} GB a row; set {right}, or"
        f" rows of at most {math.isqrt(MASK_LIMIT)}"
        for i, stage in enumerate(stages)
        if mask_bytes(stage.data.seq_len) > MASK_LIMIT
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _model_problems(model: ModelConfig, parallel: ParallelConfig | None, optim: OptimConfig) -> Iterator[str]:
    """Yield what cannot work of a model, by itself and with the others.

    Args:
        parallel: None if that section of the config is not valid.
    """
    yield from model.problems()
    yield from _pattern_problems(model, optim)
    if model.adapters:
        yield from _adapter_problems(model, parallel, optim)
    if parallel:
        yield from _layout_problems(model, parallel)
        yield from split_problems(model, parallel.tp_size, "parallel.tp_size")


def _length_problems(key: str, seq_len: int, parallel: ParallelConfig) -> Iterator[str]:
    """Yield why rows of this length cannot be divided among ranks.

    Args:
        key: what says how long they are.
    """
    if parallel.sequence_parallel and parallel.sp_size > 1:
        both = parallel.tp_size * parallel.sp_size
        yield from not_divisible(key, seq_len, "parallel.tp_size times parallel.sp_size", both)
    elif parallel.sequence_parallel:
        yield from not_divisible(key, seq_len, "parallel.tp_size", parallel.tp_size)
    else:
        yield from not_divisible(key, seq_len, "parallel.sp_size", parallel.sp_size)


def _position_problems(model: ModelConfig, later: Sequence[StageConfig]) -> Iterator[str]:
    """Yield what of its positions a stage cannot change, and what cannot work afterwards."""
    known = set(model.problems())
    for i, stage in enumerate(later):
        try:
            model = model.with_positions(stage.model.changes, f"stages.{i}.model")
        except ConfigError as error:
            yield str(error)
            return
        yield from (f"stages.{i}.{problem}" for problem in model.problems() if problem not in known)
        known |= set(model.problems())


def _stage_problems(
    data: DataConfig, train: TrainConfig, later: Sequence[StageConfig], parallel: ParallelConfig | None
) -> Iterator[str]:
    """Yield what of its rows and batches cannot work in a stage, and steps that the run does not have."""
    first = StageTrain(global_batch_size=train.global_batch_size, micro_batch_size=train.micro_batch_size)
    try:
        stages = batches_of(data, first, later)
    except ConfigError as error:
        yield str(error)
        return
    for i, stage in enumerate(stages):
        at = f"stages.{i - 1}." if i else ""
        if parallel:
            yield from _length_problems(f"{at}data.seq_len", stage.data.seq_len, parallel)
        if stage.micro_rows:
            rows = (f"{at}train.global_batch_size", stage.global_batch_size)
            yield from not_divisible(*rows, f"{at}train.micro_batch_size", stage.micro_rows)
    if later and train.epochs:
        yield "stages: a run of several stages needs train.steps in place of train.epochs, since its rows change"
    if train.steps and stages[-1].step >= train.steps:
        last = f"stages.{len(later) - 1}.step={stages[-1].step}"
        yield f"{last}: the run ends at train.steps={train.steps}, so that stage never begins"
    if train.steps and (beyond := [steps for steps in data.skip_steps if steps[1] > train.steps]):
        yield f"data.skip_steps: {list(beyond[0])} lies beyond the run's end at train.steps={train.steps}"


def _layout_problems(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    """Yield what of a layout an architecture knows nothing of."""
    named = f"model.architecture={model.architecture}"
    if parallel.sp_size > 1 and not model.SPLITS_ROWS:
        yield f"parallel.sp_size={parallel.sp_size}: {named} cannot divide a row over ranks; set parallel.sp_size=1"
    if parallel.feed_forward_tokens and not model.TILES:
        asked = f"parallel.feed_forward_tokens={parallel.feed_forward_tokens}"
        yield f"{asked}: {named} does not compute a few tokens at a time; set it to null"
    if model.SPLITS_ROWS and model.heads and model.heads.n_heads % parallel.tp_size == 0:
        of_rank = model.heads.n_heads // parallel.tp_size
        key = "model.n_heads" if parallel.tp_size == 1 else f"model.n_heads / parallel.tp_size ({parallel.tp_size})"
        yield from not_divisible(key, of_rank, "parallel.sp_size", parallel.sp_size)
    if parallel.attention != "auto" and model.heads is None:
        yield f"parallel.attention={parallel.attention}: {named} has no attention; leave it out"
    if model.heads and model.heads.dropout and parallel.attention in ("flex", "varlen"):
        yield (
            f"parallel.attention={parallel.attention} has no dropout of the attention's weights, which"
            f" model.attention_dropout={model.heads.dropout} asks for; use sdpa or auto"
        )


def _adapter_problems(model: ModelConfig, parallel: ParallelConfig | None, optim: OptimConfig) -> Iterator[str]:
    """Yield what cannot go together with adapters."""
    assert model.adapters is not None
    if optim.name == "muon":
        yield "model.lora: optim.name=muon orthogonalizes matrices, not factors of an update; set optim.name: adamw"
    of_swiglu = [name for name in ("w1", "w2", "w3") if model.adapters.adapts(name)]
    if parallel and parallel.feed_forward_tokens and of_swiglu:
        yield (
            f"model.lora.targets: parallel.feed_forward_tokens={parallel.feed_forward_tokens} computes feed-forward"
            f" networks without adapters; leave {', '.join(of_swiglu)} out, or set one of the two to null"
        )
    if parallel and parallel.sequence_parallel and model.adapters.dropout:
        yield (
            f"model.lora.dropout={model.adapters.dropout}: with parallel.sequence_parallel each tensor-parallel rank"
            " draws masks of its own, but all of them read the same inputs here; set one of the two to 0 or false"
        )


def _pattern_problems(model: ModelConfig, optim: OptimConfig) -> Iterator[str]:
    """Yield patterns that match no weight that is trained."""
    names = trained_specs(model)
    for pattern in optim.learning_rate_groups:
        if not any(is_named(name, pattern) for name in names):
            kinds = dict.fromkeys(re.sub(r"^blocks\.\d+\.", "blocks.*.", name) for name in names)
            yield (
                f"optim.learning_rate_groups: no weight's name matches {pattern!r}; the names are {', '.join(kinds)},"
                " with the number of a block, from 0, in place of *"
            )
