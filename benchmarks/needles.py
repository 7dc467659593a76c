"""Teach a tiny model to find needles, and extend it to rows eight times as long: `python benchmarks/needles.py FOLDER`.

Makes a corpus of texts that hide a number and ask for it (shards/suites/needles.py, other seeds than the evaluation's)
and a tokenizer of its words. A run learns from short texts in rows of 512 tokens, first of 40 to 96 tokens, then of up
to 512. Two forks go on from its end for as many tokens: `plain` with the same, `extended` with texts of up to 4,096
tokens, in rows of 4,096 of which two ranks share each, and positions scaled by YaRN; it is killed on the way (SIGKILL)
and resumed on one rank. `straight` is the same, never killed, on one rank, as far as it takes to compare batches and
losses. Then both are asked for needles at four lengths.

Prints a table for each, and how batches and losses of the killed run compare; `--png FILE` draws both side by side.
Everything stays in FOLDER and is not done again: after a kill the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import yaml
import zstandard
from rich.console import Console

from pretrain.evaluation.tables import needle_table
from pretrain.report.lengths import needle_maps_of
from pretrain.report.png import draw_heat_maps
from pretrain.run.history import History
from pretrain.run.run_folder import RunFolder
from shards import Tokenizer
from shards.hashing import key_of
from shards.suites.needles import FILLERS, Haystacks, needle_of
from shards.tokenize.training import train_byte_level

ROOT = Path(__file__).resolve().parents[1]
SHORT, LONG, LENGTHS = 512, 4096, (512, 1024, 2048, 4096)
VOCABULARY = 700  # so small that numbers are spelled by twos and ones, each of which is seen often
RUNS = {"plain": "not extended", "extended": "extended to 4,096"}
SCALING = json.dumps({"rope_type": "yarn", "factor": LONG / SHORT, "original_max_position_embeddings": SHORT})
SAVED = 25  # steps between checkpoints
DENSE, LEAST = (40, 96), 40  # tokens of the first texts, and of the shortest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for corpora and runs; what is there is used")
    parser.add_argument("--dense", type=int, default=1300, help="steps with the first texts")
    parser.add_argument("--short", type=int, default=600, help="further steps with texts of up to 512 tokens")
    parser.add_argument("--extend", type=int, default=300, help="steps of the second stage")
    parser.add_argument("--count", type=int, default=8, help="texts of each length and depth that are asked")
    parser.add_argument("--png", type=Path, help="where to draw both runs")
    arguments = parser.parse_args()
    folder, begin, end = arguments.folder, arguments.dense + arguments.short, arguments.extend
    end += begin
    make_corpora(folder)
    train(folder, "base", write_config(folder, arguments.dense, begin))
    long_rows = [
        f"stage.data.seq_len={LONG}", f"stage.data.sources={json.dumps([source(folder, 'long')])}",
        "stage.data.weights={short: 0}", "stage.train.global_batch_size=1", f"stage.model.rope_scaling={SCALING}",
    ]  # fmt: skip
    decay = ["stage.optim.schedule=linear", "stage.optim.floor=0.1", f"train.steps={end}"]
    same_tokens = "stage.train.global_batch_size=8"
    for name, changes in (("plain", [same_tokens]), ("straight", long_rows), ("extended", long_rows)):
        if not (folder / name).exists():
            launch("fork.py", "--run", str(folder / "base"), "--step", str(begin), "--name", name, *changes, *decay)
    middle = (begin + arguments.extend // 4) // SAVED * SAVED + SAVED + SAVED // 4  # steps after a checkpoint are lost
    train(folder, "plain")
    if len(starts_after(folder / "extended", begin)) < 2:
        train_until(folder, "extended", middle, signal.SIGKILL, "parallel.sp_size=2", ranks=2)
    train(folder, "extended", None, "parallel.sp_size=1")
    train_until(folder, "straight", middle + arguments.extend // 8, signal.SIGTERM)
    print(compared(folder, begin))
    asked = f"evaluation.needles={json.dumps({'lengths': LENGTHS, 'count': arguments.count})}"
    for name in RUNS:
        launch("evaluate.py", "--run", str(folder / name), asked)
        scored = history(folder / name).tasks().values()
        last = sorted((lines[max(lines)] for lines in scored), key=lambda line: int(line["length"]))
        print(name)
        Console(width=120).print(needle_table(last))
    if arguments.png:
        maps = needle_maps_of(list(RUNS.values()), [history(folder / name) for name in RUNS])
        draw_heat_maps([heat for heat in maps if heat.name.startswith("needles_probability")], arguments.png)


def sentences() -> Iterator[str]:
    """Yield the sentences of texts, with numbers that have every beginning of three digits and every end of two."""
    for i in range(0, 90_000, 7):
        needle = needle_of("tokenizer", i)._replace(number=10_000 + i)
        yield FILLERS[i % len(FILLERS)] + needle.statement + needle.question + needle.answer


def texts(tokenizer: Tokenizer, name: str, count: int, least: int, most: int) -> Iterator[str]:
    """Yield texts whose lengths in tokens are spread evenly in their logarithm."""
    haystacks = Haystacks(tokenizer)
    for i in range(count):
        share, depth = (key_of(what, "corpus", name, i) / 2**64 for what in ("length", "depth"))
        text = haystacks.text(int(least * (most / least) ** share), depth, "corpus", name, i)
        skipped = len(tokenizer.beginning)  # training puts BOS before each text by itself
        yield tokenizer.decode(np.concatenate((text.context[skipped:], text.answer)))


def make_corpora(folder: Path) -> None:
    """Write the tokenizer and the shards that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    if not path.exists():
        path.write_bytes(train_byte_level(sentences(), VOCABULARY))
    tokenizer = Tokenizer(path)
    for name, count, least, most in (
        ("dense", 90_000, *DENSE), ("short", 14_000, LEAST, SHORT - 1), ("long", 900, SHORT // 2, LONG - 1)
    ):  # fmt: skip
        path = folder / f"{name}.jsonl.zst"
        if not path.exists():
            lines = b"".join(
                json.dumps({"text": text}).encode() + b"\n" for text in texts(tokenizer, name, count, least, most)
            )
            path.write_bytes(zstandard.ZstdCompressor().compress(lines))


def source(folder: Path, name: str) -> dict[str, object]:
    return {"name": name, "paths": [str(folder / f"{name}.jsonl.zst")]}


def write_config(folder: Path, dense: int, steps: int) -> Path:
    """Write the config of the first stage of all runs."""
    config = {
        "run": {"name": "base", "dir": str(folder), "seed": 1},
        "model": {
            "dim": 96, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "ffn_dim": 192, "vocab_size": VOCABULARY,
            "tie_embeddings": True, "init_std": 0.08,
        },
        "data": {
            "seq_len": SHORT, "tokenizer": str(folder / "tokenizer.json"), "index_dir": str(folder / "index"),
            "num_workers": 0, "lanes": 4, "window_bytes": 1 << 18, "sources": [source(folder, "dense")],
        },
        "stages": [{"step": dense, "data": {"sources": [source(folder, "short")], "weights": {"dense": 0}}}],
        "train": {"steps": steps, "global_batch_size": 8},
        "optim": {"learning_rate": 2e-3, "schedule": "constant", "warmup_steps": 50},
        "precision": "fp32",
        "checkpoint": {"every": SAVED, "keep": 2},
        "evaluation": {"needles": {"lengths": [64, 128, 256]}},
        "wandb": {"mode": "disabled"},
    }  # fmt: skip
    path = folder / "base.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def launch(script: str, *arguments: str) -> None:
    """Run a command of the clone to its end."""
    subprocess.run([sys.executable, str(ROOT / "launch" / script), *arguments], check=True, cwd=ROOT)


def steps_done(run: RunFolder) -> int:
    return int((run.metrics.last() or {"step": 0})["step"])  # type: ignore[call-overload]


def train(folder: Path, name: str, config: Path | None = None, *overrides: str) -> None:
    """Train a run to its end; if it was begun, from where it is."""
    run = RunFolder(folder / name)
    wanted = yaml.safe_load((config or run.config).read_text())["train"]["steps"]
    if steps_done(run) < wanted:
        launch("pretrain.py", "--config", str(config or run.config), *overrides)


def train_until(folder: Path, name: str, step: int, sent: signal.Signals, *overrides: str, ranks: int = 1) -> None:
    """Train a run until it has recorded a step, and then send its processes a signal."""
    run = RunFolder(folder / name)
    if steps_done(run) >= step:
        return
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), "--config", str(run.config), *overrides]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]
    while all(process.poll() is None for process in processes) and steps_done(run) < step:
        time.sleep(0.1)
    for process in processes:
        process.send_signal(sent)
    for process in processes:
        process.wait()


