"""Ranks, groups, the device, and the few collectives that training needs. The only user of fairscale's `initialize`.

World ranks are laid out with tensor-parallel ranks adjacent, then those that share the tokens of the same rows:
rank = (dp_rank * sp_size + sp_rank) * tp_size + tp_rank.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fairscale_groups
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import init_device_mesh

from pretrain.parallel_config import ParallelConfig
from shards import ConfigError, HeadraceError, installation

T = TypeVar("T")


@dataclass(frozen=True)
class Topology:
    """The place of this process among all ranks.

    Attributes:
        rank, world_size: among all processes of the run.
        tp_rank, tp_size: within the group that shares one copy of the model.
        dp_rank, dp_size: place among the groups that divide the rows of each global batch.
        device: the device that this process computes on.
        sp_rank, sp_size: within the group that divides the tokens of the same rows.
    """

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    dp_rank: int
    dp_size: int
    device: torch.device
    sp_rank: int = 0
    sp_size: int = 1

    @property
    def is_main(self) -> bool:
        """Return whether this process writes logs, metrics and the run folder."""
        return self.rank == 0

    @property
    def tp_group(self) -> dist.ProcessGroup:
        return fairscale_groups.get_model_parallel_group()

    @property
    def zero_rank(self) -> int:
        """Return the place among the ranks that divide the optimizer's state and average gradients."""
        return self.dp_rank * self.sp_size + self.sp_rank

    @property
    def zero_size(self) -> int:
        """Return how many ranks divide it: all that have the same weights, whichever tokens they train on."""
        return self.dp_size * self.sp_size

    @property
    def zero_group(self) -> dist.ProcessGroup:
        return fairscale_groups.get_data_parallel_group()

    @property
    def reads_rows(self) -> bool:
        """Return whether this rank reads the rows of its dp rank, and passes them on to all that share them."""
        return self.tp_rank == 0 and self.sp_rank == 0

    def sum_int64(self, values: list[int]) -> list[int]:
        """Sum each value over all ranks, mod 2^64, so that hashes can be summed too.

        Values may be unsigned or signed 64-bit; the sums come back unsigned.
        """
        tensor = torch.tensor([signed(v) for v in values], dtype=torch.int64)  # on the host: waits for no device
        dist.all_reduce(tensor)
        return [v % 2**64 for v in tensor.tolist()]

    def sum_over_zero(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over the ranks with the same weights, in place; every tp rank must hold the same values."""
        dist.all_reduce(values, group=self.zero_group)
        return values

    def sum_over_all(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place."""
        dist.all_reduce(values)
        return values

    def max_over_all(self, values: torch.Tensor) -> torch.Tensor:
        """Take the largest of each value over all ranks, in place."""
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def max_over_zero(self, values: torch.Tensor) -> torch.Tensor:
        """Take the largest of each value over the ranks with the same weights, in place."""
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.zero_group)
        return values

    def any(self, value: bool) -> bool:
        """Return whether a value is true on any rank."""
        return self.sum_int64([int(value)])[0] > 0

    def all_to_all(self, parts: Sequence[torch.Tensor], sizes: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """Send a part to every rank and receive one from each. Every rank must call it.

        Args:
            parts: flat tensors of one type and device, by the rank that each is for.
            sizes: elements of the parts that this rank receives, by the rank that sends them.
        Returns:
            The parts received, by the rank that sent them.
        """
        received = parts[0].new_empty(sum(sizes))
        dist.all_to_all_single(received, torch.cat(list(parts)), list(sizes), [part.numel() for part in parts])
        return torch.split(received, list(sizes))

    def share_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy the tensor of the rank that reads the rows to all ranks that share them, in place."""
        if self.sp_size > 1 and self.tp_rank == 0:
            dist.broadcast(tensor, src=self.rank - self.sp_rank * self.tp_size, group=sequence_group())
        return self.broadcast_in_tp(tensor)

    def broadcast_in_tp(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy tp rank 0's tensor to every tp rank, in place."""
        if self.tp_size > 1:
            dist.broadcast(tensor, src=self.rank - self.tp_rank, group=self.tp_group)
        return tensor

    def gather_objects(self, value: T) -> list[T]:
        """Return every rank's value, on every rank, by rank. For small values only, since they are pickled."""
        values: list[T] = [value] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def together(self, action: Callable[[], T]) -> T:
        """Run an action and return its result once it has succeeded on every rank. Every rank must call it.

        Raises:
            HeadraceError: on all ranks, the error of the first rank where it failed, so that none is left waiting.
        """
        given: list[T] = []
        failure: HeadraceError | None = None
        try:
            given.append(action())
        except HeadraceError as error:
            failure = error
        except OSError as error:  # for example, a running training removed a file
            failure = HeadraceError(str(error))
        if failures := [found for found in self.gather_objects(failure) if found]:
            raise failures[0]
        return given[0]

    def barrier(self) -> None:
        dist.barrier()


def copy_to(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor from the host to a device, without waiting for what the device still has to do."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def signed(value: int) -> int:
    """Return a sum mod 2^64 as the signed 64-bit number that it stands for."""
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value


def free_port() -> int:
    """Find a TCP port that is currently free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def slurm_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what `deepspeed` or `torchrun` would set for one of several Slurm tasks; empty elsewhere.

    A command that runs on several ranks adds it to its environment first. The job script sets the meeting point.
    """
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return {}
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
    }


def launcher_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of `torch.distributed`'s env:// rendezvous: the launcher's, or those for one process.

    Raises:
        ConfigError: if a launcher set only some of them.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in environment]
    if not missing:
        return {name: environment[name] for name in names}
    if "RANK" in environment or "WORLD_SIZE" in environment:
        raise ConfigError(
            f"the launcher set RANK or WORLD_SIZE but not {', '.join(missing)}; start with `deepspeed` or `torchrun`,"
            f" under Slurm with `{installation.typed('submit')}`"
        )
    single = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    return {**single, "MASTER_PORT": str(free_port())}


