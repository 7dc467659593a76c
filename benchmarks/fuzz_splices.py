"""Read from thousands of splice points of random zstd and gzip files and compare with what was compressed.

    python benchmarks/fuzz_splices.py 'corpus/*.jsonl.zst' --entries 20000 --encoder OLD/zstandard-0.19 --encoder zstd

Each file has another encoder, level, window, number of threads, long mode, checksum, blocks and text. Entries are
placed as close together as possible, whatever the cost, half of them verified to the next entry when they are made and
half only at their beginning. A decoder of its own reads from each to the next, and a little beyond.
"""

from __future__ import annotations

import argparse
import base64
import glob
import itertools
import logging
import os
import random
import subprocess
import sys
import tempfile
import zlib
from collections import Counter, defaultdict
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import zstandard

from shards import formats
from shards.index import paths, splice_points
from shards.index.decoders import Decoders
from shards.index.shard_index import build

MAX_WINDOW = 1 << 27
CELL_BYTES = 1 << 15
BEYOND_BYTES = 200_000  # read past the next entry
LEVELS = (1, 1, 1, 3, 3, 3, 3, 9, 9, 9, 19)  # level 19 takes as long as all others together
WINDOW_LOGS = (17, 17, 17, 18, 18, 19, 20, 21, 22, 24, 27)  # a window must end before the next entry is tried
COLUMNS = ("files", "entries", "looked at", "qualified", "failed", "fell back", "wrong")
ENCODE = """
import sys, zstandard
level, window_log, long, threads, checksum, block_bytes = map(int, sys.argv[1:])
chosen = zstandard.ZstdCompressionParameters.from_level(level, window_log=window_log, enable_ldm=bool(long),
    threads=threads, write_checksum=bool(checksum), write_content_size=False)
stream = zstandard.ZstdCompressor(compression_params=chosen).compressobj()
raw = sys.stdin.buffer.read()
for i in range(0, len(raw), block_bytes or len(raw)):
    sys.stdout.buffer.write(stream.compress(raw[i : i + (block_bytes or len(raw))]))
    if block_bytes:
        sys.stdout.buffer.write(stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
sys.stdout.buffer.write(stream.flush())
"""


def compress(raw: bytes, encoder: str, level: int, draw: random.Random) -> bytes:
    """Compress `raw` into one frame, by a zstandard package in a folder or a program; other options are drawn."""
    if encoder == "gzip":
        packer = zlib.compressobj(min(level, 9), zlib.DEFLATED, 31, draw.randint(1, 9))
        return packer.compress(raw) + packer.flush()
    window_log, long, threads, checksum = (
        draw.choice(WINDOW_LOGS),
        draw.random() < 0.3,
        draw.choice([0, 0, 2]),
        draw.random() < 0.5,
    )
    block_bytes = draw.choice([0, 0, draw.randint(3_000, 90_000)])
    command = [sys.executable, "-c", ENCODE]
    command += map(str, (level, window_log, int(long), threads, int(checksum), block_bytes))
    if encoder == "zstd":
        command = ["zstd", f"-{level}", "-c", f"-T{threads or 1}", "--check" if checksum else "--no-check"]
        command += [f"--long={window_log}"] if long else [f"--zstd=wlog={window_log}"]
    environment = os.environ | ({"PYTHONPATH": encoder} if encoder != "here" else {})
    return subprocess.run(command, input=raw, stdout=subprocess.PIPE, check=True, env=environment).stdout


