"""Index the shards of a run, or of one source by its patterns.

    headrace index --config configs/my-run.yaml
    headrace index 'data/pile/*.jsonl.zst'

A training start indexes missing shards itself, up to data.max_index_at_start; beyond that, run this first. It may run
as a Slurm array: with `--part i/n` a task takes every n-th shard; run it once more without --part to write the
manifests. With a config, all sources are indexed where its run will look for them, data sets too, and its remote_cache
is filled.

    headrace index --config configs/my-run.yaml --describe

then tokenizes a sample and shows how long documents are, how many tokens each source has, and what each way of packing
would cut, drop and pad.

Exit codes: 0 all shards have an index, 2 a shard is missing or damaged, 130 interrupted, 1 anything else.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty
from threading import Thread

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from pretrain.commands import data_report
from pretrain.commands.arguments import at_least
from pretrain.config_file import read_tree
from pretrain.evaluation.compare import check_can_draw
from shards import ConfigError, DataConfig, HeadraceError, ShardError, SourceConfig, document, preparation
from shards.config import DEFAULT_TEXT_KEY
from shards.description import describe
from shards.index import manifest
from shards.index.shard_index import ShardIndex, obtain
from shards.index.splice_points import explain
from shards.processes import end_with_parent
from shards.storage import files
from shards.storage.block_cache import open_cache

_INTERRUPTED = 128 + signal.SIGINT  # as in shells
_REPORT_BYTES = 4 << 20
# What decoding can start at, by format
_STARTS = {"zstd": "frames", "gzip": "members", "xz": "streams", "bzip2": "streams", "parquet": "row groups"}
_REFRESH_SECONDS = 0.2

Report = tuple[str, int | ShardIndex | HeadraceError]


def part(text: str) -> tuple[int, int]:
    """Parse I/N into (I, N). Raises argparse.ArgumentTypeError if it is malformed."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1, such as 0/100 to 99/100")
    return int(number), int(count)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "patterns", nargs="*", metavar="PATTERN", help="shards or globs, as in paths; with --config: key.path=value"
    )
    parser.add_argument("--config", type=Path, help="of a run: index all its sources")
    parser.add_argument(
        "--index-dir", type=Path, help="where to put indexes; default: beside the shards (data.index_dir)"
    )
    parser.add_argument("--verify", action="store_true", help="hash shards even if size and modification time agree")
    parser.add_argument(
        "--verify-entries",
        choices=("on", "off"),
        default="on",
        help="decode from each splice point to the next and compare; off: only for a history's length, 1 MiB at least",
    )
    parser.add_argument("--cat", metavar="SHARD", help="print one document of a shard and exit; needs --document")
    parser.add_argument(
        "--document", type=at_least(1), metavar="N", help="its line in the unpacked shard, counted from 1"
    )
    parser.add_argument("--show", action="store_true", help="print each index")
    parser.add_argument(
        "--workers", type=at_least(1), default=os.cpu_count(), help="number of shards to index at a time"
    )
    parser.add_argument(
        "--part", type=part, metavar="I/N", help="only every N-th shard, from the I-th on, counted from 0"
    )
    parser.add_argument("--cell-bytes", type=int, help="only needed for a run that sets data.window_bytes below 1 MiB")
    parser.add_argument(
        "--text-key", default=DEFAULT_TEXT_KEY, metavar="COLUMN", help="column of Parquet files (text_key)"
    )
    parser.add_argument("--max-decoder-window", type=int, help="bytes (data.max_decoder_window)")
    parser.add_argument("--describe", action="store_true", help="say what the run's data is like; needs --config")
    parser.add_argument(
        "--describe-bytes", type=float, default=64e6, metavar="N", help="raw bytes to tokenize for it; default 64e6"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="with --describe: draw the documents' lengths")


def check_arguments(arguments: argparse.Namespace) -> None:
    """Reject arguments that contradict each other. Raises ConfigError."""
    if (arguments.cat is None) != (arguments.document is None):
        raise ConfigError("--cat and --document belong together")
    if not arguments.config and not arguments.patterns and not arguments.cat:
        raise ConfigError("name shards, or a run's config with --config")
    if arguments.describe and (not arguments.config or arguments.part):
        raise ConfigError("--describe needs --config, which says the tokenizer and seq_len, and all shards: no --part")
    if arguments.png:
        if not arguments.describe:
            raise ConfigError("--png draws what --describe shows: give both")
        check_can_draw()
    if arguments.config and (arguments.index_dir or arguments.cell_bytes or arguments.max_decoder_window):
        raise ConfigError("with --config set data.index_dir=..., data.window_bytes=..., data.max_decoder_window=...")


