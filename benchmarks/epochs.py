"""Measure what an epoch reads and whether the mix asked for is met: `python benchmarks/epochs.py --work work`.

Corpora of these sizes are made from the bundled sample, and measured from the lanes' rows, without training:

    share of the tokens that one pass reads, and its steps against the ideal number, at several numbers of lanes
    shares of the rows that sources of unlike weights and sizes get, against those that were asked for
    seconds per batch while many sources run out

Tables are printed as Markdown. --plan-version 1 measures the older rules; a pass still ends only when all of their
lanes are empty, so the share that it would have read up to the first empty one is also shown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards import DataConfig, Loader, read_documents
from shards.plan.mixing import mix_of

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "shards/sample"
SEQ_LEN = 2048
LANES = 960
PLANNED = {"2.2e12 : 1e6": (2.2e12, 1e6), "100 sources of 1e-6": (1 - 1e-4, *(1e-6,) * 100)}
LIMITED = {"6 documents, read 1,000 times": 1000, "6 documents, read once": 1}  # the second source, with weight 0.3


def varied(size: int) -> Iterator[str]:
    """Yield the sample's texts repeatedly, cut and marked differently each time, up to `size` bytes."""
    shards = [path for path in sorted((SAMPLE / "train").glob("*")) if path.suffix in (".zst", ".gz")]
    texts = [document.text for path in shards for document in read_documents(path)]
    turn = 0
    while size > 0:
        for number, text in enumerate(texts):
            start = (turn * 131 + number) % (len(text) // 2 + 1) if turn else 0
            line = f"{turn}.{number} {text[start:]}"
            yield line
            size -= len(line.encode())
            if size <= 0:
                return
        turn += 1


def corpus(path: Path, size: int) -> Path:
    """Write a plain shard of about `size` raw bytes, if it is missing."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in varied(size)))
    return path


def config(work: Path, sources: list[dict[str, object]], version: int, lanes: int | None) -> DataConfig:
    said = {"seq_len": SEQ_LEN, "tokenizer": SAMPLE / "tokenizer-4k.model", "index_dir": work / "index", "lanes": lanes}
    return DataConfig.model_validate(said | {"sources": sources, "plan_version": version, "num_workers": 1})


def one_pass(data: DataConfig, rows: int) -> dict[str, float]:
    """Read the data to its end and measure it."""
    tokens, padding = [], 0
    begun = time.perf_counter()
    with Loader(data, rows) as loader:
        lanes = loader.num_lanes
        foretold = loader.forecast(None).last_step
        first_empty = None
        for batch in loader:
            if first_empty is None and batch.num_rows < rows:
                first_empty = len(tokens)
            tokens.append(sum(batch.source_tokens.values()))
            padding += batch.padding_tokens
    ideal = sum(tokens) / (rows * (SEQ_LEN + 1))
    return {
        "lanes": lanes,
        "until the first lane is empty, % of tokens": 100 * sum(tokens[:first_empty]) / sum(tokens),
        "read in all, % of tokens": 100.0,
        "steps": len(tokens),
        "foretold": foretold or 0,
        "ideal steps": ideal,
        "seconds": time.perf_counter() - begun,
    }


def passes(work: Path, sizes: list[int], lanes: list[int], version: int) -> None:
    print(
        "| corpus, MB | lanes | read until a lane is empty, % | read in all, % | steps | foretold | ideal | seconds |"
    )
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for size in sizes:
        path = corpus(work / f"{size}.jsonl", size * 10**6)
        for number in lanes:
            rows = max(number, 32)
            source = {"name": "a", "paths": [str(path)], "max_epochs": 1}
            found = one_pass(config(work, [source], version, number or None), rows)
            figures = list(found.values())
            shown = f"{figures[0]}{'' if number else ' (default)'} | {figures[1]:.1f} | {figures[2]:.0f}"
            print(
                f"| {size} | {shown} | {figures[3]} | {figures[4]} | {figures[5]:.1f} | {figures[6]:.0f} |", flush=True
            )


def planned_mixes(rows: int, version: int) -> None:
    """Compare mixes without a limit, which follow from the plan's rule alone: no shard is read."""
    print("| weights | lanes | others than the first: wished, % | met, % |")
    print("| --- | ---: | ---: | ---: |")
    for name, weights in PLANNED.items():
        mix = mix_of(weights, version)
        assert mix is not None
        first = sum(mix.drawn(lane, 0, rows) for lane in range(LANES))
        met, wished = 1 - first / (LANES * rows), sum(weights[1:]) / sum(weights)
        print(f"| {name} | {LANES} | {100 * wished:.4g} | {100 * met:.4g} |")


def limited_mixes(work: Path, steps: int, version: int) -> None:
    """Compare the mix of a large source and one of six documents, on 64 lanes."""
    print(f"| second source | lanes | wished, % | met in {steps} steps, % | foretold, % |")
    print("| --- | ---: | ---: | ---: | ---: |")
    large, small = corpus(work / "mix-large.jsonl", 4_000_000), work / "mix-small.jsonl"
    small.write_text("".join(json.dumps({"text": "word " * 1000}) + "\n" for _ in range(6)))
    for name, epochs in LIMITED.items():
        sources: list[dict[str, object]] = [
            {"name": "large", "paths": [str(large)], "weight": 0.7},
            {"name": "small", "paths": [str(small)], "weight": 0.3, "max_epochs": epochs},
        ]
        data = config(work, sources, version, 64)
        drawn: Counter[str] = Counter()
        with Loader(data, 64) as loader:
            foretold = loader.forecast(steps).shortfalls
            for _ in range(steps):
                drawn.update({origin.slot: origin.source for origin in next(loader).origins()}.values())
        said = f"{100 * foretold[0].met:.4g}" if foretold else "as wished"
        print(f"| {name} | 64 | 30 | {100 * drawn['small'] / drawn.total():.4g} | {said} |", flush=True)


def running_out(work: Path, version: int) -> None:
    """Time the batches of thirteen sources on 256 lanes, each of which runs out at another time on another lane."""
    sources: list[dict[str, object]] = []
    for number in range(13):
        path = corpus(work / f"out-{number}.jsonl", (number + 2) * 300_000)
        sources.append({"name": f"s{number}", "paths": [str(path)], "weight": 1.0, "max_epochs": 1})
    data = config(work, sources, version, 256).model_copy(update={"seq_len": 64})
    seconds = []
    with Loader(data, 256) as loader:
        begun = time.perf_counter()
        for _ in loader:
            seconds.append(time.perf_counter() - begun)
            begun = time.perf_counter()
    half = seconds[1:]
    print(f"13 sources run out on 256 lanes: {len(seconds)} batches, the first after {seconds[0]:.2f} s, then median")
    print(f"{statistics.median(half):.3f} s, the slowest {max(half):.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder for the corpora")
    parser.add_argument("--sizes", type=int, nargs="*", default=[10, 100, 1000], metavar="MB")
    parser.add_argument("--lanes", type=int, nargs="*", default=[0, 1, 8, 32, 96, 960], help="0 = the default number")
    parser.add_argument("--mix-steps", type=int, default=100, help="batches of a mix; 0 = no mixes")
    parser.add_argument("--plan-version", type=int, default=2)
    arguments = parser.parse_args()
    passes(arguments.work, arguments.sizes, arguments.lanes, arguments.plan_version)
    if arguments.mix_steps:
        planned_mixes(100_000, arguments.plan_version)
        limited_mixes(arguments.work, arguments.mix_steps, arguments.plan_version)
        running_out(arguments.work, arguments.plan_version)


if __name__ == "__main__":
    main()
