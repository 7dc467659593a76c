"""Measure the cost of decontamination to the loader: tokens/s with and without it, alternating, on the same shards.

    python benchmarks/decontamination.py 'shards/sample/train/*' --suite shards/sample/eval \
        --tokenizer shards/sample/tokenizer-4k.model

Windows are made in this process, so the rate is that of one worker.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards import DataConfig, Loader


def rate(config: DataConfig, batches: int) -> tuple[float, int]:
    """Measure the first batches: (tokens per second, documents dropped)."""
    tokens = dropped = 0
    with Loader(config, 64) as loader:
        begin = time.perf_counter()
        for _, batch in zip(range(batches), loader, strict=False):
            tokens += sum(batch.source_tokens.values())
            dropped += len(batch.contaminated)
        seconds = time.perf_counter() - begin
    return tokens / seconds, dropped


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="+", metavar="PATTERN", help="shards or globs to train on")
    parser.add_argument("--suite", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--match", choices=("paragraph", "ngram"), default="paragraph")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batches", type=int, default=40, help="batches of 64 rows")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions, of which medians are shown")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plain = DataConfig.parse(
            {
                "sources": [{"name": "all", "paths": arguments.patterns}],
                "tokenizer": arguments.tokenizer,
                "seq_len": arguments.seq_len,
                "num_workers": 0,
                "lanes": 8,
                "index_dir": Path(folder),
            }
        )
        filtered = DataConfig.parse(
            plain.model_dump() | {"decontaminate": {"suite": arguments.suite, "match": arguments.match}}
        )
        rate(filtered, 1)  # makes the indexes and the filter
        rates: dict[str, list[float]] = {"plain": [], "filtered": []}
        dropped = 0
        for _ in range(arguments.repeats):
            rates["plain"].append(rate(plain, arguments.batches)[0])
            found, dropped = rate(filtered, arguments.batches)
            rates["filtered"].append(found)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    result = {name: f"{median / 1e6:.3f}M tokens/s" for name, median in medians.items()}
    print(json.dumps(result | {"cost": f"{1 - medians['filtered'] / medians['plain']:.1%}", "dropped": dropped}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