def is_lost_peer(error: RuntimeError) -> bool:
    """Return whether a collective failed because another rank has exited; gloo has no error class for it."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "by peer" in str(error)


def world_size_of(environment: Mapping[str, str]) -> int:
    """Return how many processes the launcher started, which is known before they have met."""
    return int(environment.get("WORLD_SIZE", "1"))


def dp_size_of(world_size: int, parallel: ParallelConfig) -> int:
    """Return the number of data-parallel ranks in a world of this size.

    Raises:
        ConfigError: if the number of ranks that share the same rows does not divide that of all.
    """
    sharing = parallel.tp_size * parallel.sp_size
    if world_size % sharing:
        named = f"parallel.tp_size={parallel.tp_size}"
        if parallel.sp_size > 1:
            named += f" times parallel.sp_size={parallel.sp_size}"
        raise ConfigError(
            f"{named} does not divide the {world_size} ranks that were started; start a multiple of {sharing}"
        )
    return world_size // sharing


def named_layout(tp_size: int, sp_size: int, dp_size: int) -> str:
    """Name a layout in a few words; a run without sequence parallelism need not know of it."""
    return f"tp {tp_size} x dp {dp_size}" if sp_size == 1 else f"tp {tp_size} x sp {sp_size} x dp {dp_size}"


@dataclass(frozen=True)
class Layout:
    """The division of a training over ranks, and of its checkpoints, which only the same layout loads unconverted."""

    tp_size: int
    dp_size: int
    zero_stage: int
    sp_size: int = 1

    def __str__(self) -> str:
        return f"{named_layout(self.tp_size, self.sp_size, self.dp_size)}, ZeRO-{self.zero_stage}"

    def has_files_of(self, other: Layout) -> bool:
        """Return whether the files of both are divided alike: ZeRO does not ask which ranks share the same rows."""
        return self._files == other._files

    @property
    def world_size(self) -> int:
        """Return the number of all ranks."""
        return self.tp_size * self.sp_size * self.dp_size

    @property
    def _files(self) -> tuple[int, int, int]:
        return self.tp_size, self.dp_size * self.sp_size, self.zero_stage


_sequence_group: dist.ProcessGroup | None = None  # kept as fairscale keeps the others, for the layers to find


def sequence_group() -> dist.ProcessGroup | None:
    """Return the group of the ranks that divide the tokens of the same rows; None if each has whole rows."""
    return _sequence_group


@contextlib.contextmanager
def started(parallel: ParallelConfig, store: distributed_c10d.Store | None = None) -> Iterator[Topology]:
    """Join the process group, form the groups within it, and leave them at the end.

    Args:
        store: where the ranks have met; None: they meet now.
    """
    environment = launcher_environment(os.environ)
    own = environment.keys() - os.environ.keys()
    os.environ.update(environment)  # DeepSpeed and its dependencies read them too
    world_size = int(environment["WORLD_SIZE"])
    dp_size = dp_size_of(world_size, parallel)
    device = _device(int(environment["LOCAL_RANK"]))
    os.environ["LOCAL_RANK"] = str(device.index or 0)  # DeepSpeed takes its device number from it
    timeout = timedelta(minutes=parallel.timeout_minutes)
    if parallel.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it to be deterministic
        torch.use_deterministic_algorithms(True)
    dist.init_process_group(
        backend=backend_of(device),
        timeout=timeout,
        store=store,
        rank=int(environment["RANK"]) if store else -1,
        world_size=world_size if store else -1,
        device_id=device if device.type == "cuda" else None,
    )
    _form_groups(device, dp_size, parallel, timeout)
    rank, zero_rank = dist.get_rank(), dist.get_rank() // parallel.tp_size
    yield Topology(
        rank=rank,
        world_size=world_size,
        tp_rank=rank % parallel.tp_size,
        tp_size=parallel.tp_size,
        dp_rank=zero_rank // parallel.sp_size,
        dp_size=dp_size,
        device=device,
        sp_rank=zero_rank % parallel.sp_size,
        sp_size=parallel.sp_size,
    )
    # Not done after an error: under NCCL, leaving a group waits for ranks that may be gone.
    fairscale_groups.destroy_model_parallel()
    _set_sequence_group(None)
    dist.destroy_process_group()
    for name in own:  # or what this process starts next would take itself for a rank
        os.environ.pop(name, None)


def backend_of(device: torch.device) -> str:
    """Return the backend of a process group, which on GPUs depends on where a tensor lies."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _set_sequence_group(group: dist.ProcessGroup | None) -> None:
    global _sequence_group
    _sequence_group = group


