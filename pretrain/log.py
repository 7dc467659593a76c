"""Logging of a process, set up once by the command that runs in it: readable on a terminal, plain in a file."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

# Of these only warnings and worse are news
_NOISY = ("torch.distributed", "urllib3", "fsspec", "filelock", "datasets", "wandb", "matplotlib")


def set_up(rank: int = 0, level: int = logging.INFO, file: Path | None = None) -> None:
    """Sends this process's log to stderr and, if wanted, to a file.

    Rank 0 says everything from `level` up on stderr; the others, whose lines would repeat it, only warnings. A file
    gets `level` from any rank. Calling it again replaces what the last call set up.

    Args:
        rank: world rank; stands in each plain line.
        level: of the logging module.
        file: is appended to; its folder must exist.
    """
    console = Console(stderr=True)
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, log_time_format="[%X]")
        handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_plain(rank))
    handler.setLevel(level if rank == 0 else max(level, logging.WARNING))
    handlers: list[logging.Handler] = [handler]
    if file is not None:
        handlers.append(logging.FileHandler(file))
        handlers[-1].setFormatter(_plain(rank))
    logging.basicConfig(level=level, handlers=handlers, force=True)
    logging.captureWarnings(True)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    # DeepSpeed sets its logger's level when it is imported, which may be later; a filter stays, and is not added twice
    logging.getLogger("DeepSpeed").addFilter(_is_news)


def _plain(rank: int) -> logging.Formatter:
    return logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s")


def _is_news(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING
