"""Follow a run from another terminal: `headrace watch runs/quickstart`.

It shows curves of loss, gradient norm and tokens per second, the last evaluation, the time that is left, restarts and
events, and what cannot be read. It only reads the run's files, so it works wherever these can be seen, such as on a
cluster's login node, and the run need not have begun. Ctrl-C ends it. See docs/report.md.

Exit codes: 0 ended, 2 bad input, or with --once there is no run, 1 anything else.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live

from pretrain.report.frame import frame
from pretrain.run.history import History
from shards import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, e.g. runs/quickstart")
    parser.add_argument("--once", action="store_true", help="print one frame and end")
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="between two looks at the files")


def run(arguments: argparse.Namespace) -> int:
    """Show frames until Ctrl-C. Raises ConfigError with --once if there is no run."""
    if arguments.every <= 0:
        raise ConfigError(f"--every {arguments.every:g}: give seconds above 0, such as 2")
    history, console = History(arguments.run), Console()
    if arguments.once:
        history.folder.check_there()
        history.refresh()
        console.print(frame(history, console.width, console.height))
        return 0
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, screen=console.is_terminal) as live:
        while True:
            history.refresh()
            live.update(frame(history, console.width, console.height), refresh=True)
            time.sleep(arguments.every)
    return 0
