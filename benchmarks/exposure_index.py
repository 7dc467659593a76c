"""Measure text indexes: size and time per GB, and how long it takes to find excerpts.

    python benchmarks/exposure_index.py 'corpus/*.jsonl.zst' 'corpus/*.json.gz' --workers 1

Shards are indexed for the loader first, outside the time. Excerpts are runs of words at random places of random
documents, cut without regard to lines; each must be found in its document.
"""

from __future__ import annotations

import argparse
import random
import re
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards import DataConfig, SourceConfig, preparation, read_documents
from shards.exposure.grams import MIN_WORDS, words_of
from shards.exposure.passes import make_all
from shards.exposure.search import DocumentPlace, TextSearch
from shards.index.manifest import Shard
from shards.suites.decontaminate import split_lines
from shards.suites.normalization import comparable

_TRIED_PER_EXCERPT = 20  # documents, since many are too short
_LINE_ENTRY_BYTES = 8  # as an entry of the text index


def excerpts(shards: list[Shard], count: int, num_words: int) -> list[tuple[DocumentPlace, str]]:
    """Draw excerpts of at least some words from random documents, each with the place of its document."""
    chance = random.Random(1)
    drawn: list[tuple[DocumentPlace, str]] = []
    tried = _TRIED_PER_EXCERPT * count / sum(shard.index.num_documents for shard in shards)
    for number, shard in enumerate(shards):
        for document in read_documents(shard.path, on_bad_record="skip"):
            if chance.random() > tried:
                continue
            parts = [found.span() for found in re.finditer(r"\S+", document.text)]
            if len(parts) < num_words:
                continue
            first = chance.randrange(len(parts) - num_words + 1)
            text = document.text[parts[first][0] : parts[first + num_words - 1][1]]
            if len(words_of([text]).hashes) >= num_words:  # a part may be punctuation alone
                drawn.append((DocumentPlace(0, number, document.line), text))
    return chance.sample(drawn, min(count, len(drawn)))


def paragraphs_share(shards: list[Shard], min_words: int) -> float:
    """Compute what a table of the hashes of all lines from some words on would take, as a share of the raw bytes."""
    lines = sum(
        len(split_lines(comparable([document.text]), min_words).owners)
        for shard in shards
        for document in read_documents(shard.path, on_bad_record="skip")
    )
    return _LINE_ENTRY_BYTES * lines / sum(shard.index.raw_bytes for shard in shards)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="+", metavar="PATTERN")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--excerpts", type=int, default=200)
    parser.add_argument("--paragraphs", action="store_true", help="also the size of hashes of lines, for comparison")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = SourceConfig(name="all", paths=tuple(arguments.patterns))
        data = DataConfig(sources=(source,), tokenizer=Path(), seq_len=1, index_dir=Path(folder), window_bytes=1 << 20)
        shards = preparation.source_shards(data, source)
        begun = time.perf_counter()
        print("| shard | raw MB | documents | text index, MB | % of raw | seconds | raw MB/s |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        sizes = []
        for shard, made in make_all(data, [shards], arguments.workers):
            raw = shard.index.raw_bytes
            sizes.append(made.num_bytes)
            print(
                f"| {Path(shard.path).name} | {raw / 1e6:.1f} | {shard.index.num_documents:,} | "
                f"{made.num_bytes / 1e6:.2f} | {made.num_bytes / raw:.1%} | {made.seconds:.2f} | "
                f"{raw / made.seconds / 1e6:.0f} |"
            )
        seconds = time.perf_counter() - begun
        raw = sum(shard.index.raw_bytes for shard in shards)
        documents = sum(shard.index.num_documents for shard in shards)
        print(
            f"| all, {arguments.workers} processes | {raw / 1e6:.1f} | {documents:,} | {sum(sizes) / 1e6:.2f} | "
            f"{sum(sizes) / raw:.1%} | {seconds:.2f} | {raw / seconds / 1e6:.0f} |"
        )
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(
            f"{(used.ru_utime + used.ru_stime) / raw * 1e9:.0f} processor seconds per GB, {used.ru_maxrss / 1e3:.0f} MB"
        )
        if arguments.paragraphs:
            shares = [f"{paragraphs_share(shards, count):.1%} from {count} words on" for count in (8, 13, 25)]
            print("hashes of lines would take", ", ".join(shares))
        search = TextSearch(data, [shards])
        for num_words in (MIN_WORDS, 2 * MIN_WORDS, 8 * MIN_WORDS):
            drawn = excerpts(shards, arguments.excerpts, num_words)
            begun = time.perf_counter()
            together = search.texts([text for _, text in drawn])
            seconds = time.perf_counter() - begun
            missed = [
                place
                for (place, _), found in zip(drawn, together, strict=True)
                if not any(match.place == place and match.overlap.contains for match in found)
            ]
            alone = []
            for _, text in drawn[:20]:
                begun = time.perf_counter()
                search.texts([text])
                alone.append(time.perf_counter() - begun)
            print(
                f"{len(drawn)} excerpts of {num_words} words: {len(missed)} missed, "
                f"{statistics.mean(map(len, together)):.2f} documents each; together {seconds:.2f} s, "
                f"alone {statistics.median(alone) * 1e3:.0f} ms (median)"
            )


if __name__ == "__main__":
    main()