def _form_groups(device: torch.device, dp_size: int, parallel: ParallelConfig, timeout: timedelta) -> None:
    """Form this rank's groups: of tensor-parallel ranks, of ZeRO's, and of those that divide the tokens of rows.

    The first two are registered with fairscale's layers, which know the second as data-parallel.

    fairscale's own function also forms a group of one rank for every pipeline slot, and all ranks wait for each: 98
    groups at 64 ranks, most of them unused. Under NCCL, a mesh splits the world only once per dimension.
    """
    tp_size, sp_size = parallel.tp_size, parallel.sp_size
    if sp_size == 1:
        mesh = init_device_mesh(device.type, (dp_size, tp_size), mesh_dim_names=("zero", "tp"))
        groups = [mesh.get_group("zero"), mesh.get_group("tp")]
    else:
        mesh = init_device_mesh(device.type, (dp_size, sp_size, tp_size), mesh_dim_names=("dp", "sp", "tp"))
        zero = mesh["dp", "sp"]._flatten("zero").get_group()
        groups = [zero, mesh.get_group("tp"), mesh.get_group("sp")]
        _set_sequence_group(groups[2])
    fairscale_groups._DATA_PARALLEL_GROUP, fairscale_groups._MODEL_PARALLEL_GROUP = groups[:2]
    for group in groups:
        distributed_c10d._set_pg_timeout(timeout, group)  # a mesh has no argument for it


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # Under Slurm each task may see only its own GPU, which is then number 0 regardless of the local rank.
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
