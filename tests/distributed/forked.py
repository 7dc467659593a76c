"""Starts of launch/pretrain.py on several CPU ranks, without an import of torch for each of them: the ranks are forked.

Usage: python -m tests.distributed.forked CONFIG STARTS

STARTS is a JSON list. Each start is [world size, overrides, Python code that every rank runs first], and begins when
the one before it has ended. The last line on stdout is a JSON list of the exit codes, of each start a list with that of
each rank: the negative number of a signal where one ended it.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys

from pretrain.commands import dispatch
from pretrain.topology import free_port


def run_rank(arguments: list[str], code: str, rank: int, world_size: int, port: int) -> None:
    """Runs the command as one rank, in this process, and ends it."""
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in here.items()}, MASTER_ADDR="127.0.0.1")
    status = 1
    try:
        exec(code, {"rank": rank})
        status = dispatch.run("train", arguments)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    config, starts = sys.argv[1], json.loads(sys.argv[2])
    for late in (
        "pretrain.commands.train",
        "torch._dynamo",
        "torch._inductor.compile_fx",
        "deepspeed.runtime.zero.muon.original_muon",
    ):
        importlib.import_module(late)  # what a rank would import at its first step, for seconds
    gc.freeze()  # DeepSpeed collects garbage at every turn
    codes = []
    for world_size, overrides, code in starts:
        port, ranks = free_port(), []
        for rank in range(world_size):
            process = os.fork()
            if process == 0:
                run_rank(["--config", config, *overrides], code, rank, world_size, port)
            ranks.append(process)
        codes.append([os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in ranks])
    print(json.dumps(codes))


if __name__ == "__main__":
    main()
