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
from pretrain.cluster.speed import Cluster, step_time, tokens_per_second, why_unknown
from pretrain.devices import Device, device_of_slurm
from pretrain.model.size import Workload, flops_per_token, memory_per_rank
from pretrain.run.lease import Holder
from pretrain.run.metrics import mfu
from pretrain.run.run_folder import RunFolder
from shards import DataConfig, ShardError
from shards.preparation import check_amount, describe_touched, index_status, indexing_command

_FULL_SHARE = 0.9  # of a GPU's memory; the rest is for NCCL, the CUDA context and fragmentation
_CHECKPOINTING = ("none", "selective", "full")  # the cheapest first
_ASSUMED_NETWORK = 12.5e9  # bytes/s: 100 Gbit/s a node, where nothing is known of it
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


@dataclass(frozen=True)
class Hardware:
    """What is known of the GPUs of a job.

    Attributes:
        device: their type; the slowest, if a partition has several. None: unknown.
        gpu_bytes: memory of one GPU; the smallest. None: unknown.
        network_bandwidth: bytes/s of one node to others, in one direction. None: that of the maker's own servers.
    """

    device: Device | None = None
    gpu_bytes: float | None = None
    network_bandwidth: float | None = None


def hardware_of(gpu_types: Iterable[str]) -> Hardware:
    """Describe GPUs by their types in gres.conf. Nothing is known of them unless every type is."""
    devices = [device_of_slurm(name) for name in gpu_types]
    known = [device for device in devices if device is not None]
    if not known or len(known) < len(devices):
        return Hardware()
    slowest = min(known, key=lambda device: device.flops or 0)
    return Hardware(slowest, min(device.memory for device in known))


def memory_findings(work: Workload, micro_steps: int, gpu_bytes: float | None) -> Iterator[Finding]:
    """Compare what a rank needs with the memory of one GPU, and propose settings that use it better.

    Args:
        micro_steps: forward passes of one optimizer step, which a larger micro-batch would lower.
        gpu_bytes: None if it is unknown.
    """
    need = memory_per_rank(work)
    if need is None:
        yield Finding("note", "memory", f"there is no estimate for model.architecture={work.model.architecture}")
        return
    text = (
        f"{_size(need.total)} a rank: weights {_size(need.weights)}, gradients {_size(need.gradients)},"
        f" optimizer {_size(need.optimizer)}, buffers {_size(need.buffers)}, activations {_size(need.activations)}"
    )
    if need.host:
        text += f"; and {_size(need.host)} of its node's memory for parallel.offload={','.join(work.parallel.offload)}"
    if gpu_bytes is None:
        yield Finding("note", "memory", f"{text}; the GPUs' memory is unknown; set --gpu TYPE or --gpu-memory GB")
        return
    text += f"; a GPU has {_size(gpu_bytes)}"
    limit = _FULL_SHARE * gpu_bytes
    ways = _fitting(work, work.micro_batch_size * micro_steps, limit)
    if need.total > limit:
        listed = ", or ".join(itertools.islice(ways, 3))
        advice = (
            f"this would fit: {listed}"
            if listed
            else "take a larger parallel.tp_size or, for long rows, parallel.sp_size, more GPUs"
        )
        yield Finding("error" if need.total > gpu_bytes else "warning", "memory", f"{text}; {advice}")
        return
    best = next(ways) if need.total < gpu_bytes / 2 else ""
    yield Finding("ok", "memory", f"{text}; more than half is free, and {best} would fit too" if best else text)


def _fitting(work: Workload, rows: int, limit: float) -> Iterator[str]:
    """Yield settings with which a rank needs at most `limit` bytes, as overrides; "" if none has to change.

    For each ZeRO stage, from the work's own on, and each way of checkpointing, the cheapest first: the largest
    micro-batch that fits.

    Args:
        rows: of one optimizer step on one rank, which the micro-batch has to divide.
    """
    own = work.parallel
    sizes = [size for size in range(rows, 0, -1) if rows % size == 0]
    for stage, checkpointing in itertools.product((1, 2, 3), _CHECKPOINTING):
        layout = own.model_copy(update={"activation_checkpointing": checkpointing, "zero_stage": stage})
        if stage < own.applied_zero_stage or any(layout.problems()):
            continue
        for size in sizes:
            changed = dataclasses.replace(work, parallel=layout, micro_batch_size=size)
            need = memory_per_rank(changed)
            if need and need.total <= limit:
                yield _overrides(work, changed)
                break


def _overrides(work: Workload, changed: Workload) -> str:
    """Write the settings in which a workload differs from another, as overrides for a command line."""
    values = [
        ("train.micro_batch_size", work.micro_batch_size, changed.micro_batch_size),
        ("parallel.zero_stage", work.parallel.applied_zero_stage, changed.parallel.applied_zero_stage),
        (
            "parallel.activation_checkpointing",
            work.parallel.activation_checkpointing,
            changed.parallel.activation_checkpointing,
        ),
    ]
    return " ".join(f"{key}={new}" for key, old, new in values if new != old)


def speed_findings(
    work: Workload, micro_steps: int, steps: int | None, nodes: int, gpus_per_node: int, hardware: Hardware
) -> Iterator[Finding]:
    """Estimate how fast a run will be, and what bounds it.

    Args:
        micro_steps: forward passes of one optimizer step.
        steps: length of the run; None if it ends with its data, whose size is not known yet.
    """
    device = hardware.device
    if device is None:
        yield Finding("note", "speed", "the GPUs' type is unknown; set --gpu TYPE for an estimate")
        return
    if reason := why_unknown(work, device):
        yield Finding("note", "speed", f"there is no estimate for {reason}")
        return
    network, source = _network(hardware, device, gpus_per_node)
    found = step_time(work, micro_steps, Cluster(device, nodes, gpus_per_node, network))
    rate = tokens_per_second(work, micro_steps, found.total)
    share = mfu(flops_per_token(work.model, work.seq_len), rate, (device.flops or 0) * nodes * gpus_per_node)
    parts = ", ".join(f"{name} {seconds / found.total:.0%}" for name, seconds in found.parts.items() if seconds)
    length = f", {_days(steps * found.total)} for {steps:,} steps" if steps else ""
    joined = f", with {network * 8e-9:,.0f} Gbit/s a node ({source})" if nodes > 1 else ""
    yield Finding(
        "ok", "speed",
        f"estimated, not measured: {found.total:.3g} s a step on {device.name}{joined}: {rate / 1e3:,.0f}k tokens/s,"
        f" {share:.0%} MFU{length}; bound by {found.bound} ({parts})",
    )  # fmt: skip


def _network(hardware: Hardware, device: Device, gpus_per_node: int) -> tuple[float, str]:
    """Return the bytes/s of a node's network in one direction, and where the figure is from."""
    if hardware.network_bandwidth:
        return hardware.network_bandwidth, "as --network says"
    if device.network_bandwidth:
        return device.network_bandwidth * gpus_per_node, "as in the maker's servers; set --network GBIT"
    return _ASSUMED_NETWORK, "assumed; set --network GBIT"


def _days(seconds: float) -> str:
    """Format a duration for a reader."""
    return f"{seconds / 86400:.1f} days" if seconds >= 86400 else f"{seconds / 3600:.1f} hours"


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
