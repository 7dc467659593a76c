"""What may change in a run's config when it resumes. Two configs -> config_changes -> {start, fork}.

What would corrupt the run may not: the model, the data, the batch size, the seed. A stage that has not begun is the
future, and may still be edited.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pydantic import JsonValue

from pretrain.config import RunConfig
from pretrain.stages import begun_by
from shards import ConfigError, DataConfig, SourceConfig

# Keys that may change when a run resumes: the first matching pattern decides, and no match means no.
_MAY_CHANGE = (
    ("run.seed", False),  # orders the data and seeds dropout
    ("run.*", True),  # the folder may have been moved
    ("model.*", False),  # the weights would not fit, or mean something else
    # The loader compares contents, so files may move; nothing else that decides the tokens of a batch may change
    *(
        (f"{stage}{section}.{key}{below}", True)
        for stage in ("", "stages.*.")
        for section, keys in (("data.sources.*", SourceConfig.MAY_CHANGE), ("data", DataConfig.MAY_CHANGE))
        for key in keys
        for below in ("", ".*")
    ),
    ("data.*", False),
    ("train.global_batch_size", False),  # decides which rows a step has
    ("train.epochs", False),  # decides which rows the run has
    ("train.*", True),
    ("optim.name", False),  # the moments of one optimizer are not those of another
    ("optim.moments", False),  # nor are they of another type
    ("optim.learning_rate_groups*", False),  # weights lie on the ranks by groups of equal rates
    ("optim.*", True),  # a schedule may be changed on purpose
    ("precision", False),  # the optimizer's state differs in shape
    ("parallel.*", True),  # a checkpoint is converted to another layout
    ("checkpoint.*", True),
    ("evaluation.*", True),
    ("metrics.*", True),
    ("wandb.*", True),
    ("deepspeed*", True),
    ("stages.*.optim*", True),
    ("stages.*.train.micro_batch_size", True),
)
_STAGE = re.compile(r"stages\.(\d+)\.")


class Change(NamedTuple):
    """A key whose value differs; a value is also None if a config lacks the key."""

    key: str
    old: JsonValue
    new: JsonValue


def compare_for_resume(old: RunConfig, new: RunConfig, step: int) -> tuple[list[Change], list[Change]]:
    """Compare the config that a run was started with to the one that it resumes with.

    Args:
        step: optimizer steps done.
    Returns:
        The changes that would corrupt the run, and those that are allowed.
    """
    before, after = dict(_leaves("", _effective(old))), dict(_leaves("", _effective(new)))
    keys = [*before, *(key for key in after if key not in before)]
    changes = [Change(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]
    # If unset, the number of lanes follows from the data, and the comparison of fingerprints covers it.
    changes = [change for change in changes if change.key != "data.lanes" or None not in (change.old, change.new)]
    begun = max(len(begun_by(step, config.stages)) for config in (old, new))
    # Of a model that is read at every start, the hash of the files is compared.
    moved = ["init_from"] if new.model.adapters else []
    free = [c for c in changes if may_change(c.key) or _is_future(c.key, begun) or c.key in moved]
    return [change for change in changes if change not in free], free


def _is_future(key: str, begun: int) -> bool:
    """Return whether a key belongs to a stage after the first `begun`."""
    stage = _STAGE.match(key)
    return stage is not None and int(stage[1]) >= begun


def may_change(key: str) -> bool:
    """Return whether a key's value may change when a run resumes, at any time."""
    return next((allowed for pattern, allowed in _MAY_CHANGE if fnmatch.fnmatchcase(key, pattern)), False)


def check_skips(old: RunConfig, new: RunConfig, step: int) -> None:
    """Check that what is passed over lies in the future.

    Args:
        step: optimizer steps done.
    Raises: ConfigError if data.skip_steps would change the past.
    """
    was, now = (_skipped_up_to(step, config.data.skip_steps) for config in (old, new))
    if was != now:
        first = min(was ^ now)
        raise ConfigError(
            f"data.skip_steps: step {first} was {'passed over' if first in was else 'trained'} already, since the run"
            f" has done {step}; go back to a checkpoint before it with --from-step, or fork the run there"
        )


def _skipped_up_to(step: int, skipped: Sequence[tuple[int, int]]) -> set[int]:
    return {number for first, last in skipped for number in range(first, min(last, step) + 1)}


def _effective(config: RunConfig) -> dict[str, JsonValue]:
    """Return the config's values with derived defaults filled in, so that spelling one out is not a change."""
    values: dict[str, Any] = config.model_dump(mode="json")
    values["data"] |= {"window_bytes": config.data.window_limit, "plan_version": config.data.plan}
    if config.data.plan == 1:
        values["data"]["lanes"] = config.data.num_lanes(config.train.global_batch_size, 0)
    values["model"] = config.model.spelled_out()
    return values


def _leaves(key: str, value: JsonValue) -> Iterator[tuple[str, JsonValue]]:
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not isinstance(value, dict | list):
        yield key, value
    for name, item in below:
        yield from _leaves(f"{key}.{name}" if key else str(name), item)
