"""Measure the memory of one rank's loader, including its workers: `python benchmarks/memory.py`.

    document    a shard with one document of 100 MB among short ones, as .zst and as .gz: indexed and read to its end
    many        64 lanes x 8 sources at seq_len 4096: until 512 windows are open, and 1,000 more

The loading process and its workers are observed from outside. `PSS` counts a page that n processes share as 1/n;
`peaks` sums the most that each process ever held (VmHWM), at whatever time, counting shared pages in each: memory can
never have exceeded it. The exit code is 1 if a bound is exceeded: 1.5 GB for the document, 2 GB for the rest, and less
than 5 % growth over the last 800 windows.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import msgspec
import psutil
import zstandard
from isal import igzip

from shards import DataConfig, Loader, read_documents

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "shards/sample"
DOCUMENT_BYTES = 100 * 10**6
DOCUMENT_BOUND, MANY_BOUND, GROWTH_BOUND = 1.5e9, 2e9, 0.05
SOURCES, LANES, SEQ_LEN, WINDOWS = 8, 64, 4096, 1000
SOURCE_BYTES = 24 * 10**6  # raw
POLL_SECONDS = 0.05


class Sight(NamedTuple):
    """The memory of the loading process and its workers at one moment, in bytes."""

    windows: int  # opened so far
    pss: int
    peaks: int


def texts() -> Iterator[str]:
    """Yield the documents of the bundled sample repeatedly."""
    shards = sorted([*SAMPLE.glob("train/*.zst"), *SAMPLE.glob("train/*.gz")])
    documents = [document.text for shard in shards for document in read_documents(shard)]
    return itertools.cycle(documents)


def joined(size: int) -> str:
    """Return real text of about `size` bytes."""
    parts, length = [], 0
    for text in texts():
        parts.append(text)
        length += len(text.encode())
        if length >= size:
            return "\n".join(parts)
    raise AssertionError


def record(text: str) -> bytes:
    return msgspec.json.encode({"text": text}) + b"\n"


def config(sources: list[dict[str, object]], tokenizer: Path, **others: object) -> DataConfig:
    return DataConfig.model_validate({"tokenizer": tokenizer, "sources": sources, "seq_len": SEQ_LEN} | others)


def document_config(folder: Path, suffix: str, tokenizer: Path) -> DataConfig:
    """Write the shard with the long document if it is missing; return its config."""
    path = folder / f"long{suffix}"
    if not path.exists():
        short = b"".join(record(text) for text in itertools.islice(texts(), 1000))
        raw = short + record(joined(DOCUMENT_BYTES)) + short
        path.write_bytes(zstandard.compress(raw, 1) if suffix.endswith(".zst") else igzip.compress(raw))
    return config([{"name": "a", "paths": [str(path)], "max_epochs": 1}], tokenizer, lanes=1)


def many_config(folder: Path, tokenizer: Path, num_workers: int) -> DataConfig:
    """Write the shards of the eight sources if they are missing; return their config."""
    documents = texts()
    for number in range(SOURCES):
        path = folder / f"s{number}.jsonl.zst"
        if not path.exists():
            raw = bytearray()
            while len(raw) < SOURCE_BYTES:
                raw += record(next(documents))
            path.write_bytes(zstandard.compress(bytes(raw), 1))
    sources = [{"name": f"s{i}", "paths": [str(folder / f"s{i}.jsonl.zst")]} for i in range(SOURCES)]
    return config(sources, tokenizer, lanes=LANES, num_workers=num_workers)


def load(data: DataConfig, batch_size: int, max_windows: int) -> None:
    """Run the loading process: draw batches and print after each how many windows have been opened."""
    opened: set[tuple[str, int, int, int]] = set()
    with Loader(data, batch_size, seed=1) as loader:
        for batch in loader:
            lanes = batch.state["lanes"]
            assert isinstance(lanes, dict)
            for lane, cursor in lanes.items():
                for source, (rows, segment, window, *_) in enumerate(cursor["sources"]):
                    if rows:
                        opened.add((lane, source, segment, window))
            print(len(opened), flush=True)
            if len(opened) >= max_windows:
                break


def watch(command: list[str]) -> list[Sight]:
    """Run the loading process and observe its memory until it ends."""
    sights: list[Sight] = []
    peaks: dict[int, int] = {}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said)
        while process.poll() is None:
            pss = 0
            for part in family(process.pid):
                try:
                    peaks[part.pid] = peak(part.pid)
                    pss += part.memory_full_info().pss
                except (psutil.Error, OSError, StopIteration):
                    continue  # the process has just ended
            said.seek(0)
            lines = said.read().split()
            sights.append(Sight(int(lines[-1]) if lines else 0, pss, sum(peaks.values())))
            time.sleep(POLL_SECONDS)
    if process.returncode:
        raise SystemExit(f"the loading process failed: {command}")
    return sights


def family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def peak(pid: int) -> int:
    """Return the most that a process has ever held, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure_document(command: list[str], suffix: str) -> bool:
    """Measure one long document in a shard of this suffix; return whether the bound holds."""
    sights = watch([*command, "--load", suffix])
    most = max(sight.peaks for sight in sights)
    pss = max(sight.pss for sight in sights)
    print(
        f"| one document of {DOCUMENT_BYTES / 1e6:.0f} MB, {suffix} | {pss / 1e9:.2f} | {most / 1e9:.2f} |", flush=True
    )
    return most < DOCUMENT_BOUND


