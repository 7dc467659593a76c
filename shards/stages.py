"""The stages of a run: from a step on, other sources, rows, lanes or batch size. config -> stages -> loader.

Every stage has a whole data config. Its sources are those of the stage before, in the same order, and then those that
it adds, so that a source has one number in all stages; one that is taken out has the weight 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field

from shards.config import DataConfig, Decontamination, Packing, SourceConfig
from shards.config_base import Config, Name
from shards.errors import ConfigError


class StageData(Config):
    """What a stage changes of the data. What it does not name stays as it was; what it adds begins at its beginning."""

    sources: tuple[SourceConfig, ...] = ()  # added to those of the stage before
    weights: dict[Name, float] = Field(default_factory=dict)  # earlier source -> new weight; 0 takes it out
    seq_len: int | None = Field(default=None, ge=1)  # predicted tokens per row
    packing: Packing | None = None
    attention: Literal["document", "row"] | None = None  # the tokens of its row that a token attends to
    lanes: int | None = Field(default=None, ge=1)  # streams of rows; None = as many as before, whatever the batch size
    decontaminate: Decontamination | None = None
    forget: Path | None = None  # a list of documents to train on no more, as in data.forget


class Stage(NamedTuple):
    """A part of a run that has one data config."""

    step: int  # optimizer steps that are done when it begins
    data: DataConfig
    global_batch_size: int  # rows of one step, over all ranks


def stage_after(
    before: Stage, step: int, changes: StageData, global_batch_size: int | None = None, at: str = "stage"
) -> Stage:
    """Return the stage that follows another.

    Args:
        step: optimizer steps that are done when it begins.
        global_batch_size: None = as before.
        at: the key that holds the stage, for messages.
    Raises: ConfigError if the changes do not fit the stage before.
    """
    if step <= before.step:
        raise ConfigError(f"{at}.step={step}: the stage before begins at step {before.step}; stages must not overlap")
    names = [source.name for source in before.data.sources]
    if unknown := sorted(set(changes.weights) - set(names)):
        raise ConfigError(f"{at}.data.weights: no source {unknown[0]!r} before this stage; there are {names}")
    if again := [source.name for source in changes.sources if source.name in names]:
        raise ConfigError(
            f"{at}.data.sources: {again[0]!r} is a source already; change its weight under weights, or give what is "
            "added another name"
        )
    weights = weights_at(before.data, step) | changes.weights
    kept = tuple(source.model_copy(update={"weight": weights[source.name]}) for source in before.data.sources)
    changed = {
        key: value
        for key in ("seq_len", "packing", "attention", "lanes", "decontaminate", "forget")
        if (value := getattr(changes, key)) is not None
    }
    data = before.data.model_copy(
        update={
            "sources": kept + changes.sources,
            "weight_changes": tuple(change for change in before.data.weight_changes if change.step > step),
            "window_bytes": before.data.window_limit,  # decides the indexes' cells, so it stays for the run's life
            **changed,
        }
    )
    checked = DataConfig.parse(data.model_dump(), at=f"{at}.data")
    return Stage(step, checked, global_batch_size or before.global_batch_size)


def weights_at(data: DataConfig, step: int) -> dict[str, float]:
    """Return the weights of a config's sources at a step, by name."""
    weights = next(weights for first, weights in reversed(data.weightings()) if first <= step)
    return dict(zip((source.name for source in data.sources), weights, strict=True))
