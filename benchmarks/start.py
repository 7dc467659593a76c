"""Measure how long the loader takes to start on many indexed shards: `python benchmarks/start.py --shards 10000`.

The shards are hard links to one, each with an index of its own and some splice points, as large shards have. `first
rank` examines every shard and finds its manifest valid; `other ranks` read only the manifest; both up to the point
where the first window could be made.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import msgspec
import zstandard

from shards import DataConfig, Loader, prepare, read_documents
from shards.index import splice_points
from shards.preparation import Prepared, index_status

SAMPLE = Path(__file__).resolve().parents[1] / "shards/sample"
RAW_BYTES = 1 << 18  # per shard
BLOCK_BYTES = 1 << 13
BATCH = 256


def make(folder: Path, num_shards: int) -> DataConfig:
    """Write the shards; return a config with cells so small that each shard has sixteen, as one of 16 MiB would."""
    splice_points.MIN_GAP_BYTES, splice_points.HISTORIES_PER_GAP, splice_points.TRIAL_BYTES = 0, 0, BLOCK_BYTES
    splice_points.SHARE = splice_points.SMALL_SHARE = 1.0
    parameters = zstandard.ZstdCompressionParameters(window_log=15, write_content_size=False)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    raw, packed = bytearray(), bytearray()
    for document in read_documents(SAMPLE / "train/pile-00.jsonl.zst"):
        raw += msgspec.json.encode({"text": document.text}) + b"\n"
        if len(raw) >= RAW_BYTES:
            break
    for at in range(0, len(raw), BLOCK_BYTES):
        packed += stream.compress(bytes(raw[at : at + BLOCK_BYTES])) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    first = folder / "00000.jsonl.zst"
    first.write_bytes(packed + stream.flush())
    for i in range(1, num_shards):
        os.link(first, folder / f"{i:05}.jsonl.zst")
    source = {"name": "a", "paths": [str(folder / "*.zst")]}
    return DataConfig.model_validate(
        {
            "sources": [source],
            "tokenizer": SAMPLE / "tokenizer-4k.model",
            "seq_len": 2048,
            "window_bytes": RAW_BYTES // 16,
            "index_dir": folder / "indexes",
            "num_workers": 0,
        }
    )


def start(data: DataConfig, prepared: Prepared) -> float:
    """Measure the seconds until a rank's loader exists."""
    begin = time.perf_counter()
    with Loader(data, BATCH, seed=1, prepared=prepared):
        return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=10_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        data = make(Path(name), arguments.shards)
        begin = time.perf_counter()
        prepare(data)
        print(f"{arguments.shards:,} shards indexed in {time.perf_counter() - begin:.1f} s")
        begin = time.perf_counter()
        prepared = prepare(data)
        looked = time.perf_counter() - begin
        size = os.path.getsize(prepared[0].path)
        points = len(index_status(data, data.sources[0]).indexed[f"{name}/00000.jsonl.zst"].splices)
        first = looked + start(data, prepared)
        others = [start(data, prepared) for _ in range(5)]
    print(f"first rank {first:.2f} s, of that {looked:.2f} s to look at the shards")
    print(f"other ranks {statistics.median(others):.2f} s, one manifest of {size / 1e6:.1f} MB")
    print(f"{points} splice points a shard")


if __name__ == "__main__":
    main()
