"""Everything that a run's batches depend on, saved with its state and compared when it resumes.

loader -> fingerprint -> checkpoint.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from shards.config import SourceConfig, with_recorded_plan
from shards.errors import ConfigError, ShardError
from shards.index.manifest import Shard
from shards.index.record_table import TABLE_VERSION
from shards.index.shard_index import hash_tables
from shards.records.forms import FORM_VERSION, identity_of
from shards.records.selection import SELECTION_VERSION
from shards.stages import Stage
from shards.tokenize.tokenizer import describe
from shards.windows.packing import PACKER_VERSION
from shards.windows.recipe import Tools


def fingerprint(
    stages: Sequence[Stage], lanes: Sequence[int], shards: Sequence[Sequence[Shard]], tools: Tools, seed: int
) -> dict[str, object]:
    """Return plain values that are equal for two loaders only if they yield the same global batches.

    Args:
        lanes: V of each stage.
        shards: those of each source of the last stage.
    """
    described = []
    known = 0  # sources of the stages before
    for stage, num_lanes, filtered, forgotten in zip(stages, lanes, tools.filters, tools.forgotten, strict=True):
        config, sources = stage.data, stage.data.sources
        plain = config.model_dump(mode="json", exclude={*config.MAY_CHANGE, "sources", "attention"})
        plain |= {"lanes": num_lanes, "seed": seed, "window_bytes": config.window_limit, "plan_version": config.plan}
        plain["sources"] = [_plain(source) for source in sources]
        if config.attention == "row":  # runs begun before there was a choice have no such key
            plain["attention"] = config.attention
        added = list(zip(sources, shards, strict=False))[known:]
        described.append(
            {
                "config": plain,
                "decontaminate": filtered.fingerprint if filtered else None,
                "shards": {
                    source.name: [[shard.path, shard.index.content_hash] for shard in found] for source, found in added
                },
                # Record tables decide how shards are cut into windows; runs begun before these hashes existed have none
                "record_tables": {source.name: hash_tables(shard.index for shard in found) for source, found in added},
                **({"forget": forgotten.content_hash} if forgotten else {}),
            }
        )
        known = len(sources)
    first, *later = described
    found = {
        **first,
        "tokenizer": tools.tokenizer.content_hash,
        # Runs with SentencePiece have always been known by the model's file alone
        **({"tokenizer_libraries": tools.tokenizer.libraries} if tools.tokenizer.libraries else {}),
        "packer_version": PACKER_VERSION,
        "table_version": TABLE_VERSION,  # not the index's version: better entries give the same batches
    }
    begins = [{"step": stage.step, "global_batch_size": stage.global_batch_size} for stage in stages[1:]]
    return found | ({"stages": [begin | one for begin, one in zip(begins, later, strict=True)]} if later else {})


def _plain(source: SourceConfig) -> dict[str, object]:
    """Return what of a source's config decides batches; just as before there were forms and selections, without any."""
    newer = {"loss_on", *source.FORM_KEYS, *source.SELECTION_KEYS}
    plain = source.model_dump(mode="json", exclude={*source.MAY_CHANGE, *newer}) | source.selection
    if source.hash_range is not None:
        plain["selection_version"] = SELECTION_VERSION
    if not source.form:
        return plain
    return plain | identity_of(source) | {"loss_on": source.loss_on or "response", "form_version": FORM_VERSION}


def check_fingerprint(old: Mapping[str, object], new: Mapping[str, object], step: int | None = None) -> None:
    """Compare the data that a run began with to the data it would resume with; paths may differ, contents may not.

    Args:
        step: the last optimizer step that matters, counted from 1: stages that begin after it may differ. None = no
            stage may.
    Raises: ConfigError or ShardError naming what differs.
    """
    for key in ("packer_version", "table_version"):
        if old.get(key) != new.get(key):
            raise ConfigError(
                f"the run was begun with {key}={old.get(key)}, this program has {new.get(key)}; use the old program"
            )
    versions = plan_version_of(old), plan_version_of(new)
    if versions[0] != versions[1]:
        raise ConfigError(
            f"the run was begun with data.plan_version={versions[0]}, now it is {versions[1]}; set "
            f"data.plan_version={versions[0]} to go on, or start a new run"
        )
    old_rule, new_rule = old.get("decontaminate"), new.get("decontaminate")
    if isinstance(old_rule, Mapping) and isinstance(new_rule, Mapping) and old_rule["version"] != new_rule["version"]:
        was, now = old_rule["version"], new_rule["version"]
        raise ConfigError(
            f"data.decontaminate: the run was begun with version {was} of the rule by which documents are dropped, "
            f"this program has version {now} and would drop others; go on with one whose "
            f"decontaminate.py says VERSION = {was}, or start a new run"
        )
    if old.get("tokenizer") != new.get("tokenizer"):
        raise ConfigError("data.tokenizer: not the model that the run was begun with; put the old one back")
    _check_libraries(old.get("tokenizer_libraries", {}), new.get("tokenizer_libraries", {}))
    _check_config("data", _settings(old), _settings(new))
    _check_config("data.decontaminate", old_rule, new_rule)
    _check_stage(old, new, "data")
    begun = [
        [stage for stage in found.get("stages", ()) if step is None or stage["step"] < step]  # type: ignore[attr-defined]
        for found in (old, new)
    ]
    for i, (before, after) in enumerate(itertools.zip_longest(*begun)):
        if before is None or after is None or before["step"] != after["step"]:
            was, now = (f"stages.{i} at step {one['step']}" if one else f"no stages.{i}" for one in (before, after))
            past = "" if step is None else f", which lies in the past of step {step}"
            raise ConfigError(
                f"stages: the run was trained with {was}, now there is {now}{past}; stages that have begun must stay "
                "as they were: set it back, or fork the run before that step"
            )
        for key, at in (
            ("global_batch_size", "train.global_batch_size"),
            ("config", "data"),
            ("decontaminate", "data.decontaminate"),
        ):
            _check_config(f"stages.{i}.{at}", before.get(key), after.get(key))
        _check_stage(before, after, f"stages.{i}.data")


