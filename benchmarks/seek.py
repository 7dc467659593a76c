"""Measure how soon a run resumed deep inside single-frame shards has its first row.

    python benchmarks/grow.py 'corpus/*.zst' 1g.jsonl.zst --raw-bytes 1e9      # makes such a shard
    python benchmarks/seek.py 100m.jsonl.zst 1g.jsonl.zst 4g.jsonl.zst --tokenizer T.model --work work --plot seek.png

Each measurement runs in a process of its own: Headrace with splice points and without (replay), HF `datasets` streaming
with `load_state_dict`, and plain decode-and-skip. A row is 2,049 tokens. Then one, two and more readers read the
largest shard, each its own part: the rate is that of all together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import msgspec

from shards import DataConfig, Loader, Tokenizer
from shards.config import MIB
from shards.index import paths
from shards.index.decoders import Decoders
from shards.index.shard_index import ShardIndex, load, obtain
from shards.plan.cursor import Cursor, LaneCursor, LoaderState

SEQ_LEN = 2048
MAX_WINDOW = 128 * MIB
POSITIONS = (0.1, 0.5, 0.95)
METHODS = {"entries": "Headrace", "replay": "Headrace by replay", "datasets": "HF datasets", "plain": "decode and skip"}


def prepare(path: str, work: Path) -> ShardIndex:
    """Make what is measured later, if it is missing, and return the index.

    That is an index with splice points in `work`/entries, which is returned, one without in `work`/replay, and the
    states of HF `datasets`.
    """
    index = obtain(path, work / "entries", MIB, MAX_WINDOW)
    bare = msgspec.structs.replace(index, splices=())
    paths.store(paths.index_path(path, work / "replay"), msgspec.json.encode(bare))
    states = work / f"{Path(path).name}.datasets.json"
    if not states.exists():
        records = [cell_at(index, position)[0] for position in POSITIONS]
        states.write_text(json.dumps(states_of_datasets(path, records)))
    return index


def cell_at(index: ShardIndex, position: float) -> tuple[int, int]:
    """Return (record, raw offset) of the beginning of the cell at a position from 0 to 1 in the shard."""
    cells = index.table()
    record, raw_offset = cells[int((len(cells) - 1) * position)].tolist()
    return record, raw_offset


def first_row_of_loader(path: str, index_dir: Path, tokenizer: str, position: float, lanes: int) -> tuple[float, str]:
    """Measure seconds from load_state_dict to the first global batch of `lanes` rows; return what was read too."""
    source = {"name": "a", "paths": [path]}
    workers = 0 if lanes == 1 else 2
    said = {"seq_len": SEQ_LEN, "tokenizer": tokenizer, "sources": [source], "index_dir": index_dir, "lanes": lanes}
    data = DataConfig.model_validate(said | {"num_workers": workers})
    with Loader(data, lanes) as loader:
        (first,) = loader._sources
        plan = first.plan
        segment = round(plan.num_segments // lanes * position)
        if lanes == 1:  # the segment at that place in the shard, whenever the lane's turn to read it comes
            wanted = min(plan.num_segments - 1, int(plan.num_segments * position))
            segment = next(q for q in range(plan.num_segments) if plan.deal(0, q).segments[0] == wanted)
        cursor = LaneCursor(0, 0, (Cursor(segment=segment),))
        cursors = {str(lane): cursor for lane in range(lanes)}
        start = LoaderState.from_dict(loader.state_dict())
        state = LoaderState(start.version, 0, start.num_lanes, start.source_names, cursors).to_dict()
        begun = time.time()
        loader.load_state_dict(state)
        batch = next(loader)
        seconds = time.time() - begun
        return seconds, f"{batch.row_hash:016x}"


def states_of_datasets(path: str, records: list[int]) -> list[dict[str, object]]:
    """Return the states of HF `datasets` before each of these records, in order, by reading up to the last."""
    import datasets

    stream = datasets.load_dataset("json", data_files=path, split="train", streaming=True)
    states, wanted = [], iter(records)
    record = next(wanted)
    for number, _ in enumerate(stream, 1):
        if number == record:
            states.append(stream.state_dict())
            if (record := next(wanted, -1)) < 0:
                break
    return states


def first_row_of_datasets(path: str, tokenizer: str, state: dict[str, object]) -> tuple[float, str]:
    """Measure seconds from load_state_dict to 2,049 tokens; return the first text's beginning too."""
    import datasets

    datasets.disable_progress_bars()
    encoder = Tokenizer(tokenizer)
    stream = datasets.load_dataset("json", data_files=path, split="train", streaming=True)
    begun = time.time()
    stream.load_state_dict(state)
    tokens, first = 0, ""
    for example in stream:
        first = first or example["text"]
        tokens += len(encoder.encode_document(example["text"]))
        if tokens > SEQ_LEN:
            break
    return time.time() - begun, first[:60]


def first_row_by_skipping(path: str, tokenizer: str, raw_offset: int) -> tuple[float, str]:
    """Measure seconds from opening the file to 2,049 tokens; return the first text's beginning too."""
    import zstandard

    encoder = Tokenizer(tokenizer)
    begun = time.time()
    with open(path, "rb") as file:
        reader = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).stream_reader(file)
        left = raw_offset
        while left:
            left -= len(reader.read(min(left, MIB)))
        tokens, first, lines = 0, "", b""
        while tokens <= SEQ_LEN:
            lines += reader.read(MIB)
            *whole, lines = lines.split(b"\n")
            for line in whole:
                text = json.loads(line)["text"]
                first = first or text
                tokens += len(encoder.encode_document(text))
                if tokens > SEQ_LEN:
                    break
    return time.time() - begun, first[:60]


