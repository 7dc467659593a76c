"""Find out when a run was trained on a document or text: `headrace exposure --run runs/a --text "..."`.

In place of a text, `--doc SHARD:LINE`, as often as wanted, or `--file LIST` names documents. The command says of each
document how often, at which steps, before which checkpoints and in which ancestors the run was trained on it, and if it
was not, why. `--table FILE` (- for stdout) writes all of it, tab-separated under a header line, one line for each piece
of a document in a row:

    source  as the config names it
    shard   its path
    line    of the record in the decompressed shard, counted from 1
    epoch   of the source, counted from 0
    step    counted from 1
    row     in the global batch, counted from 0
    start   first token of the piece in its document, BOS counted; 0 = the document's beginning
    stop    one past the last token
    trained yes, or why nothing was learned from it; step to stop are empty if it is in no row of that epoch

A text is found in every document that has 32 consecutive words of it, whatever their case and punctuation, and as a
whole document of any length. The index that this takes is made at the first use, shard by shard, beside the shards'
indexes; a pass that is interrupted goes on. --doc, and lists of shards and lines, need no index.

`--list FILE` writes the documents found as a list for data.forget. `--unlearn` prints how to train the run without
them, from the last checkpoint before it was trained on any, and what that costs.

A run is only read, so it may be training meanwhile. Start the command in the folder that the run was started in.

Exit codes: 0 done, 2 no such run, shard, line or text, or the data has changed, 1 anything else.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.console import Console
from rich.progress import Progress

from pretrain import exposure, unlearning
from pretrain.commands.arguments import at_least
from pretrain.commands.begun_run import BegunRun, open_run
from pretrain.commands.exposure_report import Report
from pretrain.config import RunConfig
from shards import ConfigError, DataConfig, Loader
from shards.exposure import text_index
from shards.exposure.grams import Overlap
from shards.exposure.naming import Documents
from shards.exposure.passes import make_all
from shards.exposure.search import DocumentPlace, TextSearch
from shards.index.manifest import Shard
from shards.records.document_list import DocumentList
from shards.storage.atomic import write_atomically

_SHOWN = 20  # documents described one by one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, required=True, help="the run's folder, e.g. runs/quickstart")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--text", help="find the documents that share this text")
    asked.add_argument("--text-file", type=Path, help="find the documents that share the text in a file")
    asked.add_argument("--doc", action="append", metavar="SHARD:LINE", help="a document; may be given several times")
    asked.add_argument("--file", type=Path, metavar="LIST", help="a list of documents, as for data.forget")
    parser.add_argument(
        "--match",
        choices=("any", "contains", "whole"),
        default="any",
        help="with a text: only documents that contain all of it, or that are it; default: all that share 32 words",
    )
    parser.add_argument("--table", type=Path, metavar="FILE", help="write every piece in every row; - for stdout")
    parser.add_argument("--list", type=Path, metavar="FILE", help="write the documents found as a list for data.forget")
    parser.add_argument("--unlearn", action="store_true", help="print how to train the run without the documents")
    parser.add_argument("--no-proof", action="store_true", help="do not make the first step found again to prove it")
    parser.add_argument(
        "--workers", type=at_least(1), default=os.cpu_count(), help="processes that make the text index"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides for the run's config.yaml")


class _Asked(NamedTuple):
    """The documents that are meant, and how much of the text each shares, if a text was given."""

    places: list[DocumentPlace]
    overlaps: dict[DocumentPlace, Overlap]


def run(arguments: argparse.Namespace) -> int:
    """Print the report. Raises HeadraceError if the run or a document is missing, or the data has changed."""
    _check(arguments)
    begun = open_run(arguments.run, arguments.overrides)
    folder, config = begun.folder, begun.config
    trained = exposure.read_trained(folder)
    stages = [stage.of_loader for stage in config.all_stages]
    with exposure.open_loader(folder, stages, config.run.seed, trained.steps) as loader:
        documents = Documents(stages[-1].data, loader.plan.shards)
        asked = _ask(arguments, loader, documents)
        started = time.perf_counter()
        history = exposure.find(folder, loader, asked.places, trained.steps)
        seconds = time.perf_counter() - started
        notes = [f"{len(asked.places):,} documents looked up in {trained.steps:,} steps in {seconds:.1f} s"]
        if not arguments.no_proof:
            proved = exposure.prove(folder, loader, history, asked.places, stages, config.run.seed)
            notes.append(
                f"step {proved:,}, made again, has the hash that the run was trained on, and holds them as said"
                if proved
                else "no step holds any of them, so there is none to make again as a proof"
            )
    report = Report(
        config.run.name, folder.ancestors(), begun.checkpoints.steps(), stages, documents, trained, *asked, history
    )
    if config.init_from:
        notes.append(f"the run began with the weights in {config.init_from}, and nothing is said of their training")
    if arguments.list:
        _write_list(arguments.list, config, documents, asked.places)
        notes.append(f"{arguments.list} lists them for data.forget")
    if arguments.unlearn:
        notes += _unlearn(begun, trained, report.first_step, arguments.list or arguments.file)
    lines = [*report.summary(_SHOWN), *notes]
    if arguments.table == Path("-"):
        print(*report.table(), sep="\n")
    elif arguments.table:
        write_atomically(arguments.table, "".join(f"{line}\n" for line in report.table()))
    print(*lines, sep="\n", file=sys.stderr if arguments.table == Path("-") else sys.stdout)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Reject arguments that contradict each other. Raises: ConfigError."""
    if arguments.unlearn and not (arguments.list or arguments.file):
        raise ConfigError("--unlearn: the new run needs a list of the documents; add --list FILE, which writes it")


