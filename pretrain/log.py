"""A process's logging, set up once by the command that it runs: readable on a terminal, plain elsewhere."""

from __future__ import annotations

import logging
import sys
import warnings

from rich.console import Console
from rich.logging import RichHandler

# These loggers only report warnings and errors.
_NOISY = ("torch.distributed", "urllib3", "fsspec", "filelock", "datasets", "wandb", "matplotlib")


def set_up(rank: int) -> None:
    """Send this process's log to stderr, replacing any earlier setup.

    Rank 0 logs everything from INFO up; the other ranks, whose lines would repeat it, only warnings.

    Args:
        rank: world rank, shown in each plain line.
    """
    console = Console(stderr=True)
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, log_time_format="[%X]")
        handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"))
    handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    # DeepSpeed calls collectives by names that torch has deprecated, which a user cannot change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    # DeepSpeed sets its logger's level on import, which may come later; a filter stays, and is not added twice.
    logging.getLogger("DeepSpeed").addFilter(_is_news)


def console() -> Console:
    """Return the log's console. Live displays must share it, or log lines would garble them."""
    handlers = logging.getLogger().handlers
    return next((h.console for h in handlers if isinstance(h, RichHandler)), Console(stderr=True))


def _is_news(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING
