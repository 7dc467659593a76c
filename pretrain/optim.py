"""The optimizer's parameter groups, and learning-rate schedules as pure functions of the step. config -> engine."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple, TypedDict

import torch
from pydantic import Field

from pretrain.parametrization import Scale
from shards import Config

Decay = Literal["linear", "cosine", "sqrt"]  # the shape of a curve from 1 to 0

ORTHOGONALIZATION_ITERATIONS = 5  # of Newton and Schulz, in each of Muon's updates

OptimizerName = Literal["adamw", "muon"]

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Config):
    """The optimizer and its schedule."""

    # muon: on the blocks' matrices; AdamW on embedding, output and vectors, with the same learning rate
    name: OptimizerName = "adamw"
    learning_rate: float = Field(3e-4, gt=0)  # peak, reached at the end of the warm-up
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"  # wsd: warm-up, stable, decay
    warmup_steps: int = Field(0, ge=0)  # optimizer steps, not micro-steps, or a text such as "1e9 tokens"
    # Optimizer steps of wsd's decay, or a text such as "1e9 tokens"; None: the last tenth of the run
    decay_steps: int | None = Field(None, ge=1)
    decay_shape: Decay = "linear"  # of wsd's decay; sqrt: 1 - sqrt(t), which falls fast at first
    floor: float = Field(0.1, ge=0, le=1)  # lowest learning rate after the warm-up, as a share of the peak
    # How the learning rate follows the tokens of a step where a stage changes them: times their ratio to those of the
    # stage that sets the rate (linear), or its root (sqrt)
    batch_size_rule: Literal["none", "sqrt", "linear"] = "none"
    betas: tuple[Beta, Beta] = (0.9, 0.95)  # decay rates, per step, of the running means of the gradient and its square
    # Factors of the learning rate by patterns of weights' names, such as "blocks.*.attention.w?.weight: 0.5"; of those
    # that match a weight, all apply
    learning_rate_groups: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    # Type of the running means of the gradient and its square; bf16: half their memory, rounded at random
    moments: Literal["fp32", "bf16"] = "fp32"
    momentum: Beta = 0.95  # decay rate, per step, of Muon's running mean of the gradient; AdamW has betas
    eps: float = Field(1e-8, gt=0)  # added to the root of the mean square gradient
    weight_decay: float = Field(0.1, ge=0)  # on matrices only; multiplied by the learning rate, as AdamW does
    grad_clip: float = Field(1.0, ge=0)  # largest global gradient norm; 0 disables clipping
    z_loss: float = Field(0.0, ge=0)  # weight of the mean squared logsumexp of the logits; PaLM used 1e-4

    @property
    def moment_bytes(self) -> int:
        """Return the bytes of a moment of one weight."""
        return 2 if self.moments == "bf16" else 4

    def factor_of(self, name: str) -> float:
        """Return the factor that the patterns give a weight's learning rate."""
        return math.prod(factor for key, factor in self.learning_rate_groups.items() if is_named(name, key))


class StageSchedule(Config):
    """A schedule that begins with a stage; what is null is as in `optim`."""

    learning_rate: float | None = Field(None, gt=0)  # peak
    schedule: Literal["constant", "linear", "cosine", "wsd"] | None = None  # its shape, over the steps of the stage
    warmup_steps: int = Field(0, ge=0)  # optimizer steps of a warm-up from 0; it does not follow from `optim`
    decay_steps: int | None = Field(None, ge=1)  # optimizer steps of wsd's decay
    decay_shape: Decay | None = None  # its shape
    floor: float | None = Field(None, ge=0, le=1)  # lowest learning rate, as a share of the peak

    def over(self, optim: OptimConfig) -> OptimConfig:
        """Return a config with these values in it."""
        named = {key: value for key, value in self.model_dump().items() if value is not None}
        return optim.model_copy(update={"decay_steps": None} | named)


class SchedulePart(NamedTuple):
    """A learning-rate schedule and the step at which it begins, counted from 0.

    Attributes:
        factors: of its learning rate, each with the step from which on it holds, in order; empty: always 1.
    """

    step: int
    optim: OptimConfig
    factors: tuple[tuple[int, float], ...] = ()

    def factor(self, step: int) -> float:
        """Return by what the learning rate of a step is multiplied."""
        return next((factor for begin, factor in reversed(self.factors) if begin <= step), 1.0)


