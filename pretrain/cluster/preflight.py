"""Check a run before it is queued: whether it fits GPUs, disk and time limit, and whether its data exists.

config, job -> preflight -> findings -> commands.submit. Each check looks at one thing and reports all its findings.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from pretrain.checkpoint.duration import SaveTime, time_for_last_save
from pretrain.checkpoint.store import CheckpointConfig
from pretrain.model.size import Workload, memory_per_rank
from pretrain.run.lease import Holder
from pretrain.run.run_folder import RunFolder
from shards import DataConfig, ShardError
from shards.preparation import check_amount, describe_touched, index_status, indexing_command

# Decimal GB of one device by its usual name in gres.conf; the smaller size where a name is sold in two.
_GPU_GB = {
    "v100": 16, "p100": 16, "t4": 16, "a10": 24, "l4": 24, "rtx4090": 24, "rtx3090": 24, "a30": 24, "v100_32gb": 32,
    "a100": 40, "a100_40gb": 40, "a40": 48, "a6000": 48, "l40": 48, "l40s": 48, "mi250x": 64, "mi250": 64, "gh200": 96,
    "a100_80gb": 80, "a100-80": 80, "a100l": 80, "h100": 80, "a800": 80, "h800": 80, "h200": 141, "b200": 180,
    "mi300x": 192,
}  # fmt: skip
_FULL_SHARE = 0.9  # of a GPU's memory; the rest is for NCCL, the CUDA context and fragmentation
_STEP_SECONDS = 60  # time to finish the current step before saving
_LEAST_GRACE_SECONDS = 120

Level = Literal["ok", "note", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One result of a check.

    Attributes:
        level: `error` keeps a job from being submitted.
        about: the subject of the check, in one word.
    """

    level: Level
    about: str
    text: str


def data_findings(config: DataConfig) -> Iterator[Finding]:
    """Check that every source's shards exist, and count those without an index."""
    for source in config.sources:
        if source.dataset is not None:
            yield Finding("note", "data", f"{source.name}: the data set {source.dataset} is checked by the job")
            continue
        try:
            found = index_status(config, source)
            check_amount(config, source, found)
        except ShardError as error:
            yield Finding("error", "data", str(error))
            continue
        size = sum(stat.size for stat in found.stats.values())
        shards = f"{source.name}: {len(found.stats)} shards, {_size(size)}"
        if found.unindexed:
            yield Finding(
                "note", "data",
                f"{shards}; {len(found.unindexed)} without an index, about {_size(found.unindexed_bytes)} raw,"
                " which the first start reads while all ranks wait; to index them beforehand:"
                f" {indexing_command(config, source, found.unindexed)}",
            )  # fmt: skip
        elif found.touched:
            yield Finding("note", "data", f"{shards}, all with an index; {describe_touched(found)}")
        else:
            yield Finding("ok", "data", f"{shards}, all with an index")


def gpu_bytes_of(gpu_types: Iterable[str]) -> int | None:
    """Return the memory of the smallest of the given GPU types; None unless all are known."""
    sizes = [_GPU_GB.get(name) for name in gpu_types]
    known = [size for size in sizes if size is not None]
    return min(known) * 10**9 if known and len(known) == len(sizes) else None


def memory_findings(work: Workload, gpu_bytes: int | None) -> Iterator[Finding]:
    """Compare what a rank needs with the memory of one GPU; None if that is unknown."""
    need = memory_per_rank(work)
    text = (
        f"{_size(need.total)} a rank: weights {_size(need.weights)}, gradients {_size(need.gradients)},"
        f" optimizer {_size(need.optimizer)}, activations {_size(need.activations)}"
    )
    if gpu_bytes is None:
        yield Finding("note", "memory", f"{text}; the GPUs' memory is unknown; set it with --gpu-memory GB")
        return
    text += f"; a GPU has {_size(gpu_bytes)}"
    if need.total <= _FULL_SHARE * gpu_bytes:
        yield Finding("ok", "memory", text)
        return
    fitting = [
        changes for changes, smaller in _smaller(work) if memory_per_rank(smaller).total <= _FULL_SHARE * gpu_bytes
    ]
    advice = (
        f"; this would fit: {', or '.join(fitting[:3])}" if fitting else "; take a larger parallel.tp_size, more GPUs"
    )
    yield Finding("error" if need.total > gpu_bytes else "warning", "memory", text + advice)