def text(corpus: list[bytes], size: int, draw: random.Random) -> bytes:
    """Draw raw bytes of one of several kinds."""
    whole = draw.choice(corpus)
    start = draw.randrange(max(1, len(whole) - size))
    real = (whole[start:] + whole)[:size]
    kind = draw.choice(["real"] * 8 + ["mixed"] * 3 + ["noise", "base64", "repeats"])
    if kind == "noise":
        return draw.randbytes(size)
    if kind == "base64":
        return base64.b64encode(draw.randbytes(size))[:size]
    if kind == "repeats":
        period = draw.randint(1, 40_000)
        return b"".join(real[:period] + b"%d" % i for i in range(size // period + 1))[:size]
    if kind == "mixed":
        parts = [
            real[i : i + 60_000] if draw.random() < 0.7 else draw.randbytes(60_000) for i in range(0, size, 60_000)
        ]
        return b"".join(parts)
    return real


def check(folder: Path, data: bytes, raw: bytes, verify: bool) -> Counter[str]:
    """Index a file, read from each of its entries, and count the results."""
    path = folder / "a.jsonl.zst"
    path.write_bytes(data)
    histories = paths.history_path(paths.index_path(str(path), None))
    index = build(str(path), CELL_BYTES, MAX_WINDOW, histories=histories, verify_entries=verify)
    assert index.raw_bytes == len(raw)
    counts = Counter({"files": 1, "entries": len(index.splices), "looked at": index.splice_counts.looked_at})
    counts += Counter({"qualified": index.splice_counts.qualified, "failed": index.splice_counts.failed})
    bounds = [*(found.raw_offset for found in index.splices), len(raw)]
    for found, end in zip(index.splices, bounds[1:], strict=True):
        decoders = Decoders(MAX_WINDOW)
        cells = index.table()[:, 1]
        stops = [int(stop) for stop in cells if found.raw_offset < stop <= end + BEYOND_BYTES]
        for start, stop in itertools.pairwise([found.raw_offset, *stops]):
            counts["wrong"] += decoders.read(index.raw_range(str(path), start, stop)) != raw[start:stop]
        counts["fell back"] += decoders.replays
        decoders.close()
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="+", metavar="SHARD", help="real text; shards or globs")
    parser.add_argument("--entries", type=int, default=20_000, help="number of entries to read from")
    parser.add_argument("--encoder", action="append", default=[], help="folder of another zstandard package, or `zstd`")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.getLogger("shards").setLevel(logging.ERROR)
    splice_points.TRIAL_BYTES, splice_points.HISTORIES_PER_GAP = 1 << 16, 0
    splice_points.SHARE = splice_points.SMALL_SHARE = 1e9
    corpus = []
    for path in sorted(path for pattern in arguments.patterns for path in glob.glob(pattern)):
        with open(path, "rb") as file:
            corpus.append(b"".join(formats.decode(file, "zstd", path, MAX_WINDOW)))
    encoders = ["here", "gzip", *arguments.encoder]
    totals: dict[str, Counter[str]] = defaultdict(Counter)
    with tempfile.TemporaryDirectory() as folder:
        for number in itertools.count():
            draw = random.Random(f"{arguments.seed} {number}")
            encoder, level, verify = draw.choice(encoders), draw.choice(LEVELS), draw.random() < 0.5
            splice_points.MIN_GAP_BYTES = splice_points.SPACING_BYTES = draw.choice((1 << 14, 1 << 16, 1 << 20))
            raw = text(corpus, draw.randint(500_000, 2_000_000 if level == 19 else 6_000_000), draw)
            counts = check(Path(folder), compress(raw, encoder, level, draw), raw, verify)
            name = {"here": zstandard.__version__}.get(encoder, Path(encoder).name)
            for group in ("all", f"level {level}", f"encoder {name}", "verified" if verify else "not verified"):
                totals[group] += counts
            if number % 50 == 0 or totals["all"]["entries"] >= arguments.entries:
                print("| files of | " + " | ".join(COLUMNS) + " |")
                for group, found in sorted(totals.items()):
                    print(f"| {group} | " + " | ".join(f"{found[column]:,}" for column in COLUMNS) + " |", flush=True)
            if counts["wrong"]:
                print(f"WRONG: seed {arguments.seed}, file {number}")
                return 1
            if totals["all"]["entries"] >= arguments.entries:
                return 0
    raise AssertionError


if __name__ == "__main__":
    raise SystemExit(main())
