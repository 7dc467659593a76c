"""Compare Headrace with other ways from raw shards to packed rows, in one run.

    python benchmarks/loader.py 'corpus/*.zst' 'corpus/*.gz' --tokenizer T.model --plot loader.png

Contenders: Headrace; HF `datasets` streaming, SentencePiece in a batched map, packing; a bare loop of zstandard,
msgspec and SentencePiece; mosaicml-streaming, converting tokens to MDS and reading them; SentencePieceProcessor.encode
alone on texts in memory. Each is a process pinned to 1 or 2 cores. They take turns of some seconds, and all others are
stopped meanwhile, with their workers. Medians are over all turns but the first. The corpus is first rewritten, with
documents shuffled and in the Pile's shape, so that every turn has the same mix. MB are of raw JSON lines, derived from
tokens by the corpus's ratio.

mosaicml-streaming pins other versions of torch and transformers than ours: `pip install --no-deps mosaicml-streaming
catalogue brotli zstd python-snappy cramjam`. Without it the others run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import msgspec
import psutil
import zstandard
from contenders import Settings

from shards import DataConfig, Tokenizer, preparation, read_documents

NUM_SHARDS = 24
COLD_BYTES = 20_000_000  # raw
# name -> number of cores -> (contender, its workers, processes)
RUNS = {
    "Headrace": {1: ("headrace", 1, 1), 2: ("headrace", 2, 1)},
    "Headrace, 1 worker on 2 cores": {2: ("headrace", 1, 1)},
    "HF datasets + SentencePiece": {1: ("datasets", 0, 1), 2: ("datasets", 2, 1)},
    "bare loop + SentencePiece": {1: ("bare_loop", 0, 1), 2: ("bare_loop", 0, 2)},
    "mosaicml-streaming: convert": {1: ("mds_convert", 0, 1), 2: ("mds_convert", 0, 2)},
    "mosaicml-streaming: read": {1: ("mds_read", 0, 1), 2: ("mds_read", 2, 1)},
    "SentencePiece.encode alone": {1: ("encode_alone", 0, 1), 2: ("encode_alone", 0, 2)},
}


class Turn(msgspec.Struct):
    """The result of one turn of a contender."""

    tokens: float = 0
    seconds: float = 0
    cpu: float = 0  # seconds of all its processes
    consumer_cpu: float = 0  # seconds of the process that gets the rows
    memory: float = 0  # bytes; proportional set size of all its processes at the turn's end


class Entrant:
    """A contender's processes, stopped while it is not their turn."""

    def __init__(self, contender: str, workers: int, processes: int, cores: int, corpus: Corpus) -> None:
        self.processes = []
        for number in range(processes):
            shards = corpus.shards[number::processes]
            settings = Settings(contender, shards, corpus.tokenizer, corpus.seq_len, workers, corpus.index_dir)
            own = {number} if processes > 1 else set(range(cores))
            command = [sys.executable, "benchmarks/contenders.py", msgspec.json.encode(settings).decode()]
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                cwd=Path(__file__).resolve().parents[1],
                preexec_fn=lambda own=own: os.sched_setaffinity(0, own),
            )
            self.processes.append(process)

    def turn(self, tokens: float, seconds: float) -> Turn:
        """Continue until both are reached."""
        self._signal(signal.SIGCONT)
        before, _ = self._usage()
        for process in self.processes:
            process.stdin.write(json.dumps([tokens / len(self.processes), seconds]).encode() + b"\n")
            process.stdin.flush()
        answers = [json.loads(process.stdout.readline()) for process in self.processes]
        self._signal(signal.SIGSTOP)
        cpu, memory = self._usage()
        rate = sum(answer["tokens"] / answer["seconds"] for answer in answers)
        took = max(answer["seconds"] for answer in answers)
        return Turn(rate * took, took, cpu - before, sum(answer["consumer_cpu"] for answer in answers), memory)

    def close(self) -> None:
        for process in self.processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _signal(self, number: int) -> None:
        for process in self.processes:
            os.killpg(process.pid, number)

    def _usage(self) -> tuple[float, float]:
        """Return (CPU seconds, bytes) of all processes."""
        cpu = memory = 0.0
        for root in self.processes:
            process = psutil.Process(root.pid)
            for one in [process, *process.children(recursive=True)]:
                times = one.cpu_times()
                cpu += times.user + times.system + times.children_user + times.children_system
                memory += one.memory_full_info().pss
        return cpu, memory


class Corpus(msgspec.Struct):
    """The corpus that all contenders read."""

    shards: list[str]
    tokenizer: str
    seq_len: int
    index_dir: str
    bytes_per_token: float  # raw


def write_corpus(patterns: list[str], tokenizer: str, seq_len: int, folder: Path) -> Corpus:
    """Write the documents again in random order, and their indexes."""
    paths = sorted(str(path) for pattern in patterns for path in Path("/").glob(str(Path(pattern).absolute())[1:]))
    texts = [document.text for path in paths for document in read_documents(path)]
    random.Random(0).shuffle(texts)
    encoder, raw_bytes = Tokenizer(tokenizer), 0
    tokens = sum(int(encoder.encode_documents(texts[i : i + 500])[1].sum()) for i in range(0, len(texts), 500))
    shards = []
    for number in range(NUM_SHARDS):
        lines = [{"text": text, "meta": {"pile_set_name": "any"}} for text in texts[number::NUM_SHARDS]]
        raw = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
        raw_bytes += len(raw)
        shards.append(str(folder / f"{number:02}.jsonl.zst"))
        Path(shards[-1]).write_bytes(zstandard.ZstdCompressor(3).compress(raw))
    config = DataConfig.parse(
        {"tokenizer": tokenizer, "seq_len": seq_len, "index_dir": folder, "sources": [{"name": "a", "paths": shards}]}
    )
    preparation.source_shards(config, config.sources[0])
    return Corpus(shards, tokenizer, seq_len, str(folder), raw_bytes / tokens)


