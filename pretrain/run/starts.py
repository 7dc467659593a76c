"""Record what each start of a run trains with: program, libraries, devices, layout. assembly -> starts -> run folder.

Bits can only be expected to repeat where all of this is the same, so an audit has to know it.
"""

from __future__ import annotations

import platform
import socket
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import msgspec
import torch

from pretrain.run.description import git_commit
from pretrain.run.events import now
from pretrain.run.run_folder import RunFolder
from pretrain.topology import Layout, Topology
from shards import __version__

_PACKAGES = ("torch", "deepspeed", "fairscale")


class Environment(msgspec.Struct, frozen=True):
    """All that decides the bits of a step, besides the config and the layout.

    Attributes:
        devices: names of the ranks' devices, each once.
        threads: on CPUs, of a rank; sums over a tensor are split among them.
        packages: versions of the libraries that compute.
        attention: the backend that computes the attention; "none" if the model has none.
    """

    devices: list[str]
    threads: int | None
    packages: dict[str, str]
    attention: str


class StartRecord(msgspec.Struct, frozen=True):
    """A line of starts.jsonl.

    Attributes:
        step: optimizer steps done before; the start trained the steps after it, up to the next record's.
        time: in UTC, ISO 8601.
        program, commit: version of this program and, in a clone, its commit, with "+" if files differ.
        config_hash: names the config in the folder configs/.
        tp_size, dp_size, zero_stage, sp_size: the layout.
        environment: the same on all ranks, but for the device.
        hosts: names of the nodes.
        suite: the label of its evaluations; empty if it makes none, or an older program did not record it.
        last_step: the run's, foreseen where its data ends it; 0 if an older program did not record it.
    """

    step: int
    time: str
    program: str
    commit: str
    config_hash: str
    tp_size: int
    dp_size: int
    zero_stage: int
    environment: Environment
    hosts: list[str]
    suite: str = ""
    sp_size: int = 1
    last_step: int = 0

    @property
    def layout(self) -> Layout:
        """Return the layout that the start trained in."""
        return Layout(self.tp_size, self.dp_size, self.zero_stage, self.sp_size)


def describe_start(
    step: int,
    config_hash: str,
    layout: Layout,
    environment: Environment,
    topology: Topology,
    suite: str = "",
    last_step: int = 0,
) -> StartRecord:
    """Describe a start that resumes from a step; every rank calls it."""
    return StartRecord(
        step=step,
        time=now(),
        program=__version__,
        commit=git_commit(),
        config_hash=config_hash,
        environment=environment,
        hosts=sorted(set(topology.gather_objects(socket.gethostname()))),
        suite=suite,
        last_step=last_step,
        **asdict(layout),
    )


def environment_of(topology: Topology, attention: str) -> Environment:
    """Describe what the ranks compute with; every rank calls it.

    Args:
        attention: the backend that the engine uses.
    """
    packages = {name: version(name) for name in _PACKAGES}
    if topology.device.type == "cuda":
        cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        packages |= {"cuda": str(torch.version.cuda), "cudnn": str(cudnn)}
    return Environment(
        devices=device_names(topology),
        threads=torch.get_num_threads() if topology.device.type == "cpu" else None,
        packages=packages,
        attention=attention,
    )


def device_names(topology: Topology) -> list[str]:
    """Return the names of the ranks' devices, each once; every rank calls it."""
    return sorted(set(topology.gather_objects(_device_name(topology.device))))


def read_starts(folder: RunFolder) -> list[StartRecord]:
    """Read the records of a run's starts, oldest first; older programs wrote none."""
    return [msgspec.convert(record, StartRecord) for record in folder.starts.read()]


def start_of(starts: Sequence[StartRecord], step: int) -> StartRecord | None:
    """Return the start that trained a step, counted from 1; None if it was not recorded."""
    return next((start for start in reversed(starts) if start.step < step), None)


def _device_name(device: torch.device) -> str:
    """Return a GPU's name, or a CPU's with the instructions that torch uses on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # only Linux has it
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
