"""Fork ranks on request, so that none of them has to import torch and DeepSpeed.

Usage: python -m tests.distributed.fork_server. A request is a line of JSON on stdin: [module, arguments, code,
environment, output]. The rank runs `code`, then the module as `python -m` would, with all of its output in the file
`output`. The reply is its process id, a line on stdout; once it has ended, its exit code is in OUTPUT.PROCESS.exit,
negative for a signal. The end of stdin ends all ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
from functools import partial
from pathlib import Path

from pretrain.sweep.forked import become, load, run_program

LONGEST_WAIT = 0.02  # seconds until an exit code is written


def run_rank(module: str, arguments: list[str], code: str, environment: dict[str, str]) -> None:
    """Run the rank's code, then its module."""
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, *arguments]
    exec(code, {"rank": int(environment["RANK"])})
    run_program(["-m", module, *arguments])


def reap(outputs: dict[int, str]) -> None:
    """Write the exit codes of the ranks that have ended."""
    for process in list(outputs):
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            path = Path(f"{outputs.pop(process)}.{process}.exit")
            path.with_suffix(".partial").write_text(str(os.waitstatus_to_exitcode(status)))
            path.with_suffix(".partial").rename(path)


def main() -> None:
    load()
    requests, answers = os.dup(0), os.fdopen(os.dup(1), "w", buffering=1)
    outputs: dict[int, str] = {}  # by process
    pending = b""
    while True:
        reap(outputs)
        if not select.select([requests], [], [], LONGEST_WAIT)[0]:
            continue
        data = os.read(requests, 1 << 16)
        if not data:
            break
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            *request, output = json.loads(line)
            if (process := os.fork()) == 0:
                become(output, partial(run_rank, *request))
            outputs[process] = output
            print(process, file=answers)
    for process in outputs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)


if __name__ == "__main__":
    main()
