"""Starts several gloo ranks of a module on this machine and waits for them, as a launcher would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pretrain.topology import free_port

ROOT = Path(__file__).parents[2]


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What `deepspeed` or `torchrun` would set for one rank; one thread each, so that four fit on two cores."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }


def run_forked(config: Path, starts: list[tuple[int, list[str], str]]) -> tuple[list[list[int]], str]:
    """Runs `tests.distributed.forked`; returns the exit codes of each start's ranks, and all that they said."""
    command = [sys.executable, "-m", "tests.distributed.forked", str(config), json.dumps(starts)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


def run_ranks(world_size: int, module: str, *arguments: str, timeout: float = 300) -> str:
    """Runs `python -m module arguments` on every rank; returns rank 0's stdout.

    Raises:
        AssertionError: with the output of the first rank that failed.
    """
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=rank_environment(rank, world_size, port),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        with ThreadPoolExecutor(
            world_size
        ) as readers:  # all at once: a rank whose pipe is full keeps the others waiting
            outputs = list(readers.map(lambda process: process.communicate(timeout=timeout), processes))
    finally:
        for process in processes:
            process.kill()
    for rank, (process, (stdout, stderr)) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank} of {module} exited {process.returncode}\n{stdout}\n{stderr}"
    return outputs[0][0]
