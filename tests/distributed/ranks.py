"""Start gloo ranks on this machine, forked from a process that has already imported torch and DeepSpeed."""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from pretrain.topology import free_port

ROOT = Path(__file__).parents[2]
TIMEOUT = 300.0  # seconds


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return what `deepspeed` or `torchrun` would set for one rank; one thread each, so that four fit on two cores."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "COLUMNS": "200",  # width of tables
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }


class Rank:
    """A process that the server has forked, with the parts of `subprocess.Popen` that tests need.

    Attributes:
        pid: id of the process and of its group.
    """

    def __init__(self, pid: int, output: Path) -> None:
        self.pid = pid
        self._output = output

    @property
    def output(self) -> str:
        """What the rank has written to stdout and stderr so far."""
        return self._output.read_text(errors="replace") if self._output.exists() else ""

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while the rank runs."""
        path = self._output.with_name(f"{self._output.name}.{self.pid}.exit")
        return int(path.read_text()) if path.exists() else None

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Wait for the rank to end and return its exit code."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            assert time.monotonic() < deadline, f"a rank has not ended within {timeout} s: {self.output}"
            time.sleep(0.01)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        """Signal the process."""
        os.kill(self.pid, number)

    def kill_group(self) -> None:
        """Kill the process and everything that it has started."""
        os.killpg(self.pid, signal.SIGKILL)


class _Server:
    """The process that forks ranks; it ends, with them, when this process does."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="headrace-ranks-")
        self._numbers = itertools.count()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.fork_server"],
            cwd=ROOT,
            env=rank_environment(0, 1, 0),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,
        )

    def new_file(self) -> Path:
        """Return the path of a file that does not exist yet."""
        return Path(self._folder.name) / str(next(self._numbers))

    def start(
        self, module: str, arguments: Sequence[str], code: str, environment: dict[str, str], output: Path
    ) -> Rank:
        """Fork one rank, which appends its output to the file `output`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([module, list(arguments), code, environment, str(output)]) + "\n")
        while not (line := self._process.stdout.readline()).strip().isdigit():  # imports may have printed before it
            assert line, "the server has ended"
        return Rank(int(line), output)


_server = functools.cache(_Server)


def start_ranks(world_size: int, module: str, *arguments: str, code: str = "", one_output: bool = False) -> list[Rank]:
    """Start `python -m module arguments` on every rank.

    Args:
        code: Python that each rank runs first, with its number as `rank`.
        one_output: all ranks write to one file, in chronological order.
    """
    port, server = free_port(), _server()
    outputs = [server.new_file()] * world_size if one_output else [server.new_file() for _ in range(world_size)]
    return [
        server.start(module, arguments, code, rank_environment(rank, world_size, port), output)
        for rank, output in enumerate(outputs)
    ]


def run_ranks(world_size: int, module: str, *arguments: str) -> str:
    """Run `python -m module arguments` on every rank; return rank 0's output.

    Raises:
        AssertionError: with the output of the first rank that failed.
    """
    ranks = start_ranks(world_size, module, *arguments)
    try:
        codes = [rank.wait() for rank in ranks]
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill_group()
    for number, (rank, code) in enumerate(zip(ranks, codes, strict=True)):
        assert code == 0, f"rank {number} of {module} exited {code}\n{rank.output}"
    return ranks[0].output


def run_starts(config: Path, starts: Sequence[tuple[int, list[str], str]]) -> tuple[list[list[int]], str]:
    """Run the training command several times, each start once the previous one has ended.

    Args:
        starts: for each, the number of ranks, the overrides, and Python code that every rank runs first.
    Returns:
        The exit codes of each start's ranks, and all of their output.
    """
    codes, outputs = [], []
    for world_size, overrides, code in starts:
        arguments = ("train", "--config", str(config), *overrides)
        ranks = start_ranks(world_size, "pretrain", *arguments, code=code, one_output=True)
        codes.append([rank.wait() for rank in ranks])
        outputs.append(ranks[0].output)
    return codes, "".join(outputs)
