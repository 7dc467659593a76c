"""List every document of a step: `headrace provenance --run runs/quickstart --step 300`.

The step's batch is reconstructed from the nearest cursors that the run recorded, and checked against the batch hash in
its metrics.jsonl. Output goes to stdout: tab-separated lines under a header line, one for each piece of a document:

    row     in the global batch, counted from 0
    source  as the config names it
    shard   its path
    line    of the record in the decompressed shard, counted from 1
    start   first token of the piece in its document, BOS counted; 0 = the document's beginning
    stop    one past the last token
    text    with --text: the text of these tokens, as a JSON string

With --by-loss there is one line for each document, the worst first: its mean loss in nats, by the newest checkpoint
before the step, the number of its tokens that were targets, source, shard and line. The model has to fit this process's
device.

A run is only read, so it may be training meanwhile. Start the command in the folder that the run was started in, since
its config's relative paths start there; if shards were moved since, say so: data.sources.0.paths=[...].

Exit codes: 0 listed and checked, 2 no such run or step, or the data has changed, 1 anything else.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from pretrain.checkpoint.store import CheckpointStore
from pretrain.commands.begun_run import open_run
from pretrain.config import RunConfig
from pretrain.evaluation.checkpoints import load_checkpoint
from pretrain.evaluation.document_losses import document_losses
from pretrain.exchange.base import open_base
from pretrain.inference.forward_model import ForwardModel
from pretrain.parallel_config import ParallelConfig
from pretrain.provenance import batch_of_step, texts
from pretrain.topology import started
from shards import Batch, CheckpointError

_BATCH_SIZE = 8  # rows scored at once, unless the config says how many fit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, required=True, help="the run's folder, e.g. runs/quickstart")
    parser.add_argument("--step", type=int, required=True, help="counted from 1, as in metrics.jsonl")
    parser.add_argument("--text", action="store_true", help="add the text, as a JSON string")
    parser.add_argument("--by-loss", action="store_true", help="rank the documents by their loss")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides for the run's config.yaml")


def print_documents(arguments: argparse.Namespace) -> None:
    folder, config, checkpoints = open_run(arguments.run, arguments.overrides)
    stages = [stage.of_loader for stage in config.all_stages]
    batch = batch_of_step(folder, arguments.step, stages, config.run.seed)
    if arguments.by_loss:
        print_losses(arguments.step, batch, config, checkpoints)
        return
    spoken = map(json.dumps, texts(batch, config.data)) if arguments.text else None
    print("row", "source", "shard", "line", "start", "stop", *(["text"] if spoken else []), sep="\t")
    documents: set[tuple[str, int]] = set()
    for origin in batch.origins():
        documents.add((origin.shard, origin.line))
        print(*origin, *([next(spoken)] if spoken else []), sep="\t")
    sys.stdout.flush()
    print(
        f"step {arguments.step}: {len(documents):,} documents in {len(batch.tokens):,} rows; the rebuilt batch has "
        "the hash that the run was trained on",
        file=sys.stderr,
    )


def print_losses(step: int, batch: Batch, config: RunConfig, checkpoints: CheckpointStore) -> None:
    """Print the documents of a batch by their loss. Raises CheckpointError if no checkpoint is older than the step."""
    before = [saved for saved in checkpoints.steps() if saved < step]
    if not before:
        raise CheckpointError(
            f"{checkpoints.root}: no checkpoint before step {step}, by which its documents could be scored; it has"
            f" {checkpoints.steps()}"
        )
    alone = ParallelConfig()
    with started(alone) as topology:
        model = ForwardModel(config.model, alone, config.precision, topology)
        base = open_base(config.init_from, config.model, topology)
        load_checkpoint(model, checkpoints, before[-1], topology, lambda of: config.stage_of(of).model, base)
        rows = config.stage_of(step).micro_rows or _BATCH_SIZE
        losses = document_losses(model.score, batch, rows, topology.device)
    print("loss", "targets", "source", "shard", "line", sep="\t")
    for found in losses:
        print(f"{found.loss:.4f}", *found[1:], sep="\t")
    sys.stdout.flush()
    print(
        f"step {step}: {len(losses):,} documents, scored by the checkpoint of step {before[-1]}; the rebuilt batch has "
        "the hash that the run was trained on",
        file=sys.stderr,
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the table. Raises HeadraceError if the run or step is missing, or its data has changed."""
    try:
        print_documents(arguments)
    except BrokenPipeError:  # for example, `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python complains when closing stdout
    return 0