class ParameterGroup(TypedDict):
    """A parameter group as torch's optimizers take it."""

    params: list[torch.nn.Parameter]
    weight_decay: float
    learning_rate_scale: float  # factor of the step's learning rate
    muon: bool  # whether Muon trains it, rather than AdamW


def learning_rate_at(step: int, config: OptimConfig, steps: int) -> float:
    """Return the learning rate of one optimizer step.

    Args:
        step: the step, counted from 0.
        config: peak, schedule, warm-up and floor.
        steps: optimizer steps of the whole run; the schedule reaches its floor at the last one.
    Returns:
        The learning rate. During the warm-up it grows linearly and step 0 already has 1/warmup_steps of the peak.
    Source: cosine, Loshchilov and Hutter 2017, arXiv 1608.03983; WSD, Hu et al. 2024, arXiv 2404.06395; its decay by
        1 - sqrt(t), Haegele et al. 2024, arXiv 2405.18392.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    return config.learning_rate * (config.floor + (1 - config.floor) * _height_at(step, config, steps))


def learning_rate_of_run(step: int, parts: Sequence[SchedulePart], steps: int) -> float:
    """Return the learning rate of one optimizer step of a run whose stages may have schedules of their own.

    The first schedule is that of the whole run, as far as it gets; a later one spans the steps up to the next one.

    Args:
        step: the step, counted from 0.
        parts: the schedules, in order, the first from step 0.
        steps: optimizer steps of the whole run.
    """
    number = max(i for i, part in enumerate(parts) if part.step <= step)
    part = parts[number]
    end = parts[number + 1].step if 0 < number < len(parts) - 1 else steps
    return part.factor(step) * learning_rate_at(step - part.step, part.optim, end - part.step)


def _height_at(step: int, config: OptimConfig, steps: int) -> float:
    """Return the height of a schedule after the warm-up, between its peak, 1, and its floor, 0."""
    last = steps - 1
    decay_start = config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "wsd":
        decay_start = max(decay_start, steps - (config.decay_steps or max(1, steps // 10)))
    if step >= last:
        return 0.0
    done = max(0.0, (step - decay_start) / (last - decay_start)) if last > decay_start else 0.0
    shape = config.decay_shape if config.schedule == "wsd" else config.schedule
    if shape == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - (math.sqrt(done) if shape == "sqrt" else done)


def parameter_groups(
    parameters: Iterable[tuple[str, torch.nn.Parameter]], optim: OptimConfig, scale_of: Callable[[str], Scale]
) -> list[ParameterGroup]:
    """Group matrices with weight decay, and vectors, which are the norms' weights, without; by their scales.

    Args:
        parameters: with their names.
        optim: says which optimizer trains them, and their decay.
        scale_of: returns a weight's scale by its name.
    Returns:
        The groups, matrices first, in the order of the parameters.
    """
    groups: dict[tuple[bool, bool, float, float], ParameterGroup] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            is_matrix = parameter.dim() >= 2
            muon = optim.name == "muon" and is_hidden(name, parameter.dim())
            scale = scale_of(name).muon_learning_rate if muon else scale_of(name).learning_rate
            decay = optim.weight_decay / scale if is_matrix else 0.0
            rate = scale * optim.factor_of(name)
            new = ParameterGroup(params=[], weight_decay=decay, learning_rate_scale=rate, muon=muon)
            groups.setdefault((not is_matrix, muon, rate, decay), new)["params"].append(parameter)
    return [groups[key] for key in sorted(groups, key=lambda key: key[0])]


def is_named(name: str, pattern: str) -> bool:
    """Return whether a weight's name matches a pattern, in which * and ? also stand for dots."""
    return fnmatch.fnmatchcase(name, pattern)


def is_hidden(name: str, dimensions: int) -> bool:
    """Return whether a weight of this name and number of dimensions is a matrix between activations of the model.

    Muon is for those. The rows of embedding and output belong to tokens, of which few occur in a batch.
    """
    return dimensions == 2 and name.startswith("blocks.")


def moments_of(group: Mapping[str, object]) -> tuple[str, ...]:
    """Return the names of the moments that PyTorch's optimizer keeps of the weights in a parameter group."""
    return ("exp_avg",) if group.get("muon") else ("exp_avg", "exp_avg_sq")
