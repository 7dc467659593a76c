"""Kill a loading process or one of its workers repeatedly: `python benchmarks/kills.py --kills 1000`.

The loading process writes each batch's hash and the state after it to a file, as training would. After every SIGKILL it
is started again from the last state written. In the end the stream must be that of an undisturbed loader.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import psutil

from shards import DataConfig, Loader

ROOT = Path(__file__).resolve().parents[1]
BATCH = 16
STEP_SECONDS = 0.003  # duration of the training step that uses a batch
PATIENCE_SECONDS = 300.0  # the machine may be busy


def config(num_workers: int) -> DataConfig:
    """Configure the bundled sample in small windows, so that workers are always at work."""
    train = ROOT / "shards/sample/train"
    sources = [
        {"name": "pile", "paths": [f"{train}/pile-*"], "weight": 0.7},
        {"name": "dolma", "paths": [f"{train}/dolma-*"], "weight": 0.3},
    ]
    return DataConfig.model_validate(
        {
            "seq_len": 256,
            "tokenizer": ROOT / "shards/sample/tokenizer-4k.model",
            "num_workers": num_workers,
            "window_bytes": 1 << 16,
            "lanes": 8,
            "sources": sources,
        }
    )


def load(folder: Path) -> None:
    """Run the loading process: continue from the newest state, for ever."""
    state, log = folder / "state.json", folder / "hashes.txt"
    with Loader(config(2), BATCH, seed=1) as loader:
        step = 0
        if state.exists():
            saved = json.loads(state.read_text())
            step = saved["step"]
            loader.load_state_dict(saved["loader"])
        for number, batch in enumerate(loader, step + 1):
            with log.open("a") as file:
                file.write(f"{number} {batch.row_hash}\n")
            part = folder / "state.part"
            part.write_text(json.dumps({"step": number, "loader": batch.state}))
            os.replace(part, state)
            time.sleep(STEP_SECONDS)


def disturb(folder: Path, kills: int, seed: int) -> None:
    """Run the loading process and kill it, or one of its workers, `kills` times."""
    choose = random.Random(seed)
    command = [sys.executable, __file__, "--load", str(folder)]
    process = subprocess.Popen(command)
    for number in range(kills):
        if choose.random() < 0.8:  # otherwise it may be killed while it starts
            wait_for_more(folder / "hashes.txt")
        time.sleep(choose.uniform(0.0, 0.3))
        workers = [
            child for child in psutil.Process(process.pid).children() if "shards.windows.worker" in " ".join(cmd(child))
        ]
        if workers and choose.random() < 0.5:
            os.kill(choose.choice(workers).pid, choose.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSEGV]))
        else:
            process.kill()
            process.wait()
            gone = time.monotonic() + PATIENCE_SECONDS
            while any(worker.is_running() for worker in workers) and time.monotonic() < gone:
                time.sleep(0.01)
            assert not any(worker.is_running() for worker in workers), "a worker outlived its parent"
            process = subprocess.Popen(command)
        if number % 50 == 49:
            print(f"{number + 1} kills", flush=True)
    time.sleep(2)
    process.kill()
    process.wait()


def wait_for_more(log: Path) -> None:
    """Wait until another batch is delivered."""
    size = log.stat().st_size if log.exists() else 0
    limit = time.monotonic() + PATIENCE_SECONDS
    while not (log.exists() and log.stat().st_size > size):
        assert time.monotonic() < limit, "no further batch"
        time.sleep(0.005)


def cmd(process: psutil.Process) -> list[str]:
    """Return a process's command line; empty if it has ended."""
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        load(arguments.load)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        disturb(folder, arguments.kills, arguments.seed)
        lines = (folder / "hashes.txt").read_text().splitlines()
        delivered = [tuple(int(word) for word in line.split()) for line in lines]
    steps = max(step for step, _ in delivered)
    with Loader(config(0), BATCH, seed=1) as loader:
        undisturbed = {step: next(loader).row_hash for step in range(1, steps + 1)}
    wrong = [step for step, found in delivered if undisturbed[step] != found]
    missing = sorted(set(undisturbed) - {step for step, _ in delivered})
    twice = len(delivered) - steps
    print(f"{arguments.kills} kills, {steps} batches, {twice} made twice; wrong {wrong}, missing {missing}")
    sys.exit(bool(wrong or missing))


if __name__ == "__main__":
    main()
