"""Begin a run from a checkpoint of another: its history copied, its files shared. {run folder, store} -> fork.

    runs/b/
      config.yaml          the parent's, with what changes; from the fork's step on, as a stage
      lineage.json         the runs that it comes from, the oldest first
      metrics.jsonl, ...   the parent's records up to that step
      checkpoints/step_00090000/    hard links to the parent's files, which outlive the parent

The fork is a run like any other, which resumes from that checkpoint: its batches, records and provenance up to there
are the parent's, since its config begins as the parent's does.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.checkpoint.state import read_state
from pretrain.checkpoint.store import COMPLETE, Checkpoint, CheckpointStore
from pretrain.config import RunConfig, load_config
from pretrain.config_changes import check_skips, compare_for_resume
from pretrain.config_file import read_tree, set_value
from pretrain.run.run_folder import Ancestor, RunFolder
from pretrain.stages import begun_by
from shards import CheckpointError, ConfigError
from shards.records.document_list import DocumentList
from shards.storage.atomic import fsync_folder, is_there

_logger = logging.getLogger(__name__)

_STAGE = "stage."  # begins the overrides that apply from the fork's step on


def fork(parent: RunFolder, store: CheckpointStore, step: int, name: str, overrides: Sequence[str]) -> RunConfig:
    """Begin a run from a checkpoint of another one.

    Args:
        store: the parent's checkpoints.
        name: run.name of the new run; its folder lies in its own run.dir.
        overrides: `key.path=value` of the new config; those of `stage.` make a stage that begins with the fork.
    Returns:
        The new run's config, which is also in its folder.
    Raises:
        ConfigError: if the config is wrong, would change the past, or a run of that name exists.
        CheckpointError: if the parent has no such checkpoint, or it is damaged. Nothing is written in either case.
    """
    checkpoint = store.find(step)
    if broken := checkpoint.broken_files():
        raise CheckpointError("; ".join(broken))
    state = read_state(checkpoint)
    config = forked_config(parent, step, name, overrides)
    for listed in {stage.data.forget for stage in config.all_stages if stage.data.forget}:
        DocumentList(listed, "data.forget")  # its shards and lines are checked when the run starts
    target = config.folder
    if is_there(target.root):
        raise ConfigError(f"run.name={name}: {target.root} exists already; give the fork another name")
    target.root.parent.mkdir(parents=True, exist_ok=True)
    # Made beside its place and renamed last, so that a fork is there as a whole or not at all.
    made = RunFolder(Path(tempfile.mkdtemp(dir=target.root.parent, prefix=f".{name}-")))
    try:
        parent.copy_records(made, step)
        _link_scores(parent, made, step)
        _link(checkpoint, CheckpointStore(made.checkpoints, config.checkpoint).folder_of(step))
        before = load_config(parent.config, begun=True).run.name
        ancestor = Ancestor(before, str(parent.root.resolve()), _run_id_of(parent), step, state.batch_hash)
        made.note_ancestors([*parent.ancestors(), ancestor])
        made.new_run_id()
        made.config.write_text(config.to_yaml())
        for folder in (made.wandb, made.checkpoints, made.root):
            fsync_folder(folder)
        made.root.chmod(0o777 & ~_umask())
        made.root.rename(target.root)
    except BaseException:
        shutil.rmtree(made.root, ignore_errors=True)
        raise
    fsync_folder(target.root.parent)
    return config


def forked_config(parent: RunFolder, step: int, name: str, overrides: Sequence[str]) -> RunConfig:
    """Return the config of a fork: the parent's, with the overrides. Raises: as `fork`."""
    plain = [f"run.name={name}", *(override for override in overrides if not override.startswith(_STAGE))]
    staged = [override.removeprefix(_STAGE) for override in overrides if override.startswith(_STAGE)]
    if staged:
        tree, _ = read_tree(parent.config, plain)
        stages = list(tree.get("stages") or [])
        if any(other["step"] == step for other in stages):
            raise ConfigError(f"{_STAGE}{staged[0]}: the parent has a stage at step {step} already; change its keys")
        stage: dict[str, Any] = {"step": step}
        for override in staged:
            set_value(stage, override)
        stages = sorted([*stages, stage], key=lambda one: int(one["step"]))
        plain.append(f"stages={json.dumps(stages)}")
    config = load_config(parent.config, plain, begun=True)
    old = load_config(parent.config, begun=True)
    refused, allowed = compare_for_resume(old, config, step)
    # A start compares what these leave out, not how they are written; but nobody changes them without meaning it
    begun = len(begun_by(step, config.stages))
    sections = ("data", *(f"stages.{i}.data" for i in range(begun)))
    left_out = tuple(f"{section}.{key}" for section in sections for key in ("forget", "decontaminate"))
    refused += [change for change in allowed if change.key.startswith(left_out)]
    if refused:
        changes = "; ".join(f"{key}: {before!r} -> {now!r}" for key, before, now in refused)
        raise ConfigError(
            f"the fork would change what its parent was trained on ({changes}); what changes from step {step} on is "
            f"written with stage., such as stage.data.seq_len=4096"
        )
    check_skips(old, config, step)
    return config


def _run_id_of(folder: RunFolder) -> str:
    try:
        return folder.run_id()
    except FileNotFoundError:
        return ""


def _link_scores(parent: RunFolder, made: RunFolder, step: int) -> None:
    """Share the sums of each document of the evaluations up to a step."""
    for path in sorted(parent.root.glob("evals/*/step_*.npz")):
        if int(path.stem.removeprefix("step_")) <= step:
            target = made.root / path.relative_to(parent.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            _share(path, target)


def _link(checkpoint: Checkpoint, target: Path) -> None:
    """Share a checkpoint's files, COMPLETE last, durably."""
    for name in [*(file.name for file in checkpoint.files), COMPLETE]:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _share(checkpoint.folder / name, path)
    for folder in {path.parent for path in target.rglob("*")}:
        fsync_folder(folder)
    fsync_folder(target.parent)


def _share(path: Path, target: Path) -> None:
    """Link a file to a second name, or copy it where the two are not on one disk."""
    try:
        os.link(path, target)
    except OSError as error:
        _logger.warning("%s is copied, since it cannot be linked: %s", path, error.strerror)
        shutil.copy2(path, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
