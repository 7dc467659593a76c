"""Measure how long it takes to find the rows that had some documents, beside drawing the whole run again.

    python benchmarks/exposure.py 'corpus/*.jsonl.zst' --epochs 3 --lanes 8 --rows 64

A run is drawn by a loader alone, whose state is kept every 50 steps, as in training. Documents are drawn at random, and
what is found of each is compared with all batches.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards import DataConfig, Loader, LoaderState, SourceConfig
from shards.exposure.search import DocumentPlace
from shards.history import Anchor, Historian

_STATES_EVERY = 50  # steps, as in training
_ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="+", metavar="PATTERN", help="each is a source of its own")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lanes", type=int, default=8)
    parser.add_argument("--rows", type=int, default=64, help="of a global batch")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--documents", type=int, nargs="+", default=[1, 200, 2000])
    parser.add_argument("--tokenizer", type=Path, default=_ROOT / "shards/sample/tokenizer-4k.model")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sources = tuple(
            SourceConfig(name=f"s{i}", paths=(pattern,), max_epochs=arguments.epochs)
            for i, pattern in enumerate(arguments.patterns)
        )
        data = DataConfig(
            sources=sources,
            tokenizer=arguments.tokenizer,
            seq_len=arguments.seq_len,
            lanes=arguments.lanes,
            index_dir=Path(folder),
            num_workers=0,
            on_bad_record="skip",
        )
        held: dict[tuple[str, int], list[tuple[int, int, int, int]]] = defaultdict(list)
        anchors, steps = [], 0
        with Loader(data, arguments.rows) as loader:
            shards = loader.plan.shards
            begun = time.perf_counter()
            for steps, batch in enumerate(loader, 1):
                for one in batch.origins():
                    held[one.shard, one.line].append((steps, one.slot, one.start, one.stop))
                if steps % _STATES_EVERY == 0:
                    anchors.append(Anchor(steps, LoaderState.from_dict(loader.state_dict())))
            seconds = time.perf_counter() - begun
            anchors.append(Anchor(steps, LoaderState.from_dict(loader.state_dict())))
        raw = sum(shard.index.raw_bytes for listed in shards for shard in listed)
        print(f"{raw / 1e6:,.0f} MB raw, {steps:,} steps, {len(held):,} documents; drawn as a whole in {seconds:.1f} s")
        places = [
            DocumentPlace(source, number, line)
            for source, listed in enumerate(shards)
            for number, shard in enumerate(listed)
            for line in range(1, shard.index.num_records + 1)
        ]
        print("| documents | seconds | windows made | steps of one lane drawn | pieces found |")
        print("| ---: | ---: | ---: | ---: | ---: |")
        for count in arguments.documents:
            asked = random.Random(count).sample(places, min(count, len(places)))
            with Loader(data, arguments.rows) as loader:
                begun = time.perf_counter()
                historian = Historian(loader.plan, loader.pool, asked)
                history = historian.find(anchors, steps)
                seconds = time.perf_counter() - begun
            found: dict[int, list[tuple[int, int, int, int]]] = defaultdict(list)
            for one in history.appearances:
                found[one.document].append((one.step, one.slot, one.start, one.stop))
            for number, place in enumerate(asked):
                path = shards[place.source][place.shard].path
                assert sorted(found[number]) == sorted(held.get((path, place.line), [])), place
            print(
                f"| {len(asked):,} | {seconds:.2f} | {historian.pool.num_made:,} | {historian.steps_drawn:,} | "
                f"{len(history.appearances):,} |"
            )


if __name__ == "__main__":
    main()
