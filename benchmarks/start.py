"""How long the loader takes to start on many shards that are indexed: `python benchmarks/start.py --shards 10000`.

The shards are hard links of one, each indexed by itself. `first rank` looks at every shard and finds its manifest true;
`other ranks` read the manifest alone; both up to the point where the first window could be made.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import zstandard

from shards import DataConfig, Loader, prepare, read_documents
from shards.manifest import Prepared

SAMPLE = Path(__file__).resolve().parents[1] / "shards/sample"
RAW_BYTES = 1 << 18  # per shard
BATCH = 256


def make(folder: Path, num_shards: int) -> DataConfig:
    """Writes the shards; a config with cells small enough that each shard has sixteen, as one of 16 MiB would."""
    raw = bytearray()
    for document in read_documents(SAMPLE / "train/pile-00.jsonl.zst"):
        raw += b'{"text": "' + b"x" * len(document.text) + b'"}\n'
        if len(raw) >= RAW_BYTES:
            break
    first = folder / "00000.jsonl.zst"
    first.write_bytes(zstandard.compress(bytes(raw)))
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


def start(data: DataConfig, prepared: tuple[Prepared, ...]) -> float:
    """Seconds until a rank's loader is there."""
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
        first = looked + start(data, prepared)
        others = [start(data, prepared) for _ in range(5)]
    print(f"first rank {first:.2f} s, of that {looked:.2f} s to look at the shards")
    print(f"other ranks {min(others):.2f} s, one manifest of {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