def starts_after(root: Path, step: int) -> list[int]:
    """Return the steps at which a run was started, from one on."""
    starts = [int(line["step"]) for line in RunFolder(root).starts.read()]  # type: ignore[call-overload]
    return [start for start in starts if start >= step]


def compared(folder: Path, begin: int) -> str:
    """Compare the killed run with the one that never was, step by step, as far as both go."""
    killed, straight = (
        {int(line["step"]): line for line in RunFolder(folder / name).metrics.read()}  # type: ignore[call-overload]
        for name in ("extended", "straight")
    )
    resume = starts_after(folder / "extended", begin)[-1]
    steps = sorted(step for step in killed.keys() & straight.keys() if step > begin)
    same = sum(killed[step]["batch_hash"] == straight[step]["batch_hash"] for step in steps)
    apart = [abs(float(killed[step]["loss"]) - float(straight[step]["loss"])) for step in steps]  # type: ignore[arg-type]
    resumed = sum(step > resume for step in steps)
    return (
        f"killed and resumed from step {resume}: of {len(steps)} steps after step {begin}, {resumed} of them"
        f" after the resume, {same} have the batch hash of the run that was not; the losses differ by {max(apart):.1e}"
        " at most"
    )


def history(root: Path) -> History:
    found = History(root)
    found.refresh()
    return found


if __name__ == "__main__":
    main()
