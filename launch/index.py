"""Indexes shards: `python launch/index.py 'data/pile/*.jsonl.zst'`.

A training start makes missing indexes by itself, up to data.max_index_at_start; beyond that, run this first. It may be
a Slurm array: task i of n takes every n-th shard with `--part i/n`; run it once more without to write the manifest.

Exit codes: 0 all shards have an index, 2 a shard is missing or damaged, 1 anything else.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from shards import HeadraceError, files, manifest
from shards.config import MIB
from shards.index import ShardIndex, obtain


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="+", metavar="PATTERN", help="shards or globs, as in data.sources[].paths")
    parser.add_argument("--index-dir", type=Path, help="where indexes go; default: beside the shards (data.index_dir)")
    parser.add_argument("--verify", action="store_true", help="hash shards even if size and modification time agree")
    parser.add_argument("--show", action="store_true", help="print what each index says")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="shards at a time")
    parser.add_argument("--part", metavar="I/N", help="only every N-th shard, from the I-th on, counted from 0")
    parser.add_argument(
        "--cell-bytes", type=int, default=MIB, help="only for a run that sets data.window_bytes below 1 MiB"
    )
    parser.add_argument("--max-decoder-window", type=int, default=128 * MIB, help="bytes (data.max_decoder_window)")
    return parser.parse_args()


def index_shards(arguments: argparse.Namespace, paths: list[str]) -> list[ShardIndex]:
    """Indexes shards, several at a time, with a bar; the indexes in the order of `paths`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    sizes = [files.stat(path).size for path in paths]
    # Processes, not threads: finding lines holds the interpreter's lock for a third of the time.
    with (
        Progress(*columns, console=Console(stderr=True)) as progress,
        ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as executor,
    ):
        bar = progress.add_task(f"indexing {len(paths)} shards", total=sum(sizes))
        futures = [
            executor.submit(
                obtain,
                path,
                manifest.index_path(path, arguments.index_dir),
                arguments.cell_bytes,
                arguments.max_decoder_window,
                arguments.verify,
            )
            for path in paths
        ]
        for future, size in zip(futures, sizes, strict=True):
            future.add_done_callback(lambda _, size=size: progress.advance(bar, size))
        return [future.result() for future in futures]


def show(paths: list[str], indexes: list[ShardIndex]) -> None:
    """A table of what the indexes say."""
    table = Table("shard", "format", "bytes", "raw bytes", "documents", "lines", "entries", "content hash")
    for path, index in zip(paths, indexes, strict=True):
        counts = (index.stat.size, index.raw_bytes, index.num_documents, index.num_records, index.num_entries)
        table.add_row(path, index.compression, *(f"{count:,}" for count in counts), index.content_hash)
    Console().print(table)


def main() -> int:
    arguments = parse_arguments()
    try:
        paths = files.expand(tuple(arguments.patterns), "PATTERN")
        part = paths
        if arguments.part:
            number, count = (int(word) for word in arguments.part.split("/"))
            part = paths[number::count]
        indexes = index_shards(arguments, part)
        if not arguments.part:
            manifest.write(paths, indexes, arguments.index_dir, arguments.cell_bytes)
    except HeadraceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if arguments.show:
        show(part, indexes)
    raw, documents = sum(index.raw_bytes for index in indexes), sum(index.num_documents for index in indexes)
    print(f"{len(part)} shards indexed: {raw:,} raw bytes, {documents:,} documents")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
