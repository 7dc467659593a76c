"""Indexes the shards of a run, `python launch/index.py --config configs/my-run.yaml`, or those of one source by its
patterns, `python launch/index.py 'data/pile/*.jsonl.zst'`.

A training start makes missing indexes by itself, up to data.max_index_at_start; beyond that, run this first. It may be
a Slurm array: task i of n takes every n-th shard with `--part i/n`; run it once more without to write the manifests.
With a config all sources are indexed as its run will look for them: data sets too, and its remote_cache is filled.

Exit codes: 0 all shards have an index, 2 a shard is missing or damaged, 130 interrupted, 1 anything else.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from multiprocessing import get_context, parent_process
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty
from threading import Thread

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from pretrain.config_file import read_tree
from shards import DataConfig, HeadraceError, ShardError, SourceConfig, document, preparation
from shards.index import manifest
from shards.index.shard_index import ShardIndex, obtain
from shards.index.splice_points import explain
from shards.storage import files
from shards.storage.block_cache import open_cache

INTERRUPTED = 128 + signal.SIGINT  # as shells call it
REPORT_BYTES = 4 << 20
REFRESH_SECONDS = 0.2


def part(text: str) -> tuple[int, int]:
    """(I, N) of --part I/N. Raises: argparse.ArgumentTypeError."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is no I/N with I from 0 to N - 1, such as 0/100 to 99/100")
    return int(number), int(count)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "patterns", nargs="*", metavar="PATTERN", help="shards or globs, as in paths; with --config: key.path=value"
    )
    parser.add_argument("--config", type=Path, help="of a run: index all its sources")
    parser.add_argument("--index-dir", type=Path, help="where indexes go; default: beside the shards (data.index_dir)")
    parser.add_argument("--verify", action="store_true", help="hash shards even if size and modification time agree")
    parser.add_argument(
        "--verify-entries",
        choices=("on", "off"),
        default="on",
        help="decode from each splice point to the next and compare; off: only for a window's length, 1 MiB at least",
    )
    parser.add_argument("--cat", metavar="SHARD", help="print one document of a shard and leave; with --document")
    parser.add_argument("--document", type=int, metavar="N", help="its line in the unpacked shard, counted from 1")
    parser.add_argument("--show", action="store_true", help="print what each index says")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="shards at a time")
    parser.add_argument(
        "--part", type=part, metavar="I/N", help="only every N-th shard, from the I-th on, counted from 0"
    )
    parser.add_argument("--cell-bytes", type=int, help="only for a run that sets data.window_bytes below 1 MiB")
    parser.add_argument("--max-decoder-window", type=int, help="bytes (data.max_decoder_window)")
    arguments = parser.parse_intermixed_args()
    if (arguments.cat is None) != (arguments.document is None):
        parser.error("--cat and --document belong together")
    if not arguments.config and not arguments.patterns and not arguments.cat:
        parser.error("name shards, or a run's config with --config")
    if arguments.config and (arguments.index_dir or arguments.cell_bytes or arguments.max_decoder_window):
        parser.error("with --config say data.index_dir=..., data.window_bytes=..., data.max_decoder_window=...")
    return arguments


def data_config(arguments: argparse.Namespace) -> DataConfig:
    """What is to be indexed, and how. Raises: ConfigError."""
    if arguments.config:
        tree, _ = read_tree(arguments.config, arguments.patterns)
        return DataConfig.parse(tree.get("data") or {}, "data")
    said = {
        "window_bytes": arguments.cell_bytes,
        "index_dir": arguments.index_dir,
        "max_decoder_window": arguments.max_decoder_window,
    }
    return DataConfig(
        sources=(SourceConfig(name="PATTERN", paths=tuple(arguments.patterns)),),
        tokenizer=Path(),  # takes no part in it, nor do rows
        seq_len=1,
        **{key: value for key, value in said.items() if value is not None},
    )


