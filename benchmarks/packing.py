"""Measure what each packing policy does to a corpus.

    python benchmarks/packing.py 'data/*.jsonl.zst' --tokenizer t.model

Prints a table in Markdown: rows, padding share, documents cut although they would have fitted a row, tokens dropped;
and draws it with --plot. Documents are tokenized once and packed window by window, as in the loader.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import numpy.typing as npt

from shards import DataConfig, OverflowTolerance, Tokenizer, preparation
from shards.config import Packing
from shards.plan.segments import WindowId
from shards.source import Source
from shards.windows.packing import pack
from shards.windows.recipe import Tools
from shards.windows.window import WindowMaker

Tokenized = tuple[npt.NDArray[np.integer], npt.NDArray[np.int64], int]  # tokens, lengths, key


def tokenized_windows(config: DataConfig) -> Iterator[Tokenized]:
    """Yield all windows of one epoch of the first source."""
    source = Source(config, 0, preparation.source_shards(config, config.sources[0]), lanes=1, seed=0)
    maker = WindowMaker([config], Tools(Tokenizer.of(config)))
    segment = 0
    while segment < source.plan.num_segments:
        deal = source.deal(0, segment)
        for window in range(len(deal.windows)):
            task = source.task(WindowId(0, 0, segment, window))
            found = maker.documents(task)
            yield found.tokens, found.lengths, task.key
        segment = deal.next


def measure(windows: list[Tokenized], seq_len: int, packing: Packing) -> dict[str, float]:
    """Measure one policy."""
    rows = padding = cut = dropped = documents = 0
    for tokens, lengths, key in windows:
        packed = pack(tokens, lengths, seq_len, packing, key)
        pieces = np.bincount(packed.documents, minlength=len(lengths))
        rows += packed.num_rows
        padding += packed.num_rows * (seq_len + 1) - int(packed.lengths.sum())
        cut += int(((pieces > 1) & (lengths <= seq_len + 1)).sum())
        # A piece after a document's first repeats one token.
        dropped += int(lengths.sum() - packed.lengths.sum() + (packed.starts > 0).sum())
        if packing == "concat":
            dropped = 0  # here rows, not pieces, repeat a token; none is ever dropped
        documents += len(lengths)
    total = sum(int(lengths.sum()) for _, lengths, _ in windows)
    return {
        "rows": rows,
        "padding %": 100 * padding / (rows * (seq_len + 1)),
        "cut though fitting %": 100 * cut / documents,
        "dropped tokens %": 100 * dropped / total,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--index-dir", type=Path)
    parser.add_argument("--plot", type=Path, help="PNG to write")
    arguments = parser.parse_args()
    config = DataConfig.model_validate(
        {
            "seq_len": arguments.seq_len,
            "tokenizer": arguments.tokenizer,
            "index_dir": arguments.index_dir,
            "sources": [{"name": "corpus", "paths": arguments.paths}],
        }
    )
    windows = list(tokenized_windows(config))
    policies: dict[str, Packing] = {name: name for name in ("best_fit", "concat", "truncate", "pad")}  # type: ignore[misc]
    policies |= {f"overflow_tolerance: {n}": OverflowTolerance(overflow_tolerance=n) for n in (16, 256)}
    figures = {name: measure(windows, config.seq_len, packing) for name, packing in policies.items()}
    columns = list(next(iter(figures.values())))
    print(f"| packing | {' | '.join(columns)} |\n| --- {'| ---: ' * len(columns)}|")
    for name, values in figures.items():
        print(
            f"| {name} | {values['rows']:,} | " + " | ".join(f"{values[column]:.3f}" for column in columns[1:]) + " |"
        )
    if arguments.plot:
        plot(figures, arguments.plot)


def plot(figures: dict[str, dict[str, float]], path: Path) -> None:
    """Draw bars of the padding share of rows and the dropped share of the corpus."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), sharey=True, layout="constrained")
    for axis, column in zip(axes, ("padding %", "dropped tokens %"), strict=True):
        bars = axis.barh(list(figures), [values[column] for values in figures.values()])
        axis.bar_label(bars, fmt="%.2f", padding=3)
        axis.set_xlabel(column)
        axis.margins(x=0.15)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