def _smaller(work: Workload) -> list[tuple[str, Workload]]:
    """List settings that need less memory, each with the resulting workload; the fewest changes first."""
    parallel, rows = work.parallel, work.micro_batch_size
    stages = [stage for stage in (1, 2, 3) if stage >= parallel.applied_zero_stage]
    halves = [rows >> n for n in range(rows.bit_length()) if rows % (1 << n) == 0]
    ways = []
    for checkpointing, stage, fewer in itertools.product(
        sorted({parallel.activation_checkpointing, True}), stages, halves
    ):
        changes = [
            *([f"train.micro_batch_size={fewer}"] if fewer != rows else []),
            *([f"parallel.zero_stage={stage}"] if stage != parallel.applied_zero_stage else []),
            *(["parallel.activation_checkpointing=true"] if checkpointing != parallel.activation_checkpointing else []),
        ]
        layout = parallel.model_copy(update={"activation_checkpointing": checkpointing, "zero_stage": stage})
        if not any(layout.problems()):
            smaller = dataclasses.replace(work, parallel=layout, micro_batch_size=fewer)
            ways.append((len(changes), " ".join(changes), smaller))
    return [way[1:] for way in sorted(ways, key=lambda way: way[0])]


def disk_findings(
    checkpoint: CheckpointConfig, steps: int | None, bytes_each: int, folders: Sequence[Path]
) -> Iterator[Finding]:
    """Check that all checkpoints that the runs keep, and the one being written, fit on their disk.

    Args:
        steps: of the longest run; None if it ends with its data, whose size is not known yet.
        bytes_each: size of one checkpoint.
        folders: run folders, all on one disk; space that their checkpoints already take is not counted again.
    """
    first, each = folders[0], f"{_size(bytes_each)} each"
    at_once = checkpoint.keep + 1 if steps is None else min(checkpoint.keep + 1, math.ceil(steps / checkpoint.every))
    forever = (steps or 0) // checkpoint.keep_every if checkpoint.keep_every else 0
    kept = (path for folder in folders for path in folder.glob("checkpoints/*/**/*") if path.is_file())
    disk = next(path for path in (first.absolute(), *first.absolute().parents) if path.exists())
    free = shutil.disk_usage(disk).free + sum(path.stat().st_size for path in kept)
    need = len(folders) * at_once * bytes_each
    total = need + len(folders) * forever * bytes_each
    text = f"checkpoints of {each}, {at_once} of them at a time" + (f" and {forever} for good" if forever else "")
    text += f": {_size(total)}" + (f" for {len(folders)} runs" if len(folders) > 1 else "")
    text += f"; {first.parent} has {_size(free)} free (quotas are not visible here)"
    if need + checkpoint.reserve_bytes > free:
        yield Finding(
            "error", "disk", f"{text}; set run.dir to a larger disk, or lower checkpoint.keep={checkpoint.keep}"
        )
    elif total + checkpoint.reserve_bytes > free:
        yield Finding(
            "warning", "disk", f"{text}; raise checkpoint.keep_every={checkpoint.keep_every}, or free space in time"
        )
    else:
        yield Finding("ok", "disk", text)


def grace_for(save: SaveTime) -> int:
    """Return how many seconds before the time limit to stop: a step and the last save, in whole minutes."""
    return max(_LEAST_GRACE_SECONDS, 60 * math.ceil(_time_needed(save) / 60))


def grace_findings(save: SaveTime, grace: int, limit: int, preemption: str, preemption_grace: int) -> Iterator[Finding]:
    """Check that the time between Slurm's warning and the end is enough to save.

    Args:
        grace, limit: seconds from the warning to the time limit, and from the start to the limit.
        preemption, preemption_grace: what a partition does to a preempted job, and after how many seconds.
    """
    how = "took" if save.measured else "is guessed to take"
    text = f"asked to save {grace} s before the limit of {limit} s; a save {how} {save.seconds:.0f} s"
    if grace >= limit:
        yield Finding("error", "time", f"{text}; --time must be much longer than that")
    elif grace < _time_needed(save):
        level: Level = "error" if save.measured and grace < save.seconds else "warning"
        yield Finding(level, "time", f"{text}; set --grace={grace_for(save)}, or leave it out")
    elif grace > limit / 2:
        yield Finding("warning", "time", f"{text}; less than half of each start is spent on training; raise --time")
    else:
        yield Finding("ok", "time", text)
    if preemption != "OFF" and preemption_grace < _time_needed(save):
        yield Finding(
            "warning", "time",
            f"the partition preempts ({preemption}) within {preemption_grace} s, too soon to save: progress since"
            " the last checkpoint is lost; lower checkpoint.every to lose less",
        )  # fmt: skip


def _time_needed(save: SaveTime) -> float:
    """Return the seconds from Slurm's warning until the last save is complete."""
    return time_for_last_save(save.seconds) + _STEP_SECONDS


def lease_findings(folder: Path) -> Iterator[Finding]:
    """Warn if another process is using a run folder."""
    try:
        holder = msgspec.json.decode(RunFolder(folder).lease.read_bytes(), type=Holder)
    except (OSError, msgspec.MsgspecError):
        return
    after = f"; to start once that job has succeeded, add --after {holder.job_id}" if holder.job_id else ""
    yield Finding("warning", "folder", f"{folder} is in use by {holder}, or was when that process died{after}")


def _size(count: float) -> str:
    """Format bytes for a reader, in decimal units."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"
