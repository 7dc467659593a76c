"""Measure how fast shards are indexed, and bare decoding of the same files: `python benchmarks/index.py SHARD...`.

On one core, alternating, each shard from the page cache: bare decoding by the library's own reader, and the indexing
pass with splice points verified to the next, verified at their beginning, and without. Medians of the rounds are shown.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import zstandard
from isal import igzip

from shards import formats
from shards.config import MIB
from shards.index.shard_index import build

MAX_WINDOW = 1 << 31
BUFFER = bytearray(1 << 18)


def decode(path: str) -> None:
    """Decode a file as fast as its format's library can."""
    with open(path, "rb") as file:
        compression = formats.detect(file.read(formats.MAX_HEADER_BYTES), path)
        file.seek(0)
        if compression == "gzip":
            reader = igzip.IGzipFile(fileobj=file)
        else:
            decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
            reader = decompressor.stream_reader(file, read_across_frames=True)
        while reader.readinto(BUFFER):
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", metavar="SHARD")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    print("| shard | raw GB | bare GB/s | verified | `--verify-entries off` | no splice points | splice points |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for path in arguments.shards:
        with tempfile.TemporaryDirectory() as folder:
            histories = Path(folder) / "histories"
            index = build(path, MIB, MAX_WINDOW, histories=histories)  # also brings the file into the page cache
            contenders: list[Callable[[], object]] = [
                partial(decode, path),
                partial(build, path, MIB, MAX_WINDOW, histories=histories),
                partial(build, path, MIB, MAX_WINDOW, histories=histories, verify_entries=False),
                partial(build, path, MIB, MAX_WINDOW),
            ]
            seconds: list[list[float]] = [[] for _ in contenders]
            for _ in range(arguments.rounds):
                for contender, taken in zip(contenders, seconds, strict=True):
                    begun = time.perf_counter()
                    contender()
                    taken.append(time.perf_counter() - begun)
        bare, *ours = (statistics.median(taken) for taken in seconds)
        shares = " | ".join(f"{bare / taken:.2f}" for taken in ours)
        size = index.raw_bytes / 1e9
        print(f"| {Path(path).name} | {size:.2f} | {size / bare:.2f} | {shares} | {len(index.splices)} |", flush=True)


if __name__ == "__main__":
    main()
