"""Start a command, as `headrace NAME`, `python -m pretrain NAME` or a script in launch/.

This module holds what all commands share: the device that DeepSpeed uses, the rank's place among others, the parser,
and the exit code of an error.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import logging
import os
import re
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

from pretrain import log
from shards import HeadraceError, __version__, installation


class Command(NamedTuple):
    """A command: the module pretrain/commands/NAME.py has `add_arguments(parser)` and `run(arguments) -> exit code`."""

    summary: str
    on_ranks: bool = False  # runs a model, on however many ranks a launcher starts


COMMANDS = {
    "sample": Command("write the sample configs and their text into a folder, ready for training"),
    "train": Command("train a model, or continue training it", on_ranks=True),
    "index": Command("index shards before a run reads them"),
    "train-tokenizer": Command("train a tokenizer on a sample of shards"),
    "evaluate": Command("score checkpoints or other models on held-out text", on_ranks=True),
    "report": Command("make one page about a run, or about several side by side"),
    "watch": Command("follow a run from another terminal"),
    "generate": Command("continue prompts with a model", on_ranks=True),
    "export": Command("write a run's model for other programs"),
    "average": Command("average checkpoints of a run into one model"),
    "grow": Command("write a larger model that computes what a run's does"),
    "audit": Command("train an interval of a run again and compare it with what the run recorded", on_ranks=True),
    "provenance": Command("list every document of a step"),
    "exposure": Command("find out when a run was trained on a document or text"),
    "fork": Command("begin a run from a checkpoint of another"),
    "submit": Command("check a run and submit it to Slurm"),
    "sweep": Command("train the runs of a sweep on this machine"),
    "scale": Command("tell a large run's learning rate, loss and time from small runs"),
    "check-nodes": Command("test the nodes of a Slurm job before training starts on them"),
}


def main() -> int:
    """Run the command that the first argument names; return its exit code."""
    parser = argparse.ArgumentParser(prog="headrace", description="Pretrain language models on raw shards of text.")
    parser.add_argument("--version", action="version", version=f"headrace {__version__}")
    _ignore_local_rank(parser)
    # Each command parses the arguments after its name itself, so that only its module is imported.
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.summary, add_help=False)
    arguments, words = parser.parse_known_args()
    return run_program(arguments.command, words)


def run_program(name: str, words: Sequence[str]) -> int:
    """Run a command as a process that does nothing else; return its exit code.

    No module is ever garbage, but the collector would pass over all of them again and again: while they are imported,
    whenever DeepSpeed collects, which it does dozens of times in a start, and at the exit.
    """
    gc.disable()
    module = _load(name)
    gc.freeze()
    gc.enable()
    return _run(name, module, words)


def run(name: str, words: Sequence[str]) -> int:
    """Run a command with the arguments after its name, in a process that goes on; return its exit code."""
    return _run(name, _load(name), words)


def _load(name: str) -> ModuleType:
    """Import a command's module and all that it imports, with this process's device and place among ranks set."""
    if COMMANDS[name].on_ranks:
        _become_rank()
    else:
        _use_device("cpu")
    return importlib.import_module(f"pretrain.commands.{name.replace('-', '_')}")


def _run(name: str, module: ModuleType, words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=installation.typed(name),
        description=as_typed_here(module.__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _ignore_local_rank(parser)
    module.add_arguments(parser)
    arguments = parser.parse_intermixed_args(words)
    try:
        return int(module.run(arguments))
    except HeadraceError as error:
        if COMMANDS[name].on_ranks:
            logging.getLogger("headrace").error("%s", error)
        else:
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def as_typed_here(text: str) -> str:
    """Replace each `headrace NAME` in a text with how the command is typed in this installation."""
    names = "|".join(sorted(COMMANDS, key=len, reverse=True))
    return re.sub(rf"\bheadrace ({names})\b", lambda match: installation.typed(match[1]), text)


def _ignore_local_rank(parser: argparse.ArgumentParser) -> None:
    # The deepspeed launcher adds it before all other arguments; LOCAL_RANK in the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def _become_rank() -> None:
    """Prepare this process to be one of the ranks that a launcher has started, or the only one."""
    # Imported here, since commands without a model are typed often, and importing torch takes seconds.
    import torch

    from pretrain.topology import slurm_environment

    if not torch.cuda.is_available():
        _use_device("cpu")
    os.environ.update(slurm_environment(os.environ))
    log.set_up(int(os.environ.get("RANK", "0")))


def _use_device(name: str) -> None:
    # If DeepSpeed has to find a device itself, it prints what it found to stdout.
    os.environ.setdefault("DS_ACCELERATOR", name)
