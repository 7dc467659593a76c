"""Names every document of a step: `headrace provenance --run runs/quickstart --step 300`.

The step's batch is made again from the nearest cursors that the run wrote down, and checked against the batch hash in
its metrics.jsonl. Goes to stdout as tab-separated lines under one line of names, a line for each piece of a document:

    row     in the global batch, counted from 0
    source  as the config names it
    shard   its path
    line    of the record in the unpacked shard, counted from 1
    start   first token of the document that stands in the row, BOS counted; 0 = the document's beginning
    stop    one past the last
    text    with --text: the text of these tokens, as a JSON string

A run is read only, so it may be training meanwhile. Start the command in the folder that the run was started in, since
relative paths of its config count from there; where shards were moved since, say so: data.sources.0.paths=[...].

Exit codes: 0 named and checked, 2 no such run or step, or data that is not what it was, 1 anything else.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from pretrain.config import load_config
from pretrain.provenance import batch_of_step, texts
from pretrain.run.run_folder import RunFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, required=True, help="the run's folder, e.g. runs/quickstart")
    parser.add_argument("--step", type=int, required=True, help="counted from 1, as in metrics.jsonl")
    parser.add_argument("--text", action="store_true", help="add the text, as a JSON string")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="over the run's own config.yaml")


def print_documents(arguments: argparse.Namespace) -> None:
    folder = RunFolder(arguments.run)
    folder.check_there()
    config = load_config(folder.config, arguments.overrides, begun=True)
    rows = config.train.global_batch_size
    batch = batch_of_step(folder, arguments.step, config.data, rows, config.run.seed)
    spoken = map(json.dumps, texts(batch, config.data)) if arguments.text else None
    print("row", "source", "shard", "line", "start", "stop", *(["text"] if spoken else []), sep="\t")
    documents: set[tuple[str, int]] = set()
    for origin in batch.origins():
        documents.add((origin.shard, origin.line))
        print(*origin, *([next(spoken)] if spoken else []), sep="\t")
    sys.stdout.flush()
    print(
        f"step {arguments.step}: {len(documents):,} documents in {rows:,} rows; the batch made again has the hash that "
        "the run was trained on",
        file=sys.stderr,
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the table. Raises: HeadraceError if the run or the step is not there, or not what it was."""
    try:
        print_documents(arguments)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it closes stdout
    return 0