def _check_libraries(before: object, after: object) -> None:
    """Compare the versions that compute the tokenizer's ids. Raises: ConfigError naming what to install."""
    assert isinstance(before, Mapping)
    assert isinstance(after, Mapping)
    if before == after:
        return
    needed = " ".join(f"{name}=={version}" for name, version in sorted(before.items()))
    extra = " ".join(sorted(set(after) - set(before)))
    raise ConfigError(
        f"data.tokenizer: the run was begun with ids by {describe(before)}, now they are by {describe(after)}, and a"
        f" run keeps what computes its ids: pip install {needed}{extra and f'; pip uninstall {extra}'}"
    )


def _check_stage(old: Mapping[str, object], new: Mapping[str, object], key: str) -> None:
    """Compare what a stage adds and leaves out. Raises: ConfigError or ShardError naming what differs."""
    if old.get("forget") != new.get("forget"):
        raise ConfigError(
            f"{key}.forget: not the list of documents that this stage of the run was trained without; put it back, and "
            "name another in a stage that begins later, or in a fork"
        )
    old_shards, new_shards = old.get("shards"), new.get("shards")
    assert isinstance(old_shards, Mapping)
    assert isinstance(new_shards, Mapping)
    for source, before in old_shards.items():
        _check_shards(source, before, new_shards[source])
    old_tables, new_tables = old.get("record_tables", {}), new.get("record_tables", {})
    assert isinstance(old_tables, Mapping)
    assert isinstance(new_tables, Mapping)
    for source, table in old_tables.items():
        if new_tables.get(source, table) != table:
            raise ShardError(
                f"source {source!r}: its shards are those that the run was begun with, but their indexes cut them into "
                "other records; another program made them: delete them, and make them with the one that began the run"
            )


def without_paths(fingerprint: Mapping[str, object]) -> dict[str, object]:
    """Return a fingerprint in which the places of files, which may change, are left out."""
    plain = dict(fingerprint)
    if isinstance(shards := plain.get("shards"), Mapping):
        plain["shards"] = {source: [content for _, content in found] for source, found in shards.items()}
    if isinstance(stages := plain.get("stages"), list):
        plain["stages"] = [without_paths(stage) for stage in stages]
    return plain


def _check_shards(source: str, before: list[list[str]], after: list[list[str]]) -> None:
    """Compare (path, content hash) of a source's shards, in order. Raises: ShardError naming what differs."""
    order = [content for _, content in before]
    path_of = {content: path for path, content in after}
    if order != [content for _, content in after] and sorted(order) == sorted(content for _, content in after):
        raise ShardError(
            f"source {source!r}: the same shards in another order, which decides the batches; shards are read in the "
            "order of paths, and by name within a pattern: give them their old names, or name them in paths "
            f"one by one in the order that the run was begun with: {', '.join(path_of[content] for content in order)}"
        )
    for (old_path, old_hash), (new_path, new_hash) in zip(before, after, strict=False):
        if old_hash != new_hash:
            was = "" if old_path == new_path else f" (it was {old_path} then)"
            raise ShardError(
                f"{new_path}{was}: its content changed since the run was begun; put it back, or start a new run"
            )
    if len(before) != len(after):
        odd = max(before, after, key=len)[min(len(before), len(after))][0]
        raise ShardError(
            f"source {source!r}: the run was begun with {len(before)} shards, now there are {len(after)}, "
            f"e.g. {odd}; make its paths match the same files, or start a new run"
        )


def plan_version_of(fingerprint: Mapping[str, object]) -> int:
    """Return a run's plan version, which is 1 if it began before plan versions existed."""
    version = _settings(fingerprint)["plan_version"]
    assert isinstance(version, int)
    return version


def _settings(fingerprint: Mapping[str, object]) -> dict[str, object]:
    config = fingerprint.get("config")
    assert isinstance(config, Mapping)
    return with_recorded_plan(config)


def _check_config(key: str, old: object, new: object) -> None:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for part in [*old, *(part for part in new if part not in old)]:
            _check_config(f"{key}.{part}", old.get(part), new.get(part))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (before, after) in enumerate(zip(old, new, strict=True)):
            _check_config(f"{key}[{i}]", before, after)
    elif old != new:
        raise ConfigError(f"{key}: the run was begun with {old!r}, now it is {new!r}; set it back, or start a new run")