def read_part(path: str, index_dir: Path, part: int, parts: int) -> tuple[float, float]:
    """Read one of `parts` equal parts of a shard; return (begun, done) in seconds of the clock."""
    index = load(paths.index_path(path, index_dir))
    assert index is not None
    bounds = [int(bound) for bound in index.table()[:, 1]]
    start, stop = (bounds[(len(bounds) - 1) * (part + i) // parts] for i in range(2))
    marks = [bound for bound in bounds if start <= bound <= stop][::4]
    decoders = Decoders(MAX_WINDOW, None, index_dir)
    begun = time.time()
    for at, end in zip(marks, [*marks[1:], stop], strict=True):
        if at < end:
            decoders.read(index.raw_range(path, at, end))
    return begun, time.time()


def child(arguments: argparse.Namespace) -> None:
    """Make one measurement and print it as JSON."""
    method, path, spawned = arguments.child, arguments.shards[0], arguments.spawned
    index = load(paths.index_path(path, arguments.work / "entries"))
    assert index is not None
    if method == "reader":
        begun, done = read_part(path, arguments.work / "entries", arguments.part, arguments.lanes)
        print(json.dumps({"begun": begun, "done": done}))
        return
    if method in ("entries", "replay"):
        folder = arguments.work / method
        seconds, read = first_row_of_loader(path, folder, arguments.tokenizer, arguments.position, arguments.lanes)
    elif method == "datasets":
        states = json.loads((arguments.work / f"{Path(path).name}.datasets.json").read_text())
        seconds, read = first_row_of_datasets(path, arguments.tokenizer, states[POSITIONS.index(arguments.position)])
    else:
        seconds, read = first_row_by_skipping(path, arguments.tokenizer, cell_at(index, arguments.position)[1])
    print(json.dumps({"load": seconds, "start": time.time() - spawned, "read": read}))


def run(arguments: argparse.Namespace, method: str, path: str, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, path, "--work", str(arguments.work), "--tokenizer", arguments.tokenizer]
    command += ["--child", method, "--spawned", str(time.time())]
    command += [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> dict[str, float]:
    out, _ = process.communicate()
    assert process.returncode == 0, out
    return json.loads(out.splitlines()[-1])


def measure(arguments: argparse.Namespace, sizes: dict[str, float]) -> list[tuple[str, float, float, float]]:
    """Print a table; return (method, raw GB before the place, seconds from load_state_dict, from process start)."""
    points = []
    print("| shard, raw GB | at | method | lanes | from load_state_dict, s | from process start, s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for path, size in sizes.items():
        for position in POSITIONS:
            read: dict[str, object] = {}
            for method, lanes in [*((name, 1) for name in METHODS), ("entries", 16)]:
                rounds = arguments.rounds if method == "entries" else 1
                found = [answer(run(arguments, method, path, position=position, lanes=lanes)) for _ in range(rounds)]
                load, start = (statistics.median(one[key] for one in found) for key in ("load", "start"))
                print(
                    f"| {size:.1f} | {position:.0%} | {METHODS[method]} | {lanes} | {load:.2f} | {start:.2f} |",
                    flush=True,
                )
                if lanes == 1:
                    points.append((method, size * position, load, start))
                    read[method] = found[0]["read"]
            assert read["entries"] == read["replay"], read
            assert read["datasets"] == read["plain"], read
    return points


def measure_readers(arguments: argparse.Namespace, path: str, size: float) -> None:
    """Print the rates of one and more readers of one shard."""
    print("\n| readers of one frame | GB/s together | ratio to one |")
    print("| --- | --- | --- |")
    rates: dict[int, list[float]] = {count: [] for count in (1, 2, 4)}
    for _ in range(arguments.rounds):
        for count, rate in rates.items():
            running = [run(arguments, "reader", path, part=part, lanes=count) for part in range(count)]
            found = [answer(process) for process in running]
            rate.append(size / (max(one["done"] for one in found) - min(one["begun"] for one in found)))
    for count, rate in rates.items():
        median = statistics.median(rate)
        print(f"| {count} | {median:.2f} | {median / statistics.median(rates[1]):.2f} |", flush=True)


def plot(points: list[tuple[str, float, float, float]], path: Path) -> None:
    """Plot the seconds to the first row over what precedes it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=100)
    for method, name in METHODS.items():
        line = sorted((skipped, load) for found, skipped, load, _ in points if found == method)
        axes.plot(*zip(*line, strict=True), marker="o", markersize=4, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("raw GB of the frame before the first row")
    axes.set_ylabel("seconds from load_state_dict to the first row")
    axes.grid(alpha=0.3, which="major")
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", metavar="SHARD", help="each a single zstd frame")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for indexes, kept for later runs")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of Headrace with entries and of readers")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--spawned", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--position", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--lanes", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    sizes = {path: prepare(path, arguments.work).raw_bytes / 1e9 for path in arguments.shards}
    points = measure(arguments, sizes)
    largest = max(sizes, key=lambda path: sizes[path])
    measure_readers(arguments, largest, sizes[largest])
    if arguments.plot:
        plot(points, arguments.plot)


if __name__ == "__main__":
    main()
