"""Compare Headrace's entries inside a gzip member with two libraries': `python benchmarks/gzip_entries.py SHARD.gz`.

On one core, from the page cache: seconds to make the index (Headrace's pass also hashes, and finds lines), its size,
and seconds from opening the file with it to the first MiB at 95 % of the raw bytes. Medians of the rounds are shown.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import indexed_gzip
import rapidgzip

from shards import open_at
from shards.config import MIB
from shards.index.shard_index import obtain
from shards.index.splice_points import SPACING_BYTES

MAX_WINDOW = 128 * MIB


class Headrace:
    name = "Headrace, entries verified"
    verify = True

    def make(self, shard: str, folder: Path) -> None:
        obtain(shard, folder, MIB, MAX_WINDOW, verify_entries=self.verify)

    def read(self, shard: str, folder: Path, at: int) -> bytes:
        with open_at(shard, at, index_dir=folder) as file:
            return file.read(MIB)


class Unverified(Headrace):
    name = "Headrace, `--verify-entries off`"
    verify = False


class IndexedGzip:
    name = "indexed_gzip"

    def make(self, shard: str, folder: Path) -> None:
        with indexed_gzip.IndexedGzipFile(shard, spacing=SPACING_BYTES) as file:
            file.build_full_index()
            file.export_index(str(folder / "index"))

    def read(self, shard: str, folder: Path, at: int) -> bytes:
        with indexed_gzip.IndexedGzipFile(shard, index_file=str(folder / "index")) as file:
            file.seek(at)
            return file.read(MIB)


class Rapidgzip:
    name = "rapidgzip"

    def make(self, shard: str, folder: Path) -> None:
        with rapidgzip.open(shard, parallelization=1) as file:
            file.block_offsets()
            file.export_index(str(folder / "index"))

    def read(self, shard: str, folder: Path, at: int) -> bytes:
        with rapidgzip.open(shard, parallelization=1) as file:
            file.import_index(str(folder / "index"))
            file.seek(at)
            return file.read(MIB)


CONTENDERS = (Headrace, Unverified, IndexedGzip, Rapidgzip)


Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


def timed(
    work: Callable[Arguments, Result], *arguments: Arguments.args, **options: Arguments.kwargs
) -> tuple[float, Result]:
    begun = time.perf_counter()
    result = work(*arguments, **options)
    return time.perf_counter() - begun, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shard", metavar="SHARD", help="one gzip member")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as name, open_at(arguments.shard, index_dir=Path(name)) as file:
        at = file.seek(0, os.SEEK_END) * 95 // 100
    made: dict[str, list[float]] = {contender.name: [] for contender in CONTENDERS}
    read: dict[str, list[float]] = {contender.name: [] for contender in CONTENDERS}
    sizes: dict[str, int] = {}
    for _ in range(arguments.rounds):
        texts = set()
        for contender in (kind() for kind in CONTENDERS):
            with tempfile.TemporaryDirectory() as name:
                taken, _ = timed(contender.make, arguments.shard, Path(name))
                made[contender.name].append(taken)
                sizes[contender.name] = sum(file.stat().st_size for file in Path(name).iterdir())
                taken, text = timed(contender.read, arguments.shard, Path(name), at)
                read[contender.name].append(taken)
                texts.add(text)
        assert len(texts) == 1
    print("| | index made, s | its size, kB | first MiB at 95 %, s |\n| --- | --- | --- | --- |")
    for name in made:
        figures = (statistics.median(made[name]), sizes[name] / 1e3, statistics.median(read[name]))
        print("| {} | {:.2f} | {:,.0f} | {:.3f} |".format(name, *figures))


if __name__ == "__main__":
    main()
