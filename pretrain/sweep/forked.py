"""Train one run after another, each forked from a process that has imported what they need. forked -> slot.

A small run's steps take less time than its imports. This process holds nothing else than modules, so that a run forked
from it is as it would be in a process of its own.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

from pretrain.run.description import git_commit

# What a run imports on its way to its last step
MODULES = (
    "pretrain.commands.train",
    "pretrain.commands.evaluate",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.module_inject.auto_ep_layer",
    "numpy.ma",
)
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl


def load() -> None:
    """Import what a run needs."""
    for module in MODULES:
        importlib.import_module(module)
    # The first look at it makes DeepSpeed try out a compiler and libraries, which takes longer than a step
    importlib.import_module("deepspeed.ops").__compatible_ops__.keys()
    gc.freeze()  # DeepSpeed collects garbage again and again, and would pass over all modules each time


def stop_with(parent: int) -> None:
    """Have this process asked to stop when its parent is gone, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != parent:  # it was gone before
            os.kill(os.getpid(), signal.SIGTERM)


def become(output: str, main: Callable[[], object]) -> NoReturn:
    """Run `main` in a session of its own and exit as a program would; what it prints is appended to a file."""
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for descriptor, target in ((os.open(os.devnull, os.O_RDONLY), 0), (file, 1), (file, 2)):
        os.dup2(descriptor, target)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    status = 1
    try:
        main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_program(words: Sequence[str]) -> None:
    """Run what `python WORDS` would: a script, or -m and a module."""
    if words[0] == "-m":
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")


def serve(parent: int, is_warm: bool) -> None:
    """Train the runs that lines on stdin ask for, until it ends. Each is a JSON list: the run's log, and its words.

    A line on stdout has the run's process id, and the next one its exit code, negative for a signal, once it has ended.

    Args:
        parent: the process that asks; when it is gone, the run is asked to stop.
        is_warm: import what runs need once, and not in each of them.
    """
    stop_with(parent)
    requests, answers = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print as they are imported is no answer
    if is_warm:
        load()
        git_commit()  # of the files that were imported, even if they change before the last run
    own = os.getpid()
    for line in requests:
        log, *words = json.loads(line)
        if (process := os.fork()) == 0:
            # Or whoever asks would not see that this process is gone while a run of it is still there
            os.close(answers.fileno())
            stop_with(own)
            become(log, partial(run_program, words))
        print(process, file=answers)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), file=answers)
