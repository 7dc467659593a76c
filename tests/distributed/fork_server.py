"""Fork ranks on request, so that none of them has to import torch and DeepSpeed.

Usage: python -m tests.distributed.fork_server. A request is a line of JSON on stdin: [module, arguments, code,
environment, output]. The rank runs `code`, then the module as `python -m` would, with all of its output in the file
`output`. The reply is its process id, a line on stdout; once it has ended, its exit code is in OUTPUT.PROCESS.exit,
negative for a signal. The end of stdin ends all ranks.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import sys
from pathlib import Path

# What a rank would import, including what it imports at its first step.
MODULES = (
    "pretrain.commands.train",
    "pretrain.commands.evaluate",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "deepspeed.runtime.zero.muon.original_muon",
)
LONGEST_WAIT = 0.02  # seconds until an exit code is written


def run_rank(module: str, arguments: list[str], code: str, environment: dict[str, str], output: str) -> None:
    """Become a rank in a session of its own, run, and exit."""
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor, target in ((os.open(os.devnull, os.O_RDONLY), 0), (file, 1), (file, 2)):
        os.dup2(descriptor, target)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, *arguments]
    status = 1
    try:
        exec(code, {"rank": int(environment["RANK"])})
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def reap(outputs: dict[int, str]) -> None:
    """Write the exit codes of the ranks that have ended."""
    for process in list(outputs):
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            path = Path(f"{outputs.pop(process)}.{process}.exit")
            path.with_suffix(".partial").write_text(str(os.waitstatus_to_exitcode(status)))
            path.with_suffix(".partial").rename(path)


def main() -> None:
    for module in MODULES:
        importlib.import_module(module)
    gc.freeze()  # DeepSpeed collects garbage again and again
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
            request = json.loads(line)
            if (process := os.fork()) == 0:
                run_rank(*request)
            outputs[process] = request[-1]
            print(process, file=answers)
    for process in outputs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)


if __name__ == "__main__":
    main()