def work(tasks: Queue, reports: Queue, data: DataConfig, verify: bool, verify_entries: bool) -> None:
    """A worker process: indexes the shards that it is given, until it is given None.

    Reports are (shard, what was read of it since the last: bytes, compressed), and (shard, its index, or the error).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the command's process, which then ends this one
    Thread(target=end_with_parent, daemon=True).start()
    cache = open_cache(data.remote_cache)
    unsaid = 0

    def report(path: str, size: int) -> None:
        nonlocal unsaid
        unsaid += size
        if unsaid >= REPORT_BYTES:
            reports.put((path, unsaid))
            unsaid = 0

    while (path := tasks.get()) is not None:
        try:
            limits = (data.cell_bytes, data.max_decoder_window)
            reports.put((path, obtain(path, data.index_dir, *limits, verify, report, cache, verify_entries)))
        except HeadraceError as error:
            reports.put((path, error))


def end_with_parent() -> None:
    """Waits until the command's process is gone, whatever ended it, and ends this one."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def index_shards(
    data: DataConfig, paths: list[str], workers: int, verify: bool, verify_entries: bool
) -> list[ShardIndex]:
    """Indexes shards, several at a time, with a bar; the indexes in the order of `paths`.

    Raises: ShardError that names every shard that is missing or damaged, once all others have their indexes;
    HeadraceError if a worker is lost.
    """
    found: dict[str, ShardIndex | HeadraceError] = {}
    sizes: dict[str, int] = {}  # bytes, of those that are there
    for path in paths:
        try:
            sizes[path] = files.stat(path).size
        except ShardError as error:
            found[path] = error
    read = dict.fromkeys(sizes, 0)
    lost: list[int] = []  # exit statuses of workers
    # Processes, not threads: finding lines holds the interpreter's lock for a third of the time.
    spawn = get_context("spawn")
    tasks, reports = spawn.Queue(), spawn.Queue()
    tasks.cancel_join_thread()  # what nobody takes any more must not keep this process
    for task in (*sizes, *[None] * workers):
        tasks.put(task)
    arguments = (tasks, reports, data, verify, verify_entries)
    processes = [spawn.Process(target=work, args=arguments, daemon=True) for _ in range(min(workers, len(sizes)))]
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task(f"indexing {len(sizes)} shards", total=sum(sizes.values()))
        for process in processes:
            process.start()
        while len(found) < len(paths):
            try:
                path, said = reports.get(timeout=REFRESH_SECONDS)
            except Empty:
                lost = [process.exitcode for process in processes if process.exitcode]
                if lost:
                    break
                continue
            if isinstance(said, int):
                size = said
            else:
                found[path], size = said, sizes[path] - read[path]
            read[path] += size
            progress.advance(bar, size)
    wrong = [str(error) for error in found.values() if isinstance(error, HeadraceError)]
    if len(found) < len(paths):
        wrong.append(
            f"a worker ended with status {lost[0]}; if memory ran out, lower --workers; run it again for the rest"
        )
        raise HeadraceError("\n".join(wrong))
    if wrong:
        raise ShardError("\n".join(wrong))
    return [found[path] for path in paths]


def show(path: str, index: ShardIndex) -> None:
    """What the index of a shard says."""
    print(path)
    print(
        f"  {index.compression}, {index.stat.size:,} bytes, {index.raw_bytes:,} raw, content hash {index.content_hash}"
    )
    print(f"  {index.num_documents:,} documents in {index.num_records:,} lines")
    if index.compression in ("zstd", "gzip"):
        starts = "frames" if index.compression == "zstd" else "members"
        print(f"  {starts}: {index.num_frames:,}")
        print(
            "  splice points: "
            + explain(index.stat.size, index.raw_bytes, index.decoder_window, index.splices, index.splice_counts)
        )


def main() -> int:
    arguments = parse_arguments()
    try:
        if arguments.cat:
            print(document(arguments.cat, arguments.document, index_dir=arguments.index_dir).text)
            return 0
        data = data_config(arguments)
        paths_of = [preparation.shard_paths(source) for source in data.sources]
        paths = list(dict.fromkeys(path for paths in paths_of for path in paths))
        if arguments.part:
            number, count = arguments.part
            paths = paths[number::count]
        indexes = index_shards(data, paths, arguments.workers, arguments.verify, arguments.verify_entries == "on")
        if not arguments.part:
            index_of = dict(zip(paths, indexes, strict=True))
            for listed in paths_of:
                manifest.write(listed, [index_of[path] for path in listed], data.index_dir, data.cell_bytes)
    except HeadraceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; indexes that are made stay, the same command makes the others", file=sys.stderr)
        return INTERRUPTED
    if arguments.show:
        for path, index in zip(paths, indexes, strict=True):
            show(path, index)
    raw, documents = sum(index.raw_bytes for index in indexes), sum(index.num_documents for index in indexes)
    print(f"{len(paths)} shards indexed: {raw:,} raw bytes, {documents:,} documents")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
