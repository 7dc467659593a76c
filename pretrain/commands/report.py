"""Make one page about a run, or about several side by side: `headrace report runs/a runs/b --to report.html`.

The page is a single file that needs no network: curves, evaluations, where the time went, the mix of the sources,
hashes. Of several runs it shows what differs in their configs, their curves over each other, and how far they differ
on held-out text, with bootstrap intervals against the first of them. What is missing or damaged stands on the page.
Runs are only read, and may be training meanwhile. See docs/report.md.

Exit codes: 0 written, 2 no such run, or the page cannot be written, 1 anything else.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pretrain.evaluation.compare import check_can_draw
from pretrain.report.page import all_charts, write_page
from pretrain.report.png import draw_all
from pretrain.run.history import History
from pretrain.run.run_folder import RunFolder
from shards import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs, e.g. runs/quickstart")
    parser.add_argument("--to", type=Path, metavar="FILE", help="default: report.html, of a single run in its folder")
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="also draw every chart as a PNG, with matplotlib")


def run(arguments: argparse.Namespace) -> int:
    """Write the page. Raises ConfigError if a folder holds nothing of a run, or a file cannot be written."""
    if arguments.png:
        check_can_draw()
    histories = []
    for root in dict.fromkeys(arguments.runs):
        history = History(root)
        history.refresh()
        if not history.config and not len(history.metrics):
            RunFolder(root).check_there()
        histories.append(history)
    path = arguments.to or (histories[0].folder.report if len(histories) == 1 else Path("report.html"))
    try:
        write_page(histories, path)
        print(f"written to {path}")
        if arguments.png:
            drawn = draw_all(all_charts(histories), arguments.png)
            print(f"{len(drawn)} pictures in {arguments.png}")
    except OSError as error:
        raise ConfigError(f"the report cannot be written: {error}") from None
    return 0