def steady(corpus: Corpus, runs: dict[tuple[str, int], tuple[str, int, int]], turns: int, seconds: float) -> Measured:
    """Give all entrants turns, one after another, repeatedly."""
    entrants = {key: Entrant(*run, key[1], corpus) for key, run in runs.items()}
    try:
        found: Measured = {key: [] for key in runs}
        for number in range(turns + 1):
            for key, entrant in entrants.items():
                turn = entrant.turn(0, seconds if number else 2 * seconds)
                if number:
                    found[key].append(turn)
        return found
    finally:
        for entrant in entrants.values():
            entrant.close()


def cold(corpus: Corpus, runs: dict[tuple[str, int], tuple[str, int, int]], repeats: int) -> Measured:
    """Measure the first COLD_BYTES of fresh processes, including their start."""
    found: Measured = {key: [] for key in runs}
    for _ in range(repeats):
        for key, run in runs.items():
            entrant = Entrant(*run, key[1], corpus)
            try:
                entrant.turn(0, -1)  # the interpreter is up
                found[key].append(entrant.turn(COLD_BYTES / corpus.bytes_per_token, 0))
            finally:
                entrant.close()
    return found


Measured = dict[tuple[str, int], list[Turn]]
HEADER = ["", "cores", "M tokens/s", "MB raw/s", "CPU s per M tokens", "consumer's share of CPU", "memory MB"]


def table(found: Measured, corpus: Corpus) -> tuple[list[list[str]], dict[tuple[str, int], list[float]]]:
    """Return (rows of text, rates in M tokens/s by turn)."""
    rows, rates = [], {}
    for key, turns in found.items():
        rates[key] = [turn.tokens / turn.seconds / 1e6 for turn in turns]
        rate = statistics.median(rates[key])
        cpu = statistics.median(turn.cpu / turn.tokens * 1e6 for turn in turns)
        share = statistics.median(turn.consumer_cpu / max(turn.cpu, 1e-9) for turn in turns)
        memory = max(turn.memory for turn in turns) / 1e6
        megabytes = rate * corpus.bytes_per_token
        rows.append(
            [key[0], str(key[1]), f"{rate:.2f}", f"{megabytes:.1f}", f"{cpu:.3f}", f"{share:.1%}", f"{memory:.0f}"]
        )
    return rows, rates


def show(title: str, rows: list[list[str]]) -> None:
    print(f"\n{title}\n\n| {' | '.join(HEADER)} |\n|{' --- |' * len(HEADER)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def plot(rates: dict[tuple[str, int], list[float]], path: Path) -> None:
    """Draw bars of the medians, with all turns as dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for name, _ in rates))
    figure, axes = pyplot.subplots(figsize=(8, 4))
    for cores, shift, color in ((1, 0.2, "tab:blue"), (2, -0.2, "tab:orange")):
        places = [(-i + shift, rates[name, cores]) for i, name in enumerate(names) if (name, cores) in rates]
        medians = [statistics.median(turns) for _, turns in places]
        axes.barh([at for at, _ in places], medians, 0.38, color=color, label=f"{cores} core{'s' * (cores > 1)}")
        for (at, turns), median in zip(places, medians, strict=True):
            axes.plot(turns, [at] * len(turns), ".", color="black", markersize=3)
            axes.annotate(f" {median:.2f}", (max(turns), at), va="center", fontsize=8)
    axes.set_yticks([-i for i in range(len(names))], names)
    axes.set_xlabel("million tokens per second, rows ready; dots: single turns")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", help="shards; globs in quotes")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=5, help="measured turns of each contender, after a first one")
    parser.add_argument("--seconds", type=float, default=3.0, help="duration of a turn")
    parser.add_argument("--cold", type=int, default=3, help="fresh starts of Headrace and datasets")
    parser.add_argument("--only", help="only contenders whose name contains this")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    arguments = parser.parse_args()
    runs = {(name, cores): run for name, by_cores in RUNS.items() for cores, run in by_cores.items()}
    if importlib.util.find_spec("streaming") is None:
        print("mosaicml-streaming is not installed: left out")
        runs = {key: run for key, run in runs.items() if not run[0].startswith("mds")}
    if arguments.only:
        runs = {key: run for key, run in runs.items() if arguments.only in key[0]}
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(arguments.paths, arguments.tokenizer, arguments.seq_len, Path(folder))
        found = steady(corpus, runs, arguments.turns, arguments.seconds)
        rows, rates = table(found, corpus)
        show(f"Steady state, medians of {arguments.turns} turns of {arguments.seconds:g} s", rows)
        if arguments.cold:
            fresh = {
                key: run for key, run in runs.items() if run[0] in ("headrace", "datasets") and "1 w" not in key[0]
            }
            rows, _ = table(cold(corpus, fresh, arguments.cold), corpus)
            show(f"First {COLD_BYTES / 1e6:g} MB of a fresh start, medians of {arguments.cold}", rows)
    if arguments.plot:
        plot(rates, arguments.plot)


if __name__ == "__main__":
    main()