def measure_many(command: list[str]) -> bool:
    """Measure many lanes and sources; return whether the bounds hold."""
    sights = watch([*command, "--load", "many"])
    name = f"{LANES} lanes x {SOURCES} sources, seq_len {SEQ_LEN}"
    most = max(sight.peaks for sight in sights)
    print(f"| {name} | {max(sight.pss for sight in sights) / 1e9:.2f} | {most / 1e9:.2f} |", flush=True)
    first = LANES * SOURCES
    medians = []
    for start in range(first, first + WINDOWS, WINDOWS // 5):
        found = [sight.pss for sight in sights if start <= sight.windows < start + WINDOWS // 5]
        medians.append(statistics.median(found))
        print(f"|   windows {start} to {start + WINDOWS // 5}, median | {medians[-1] / 1e9:.2f} | |", flush=True)
    # Growth counts from the second fifth on, since memory still rises in the first (see docs/data-measurements.md).
    growth = medians[-1] / medians[1] - 1
    print(f"|   growth over the last {WINDOWS * 4 // 5} windows, % | {100 * growth:.1f} | |", flush=True)
    return most < MANY_BOUND and growth < GROWTH_BOUND


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["document", "many"])
    parser.add_argument("--tokenizer", type=Path, default=SAMPLE / "tokenizer-4k.model")
    parser.add_argument("--num-workers", type=int, default=2, help="workers of the rank with many lanes")
    parser.add_argument("--folder", type=Path, help="folder in which to make and keep the shards; default: none")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load == "many":
        data = many_config(arguments.folder, arguments.tokenizer, arguments.num_workers)
        load(data, LANES, LANES * SOURCES + WINDOWS)
        return 0
    if arguments.load:
        load(document_config(arguments.folder, arguments.load, arguments.tokenizer), 1, sys.maxsize)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        options = ["--tokenizer", str(arguments.tokenizer), "--num-workers", str(arguments.num_workers)]
        command = [sys.executable, __file__, "--folder", str(folder), *options]
        kept = []
        print("| | PSS, GB | peaks, GB |\n| --- | ---: | ---: |", flush=True)
        if arguments.only != "many":
            for suffix in (".jsonl.zst", ".jsonl.gz"):
                document_config(folder, suffix, arguments.tokenizer)
                kept.append(measure_document(command, suffix))
        if arguments.only != "document":
            many_config(folder, arguments.tokenizer, arguments.num_workers)
            kept.append(measure_many(command))
    print("all bounds are kept" if all(kept) else "a bound is not kept")
    return int(not all(kept))


if __name__ == "__main__":
    sys.exit(main())