def data_config(arguments: argparse.Namespace) -> DataConfig:
    """Return the sources to index, and the settings for it. Raises ConfigError if there are none."""
    if arguments.config:
        tree, _ = read_tree(arguments.config, arguments.patterns)
        return DataConfig.parse(tree.get("data") or {}, "data")
    given = {
        "window_bytes": arguments.cell_bytes,
        "index_dir": arguments.index_dir,
        "max_decoder_window": arguments.max_decoder_window,
    }
    return DataConfig(
        sources=(SourceConfig(name="PATTERN", paths=tuple(arguments.patterns), text_key=arguments.text_key),),
        tokenizer=Path(),  # an index depends neither on it nor on seq_len
        seq_len=1,
        **{key: value for key, value in given.items() if value is not None},
    )


def work(
    tasks: Queue[str | None], reports: Queue[Report], data: DataConfig, verify: bool, verify_entries: bool
) -> None:
    """Index the shards from `tasks` until it yields None; a worker process runs it.

    It reports (shard, compressed bytes read since the last report) and finally (shard, its index or the error).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command's process handles it and ends this one
    Thread(target=end_with_parent, daemon=True).start()
    cache = open_cache(data.remote_cache)
    unreported = 0

    def report(path: str, size: int) -> None:
        nonlocal unreported
        unreported += size
        if unreported >= _REPORT_BYTES:
            reports.put((path, unreported))
            unreported = 0

    while (path := tasks.get()) is not None:
        try:
            limits = (data.cell_bytes, data.max_decoder_window)
            reports.put((path, obtain(path, data.index_dir, *limits, verify, report, cache, verify_entries)))
        except HeadraceError as error:
            reports.put((path, error))


def index_shards(
    data: DataConfig, paths: list[str], workers: int, verify: bool, verify_entries: bool
) -> list[ShardIndex]:
    """Index shards, several at a time, under a progress bar; return the indexes in the order of `paths`.

    Raises:
        ShardError: naming every missing or damaged shard, once all others are indexed.
        HeadraceError: if a worker dies.
    """
    found: dict[str, ShardIndex | HeadraceError] = {}
    sizes: dict[str, int] = {}  # bytes of each shard that exists
    for path in paths:
        try:
            sizes[path] = files.stat(path).size
        except ShardError as error:
            found[path] = error
    read = dict.fromkeys(sizes, 0)
    lost: list[int] = []  # exit statuses of workers
    # Processes, not threads: finding lines holds the interpreter lock for a third of the time.
    spawn = get_context("spawn")
    tasks: Queue[str | None] = spawn.Queue()
    reports: Queue[Report] = spawn.Queue()
    tasks.cancel_join_thread()  # tasks that no worker takes must not keep this process alive
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
                path, found_or_size = reports.get(timeout=_REFRESH_SECONDS)
            except Empty:
                lost = [process.exitcode for process in processes if process.exitcode]
                if lost:
                    break
                continue
            if isinstance(found_or_size, int):
                size = found_or_size
            else:
                found[path], size = found_or_size, sizes[path] - read[path]
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
    return [index for path in paths if isinstance(index := found[path], ShardIndex)]


def show(path: str, index: ShardIndex) -> None:
    """Print the index of a shard."""
    print(path)
    print(
        f"  {index.compression}, {index.stat.size:,} bytes, {index.raw_bytes:,} raw, content hash {index.content_hash}"
    )
    print(f"  {index.num_documents:,} documents in {index.num_records:,} lines")
    if index.compression in _STARTS:
        print(f"  {_STARTS[index.compression]}: {index.num_frames:,}")
    if index.compression in ("zstd", "gzip"):
        print(
            "  splice points: "
            + explain(index.stat.size, index.raw_bytes, index.decoder_window, index.splices, index.splice_counts)
        )


def run(arguments: argparse.Namespace) -> int:
    """Index the shards, or print a document; return the exit code. Raises HeadraceError if that fails."""
    check_arguments(arguments)
    try:
        if arguments.cat:
            (shard,) = files.with_columns([arguments.cat], arguments.text_key)
            print(document(shard, arguments.document, index_dir=arguments.index_dir).text)
        else:
            index_sources(arguments)
    except KeyboardInterrupt:
        print("interrupted; indexes made so far are kept, and the same command makes the rest", file=sys.stderr)
        return _INTERRUPTED
    return 0


def index_sources(arguments: argparse.Namespace) -> None:
    """Index the given shards, and write the manifest of each source unless only a part is indexed."""
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
    if arguments.show:
        for path, index in zip(paths, indexes, strict=True):
            show(path, index)
    raw, documents = sum(index.raw_bytes for index in indexes), sum(index.num_documents for index in indexes)
    print(f"{len(paths)} shards indexed: {raw:,} raw bytes, {documents:,} documents")
    if arguments.describe:
        found = describe(data, int(arguments.describe_bytes))
        data_report.print_report(Console(), found, data.seq_len)
        if arguments.png:
            data_report.draw(found, data.seq_len, arguments.png)
            print(f"Picture  {arguments.png}")
