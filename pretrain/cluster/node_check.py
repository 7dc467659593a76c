"""Find the nodes of a job that cannot take part in training, before it starts. srun -> node_check -> job script.

Every rank of the job tests its own part: whether the GPU is free and computes correctly, and whether the run folder is
visible. Then the ranks of each node reduce among themselves, and finally all ranks together. After each stage rank 0
gathers the findings through a key-value store, which needs no working fabric. A rank that does not report in time is
a finding too, so a GPU that hangs is reported like one that is missing.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import DistStoreError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from pretrain.topology import backend_of
from shards import ConfigError

_STAGE_SECONDS = 120.0
_COLLECTIVE_SECONDS = 60.0
_LEAVE_SECONDS = 10.0
_MATRIX = 1024  # its elements are integers so small that bf16 holds the sums of their products exactly
_FREE_SHARE = 0.9  # of a GPU's memory; if less is free, another process is using it
_REDUCED_BYTES = 1 << 24


@dataclass(frozen=True)
class Task:
    """A rank's place in a Slurm step; every node has the same number of ranks.

    Attributes:
        rank, world_size: in the step.
        local_rank, local_size: on the node.
        nodes: names of the step's nodes; ranks are assigned to them in blocks.
        gpus: GPUs of the node that belong to the job; 0 for a job without any.
        meeting: address and port of rank 0.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    nodes: tuple[str, ...]
    gpus: int
    meeting: tuple[str, int]

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], nodes: Sequence[str]) -> Task:
        """Read the variables that `srun` and the job script set. Raises ConfigError outside a Slurm step."""
        try:
            world_size = int(environment["SLURM_STEP_NUM_TASKS"])
            return cls(
                rank=int(environment["SLURM_PROCID"]),
                world_size=world_size,
                local_rank=int(environment["SLURM_LOCALID"]),
                local_size=world_size // len(nodes),
                nodes=tuple(nodes),
                gpus=int(environment.get("SLURM_GPUS_ON_NODE", "0")),
                meeting=(environment["MASTER_ADDR"], int(environment["MASTER_PORT"])),
            )
        except KeyError as error:
            raise ConfigError(f"{error.args[0]} is not set; use srun, as slurm/pretrain.sbatch does") from None

    @property
    def device(self) -> torch.device:
        if not self.gpus:
            return torch.device("cpu")
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())  # 1 if each task sees only its own

    def node_of(self, rank: int) -> str:
        return self.nodes[rank // self.local_size]


def check(task: Task, run_folder: Path, patience: float = _STAGE_SECONDS) -> dict[str, str]:
    """Test all nodes; every rank of the step calls it.

    Args:
        patience: seconds to wait for all ranks to report.
    Returns:
        The problem of each bad node, the same on every rank; empty if all is well. If every node is fine by itself
        but they fail together, all are named.
    Raises:
        RuntimeError: if rank 0 cannot be reached.
    """
    store = TCPStore(
        *task.meeting,
        world_size=task.world_size,
        is_master=task.rank == 0,
        timeout=timedelta(seconds=2 * patience),
        wait_for_workers=False,
    )
    node = task.rank // task.local_size
    stages: dict[str, Callable[[], str]] = {
        "alone": lambda: _problem_alone(task, run_folder),
        "node": lambda: _reduce(PrefixStore(f"node-{node}", store), task.local_rank, task.local_size, task.device),
        "all": lambda: _reduce(PrefixStore("all", store), task.rank, task.world_size, task.device),
    }
    problems: dict[str, str] = {}
    for stage, find in stages.items():
        problems = _gather(PrefixStore(stage, store), task, find, patience)
        if problems:
            break
    store.set(f"left-{task.rank}", "")
    if task.rank == 0:  # it hosts the store that the others are still reading
        everybody = [f"left-{rank}" for rank in range(task.world_size)]
        with contextlib.suppress(DistStoreError):
            store.wait(everybody, timedelta(seconds=min(patience, _LEAVE_SECONDS)))
    return problems


def _gather(store: Store, task: Task, find: Callable[[], str], patience: float) -> dict[str, str]:
    """Return every node's first problem, on every rank; `find` returns this rank's, or an empty text."""
    end = time.monotonic() + patience
    store.set(f"found-{task.rank}", find())
    if task.rank == 0:
        lines: dict[str, str] = {}
        for rank in range(task.world_size):
            found = _report_of(store, rank, max(0.1, end - time.monotonic()))
            if found:
                lines.setdefault(task.node_of(rank), found)
        store.set("verdict", "\n".join(f"{node} {found}" for node, found in lines.items()))
    verdict = store.get("verdict").decode()
    return dict(line.split(" ", 1) for line in verdict.splitlines())


def _report_of(store: Store, rank: int, seconds: float) -> str:
    try:
        store.wait([f"found-{rank}"], timedelta(seconds=seconds))
    except DistStoreError:
        return f"rank {rank} did not report in time"
    return store.get(f"found-{rank}").decode()


def _problem_alone(task: Task, run_folder: Path) -> str:
    """Describe what is wrong with this rank's part of its node; empty if nothing is."""
    if not run_folder.is_dir():
        return f"does not see the run folder {run_folder}, which must be on a disk that all nodes share"
    if not task.gpus:
        return ""
    if not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return f"torch sees none of the job's {task.gpus} GPUs (CUDA_VISIBLE_DEVICES={visible})"
    try:
        return gpu_problem(task.device)
    except RuntimeError as error:  # CUDA raises nothing more specific
        return f"{task.device}: {str(error).splitlines()[0]}"


def gpu_problem(device: torch.device) -> str:
    """Describe why a GPU should not be used for training; empty if it is free and computes correctly."""
    torch.cuda.set_device(device)
    free, total = torch.cuda.mem_get_info(device)
    if free < _FREE_SHARE * total:
        return f"{device}: another process uses {(total - free) / 1e9:.1f} of its {total / 1e9:.1f} GB"
    numbers = torch.randint(-1, 2, (2, _MATRIX, _MATRIX), generator=torch.Generator().manual_seed(0)).float()
    on_gpu = numbers.to(device, torch.bfloat16)
    if not torch.equal((on_gpu[0] @ on_gpu[1]).float().cpu(), numbers[0] @ numbers[1]):
        return f"{device}: computes a wrong matrix product"
    return ""


def _reduce(store: Store, rank: int, world_size: int, device: torch.device) -> str:
    """Sum a tensor over the calling ranks and describe what went wrong; empty if nothing did."""
    try:
        dist.init_process_group(
            backend_of(device),
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=_COLLECTIVE_SECONDS),
            device_id=device if device.type == "cuda" else None,
        )
        right, host = True, torch.device("cpu")
        for place in (device, host) if device != host else (host,):  # a training sums on the host too
            ones = torch.ones(_REDUCED_BYTES // 4, device=place)
            dist.all_reduce(ones)
            right &= bool((ones == world_size).all())
        dist.destroy_process_group()
    except RuntimeError as error:
        return f"{world_size} ranks cannot reduce together: {str(error).splitlines()[0]}"
    return "" if right else f"{world_size} ranks reduce to a wrong sum"