def _ask(arguments: argparse.Namespace, loader: Loader, documents: Documents) -> _Asked:
    """Find the documents that are meant. Raises: ConfigError if there is none."""
    data, shards = loader.plan.stages[-1].data, loader.plan.shards

    def search() -> TextSearch:
        _index(data, shards, arguments.workers)
        return TextSearch(data, shards)

    if arguments.doc:
        return _Asked(list(dict.fromkeys(place for written in arguments.doc for place in documents.at(written))), {})
    if arguments.file:
        return _Asked(documents.listed(DocumentList(arguments.file, "--file"), search), {})
    text = arguments.text if arguments.text is not None else _text_in(arguments.text_file)
    matches = search().texts([text])[0]
    overlaps = {
        match.place: match.overlap
        for match in matches
        if arguments.match == "any" or getattr(match.overlap, arguments.match)
    }
    if not overlaps:
        others = f"; {len(matches):,} documents share some words of it: --match any" if matches else ""
        raise ConfigError(f"no document of the run's sources has the text{others}")
    return _Asked(list(overlaps), overlaps)


def _text_in(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text-file {path}: cannot be read: {error}") from None


def _index(data: DataConfig, shards: Sequence[Sequence[Shard]], workers: int) -> None:
    """Make the text indexes that are missing, under a progress bar."""
    missing = [
        shard
        for source, listed in zip(data.sources, shards, strict=True)
        for shard in listed
        if text_index.find(data, source, shard) is None
    ]
    if not missing:
        return
    started, size = time.perf_counter(), 0
    raw = sum(shard.index.raw_bytes for shard in missing)
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task(f"text index of {len(missing)} shards", total=raw)
        for shard, made in make_all(data, shards, workers):
            if made.seconds:
                size += made.num_bytes
                progress.advance(bar, shard.index.raw_bytes)
    seconds = time.perf_counter() - started
    print(f"text index made: {size / 1e6:,.1f} MB for {raw / 1e6:,.1f} MB of text, in {seconds:.1f} s", file=sys.stderr)


def _write_list(path: Path, config: RunConfig, documents: Documents, places: Sequence[DocumentPlace]) -> None:
    """Write the documents, and all that the run forgets already, as a list for data.forget."""
    lines = [msgspec.json.encode({"shard": documents.path(place), "line": place.line}).decode() for place in places]
    for listed in dict.fromkeys(stage.data.forget for stage in config.all_stages):
        lines += listed.read_text().splitlines() if listed else []
    write_atomically(path, "".join(f"{line}\n" for line in dict.fromkeys(lines)))


def _unlearn(begun: BegunRun, trained: exposure.Trained, first: int | None, listed: Path) -> list[str]:
    """Say how to train the run without the documents."""
    if first is None:
        return ["nothing to unlearn: the run was not trained on any of them"]
    plan = unlearning.plan(begun.folder, begun.config, trained, first, listed)
    if plan.restart is None:
        begin = f"To unlearn: no checkpoint is left from before step {first:,}, so the run must begin anew"
    else:
        begin = f"To unlearn: begin again from step {plan.restart.step:,} of {plan.restart.folder.root}"
    hours = plan.seconds / 3600
    time_taken = f"{hours:,.1f} hours" if hours >= 1 else f"{plan.seconds:,.0f} s"
    return [
        begin,
        f"  {plan.command}",
        f"  that trains {plan.steps:,} steps and {plan.tokens:,} tokens again, {time_taken} at the run's median speed",
    ]
