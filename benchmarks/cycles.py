"""Train a small model through many kills and restarts: `python benchmarks/cycles.py --cycles 50`.

Each cycle starts the same command and ends it by SIGKILL, SIGTERM or SIGUSR1, sent to all ranks or to one: while it
starts, at a random step, inside a save, or inside an evaluation. In the end the run is finished undisturbed. Then
metrics.jsonl must hold each step once, with the losses and batch hashes of an undisturbed run, bit for bit.
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
from collections import Counter
from itertools import islice
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.run.run_folder import RunFolder, StepLog
from pretrain.topology import free_port
from shards import read_documents

ROOT = Path(__file__).resolve().parents[1]
STOPPED = 75
SAVE_EVERY, EVALUATE_EVERY = 5, 7  # optimizer steps
STEPS_PER_CYCLE = 12
GRACE_SECONDS = 120  # for ranks that were asked to stop
CONFIG = """
run: {{name: unnamed, dir: {folder}, seed: 7}}
model: {{dim: 64, n_layers: 2, n_heads: 4, n_kv_heads: 2, ffn_dim: 128, vocab_size: 4096, dropout: 0.1}}
data:
  seq_len: 64
  lanes: 8
  window_bytes: 65536
  prefetch_bytes: 65536
  num_workers: 1
  tokenizer: shards/sample/tokenizer-4k.model
  index_dir: {folder}/index
  sources:
    - {{name: pile, paths: ["shards/sample/train/pile-*"], weight: 0.6}}
    - {{name: dolma, paths: ["shards/sample/train/dolma-*"], weight: 0.4}}
train: {{steps: {steps}, global_batch_size: 8, micro_batch_size: 2}}
optim: {{learning_rate: 1.0e-3, warmup_steps: 5}}
precision: fp32  # some CPUs emulate bf16
checkpoint: {{every: {save_every}, keep: 2}}
evaluation: {{every: {evaluate_every}, suite: {folder}/suite, batch_size: 4}}
wandb: {{mode: disabled}}
"""
COMPARED = ("step", "loss", "grad_norm", "learning_rate", "tokens", "batch_hash")


class Training:
    """One command, started repeatedly on one run folder."""

    def __init__(self, config: Path, folder: RunFolder, ranks: int, overrides: list[str]) -> None:
        self.folder, self.ranks = folder, ranks
        self._command = [sys.executable, "launch/pretrain.py", "--config", str(config), *overrides]
        self._command.append(f"run.name={folder.root.name}")
        self._log = folder.root.parent / f"{folder.root.name}.log"

    def start(self) -> list[subprocess.Popen[bytes]]:
        environment = {"WORLD_SIZE": str(self.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        with self._log.open("ab") as log:
            return [
                subprocess.Popen(
                    self._command,
                    cwd=ROOT,
                    env={**os.environ, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=log,
                    stderr=log,
                )
                for rank in range(self.ranks)
            ]

    def finish(self) -> None:
        codes = [process.wait() for process in self.start()]
        assert codes == [0] * self.ranks, f"exit codes {codes}; see {self._log}"

    def said(self) -> int:
        """Return the size of the log so far, in bytes."""
        return self._log.stat().st_size if self._log.exists() else 0

    def has_begun(self, since: int) -> bool:
        """Return whether the loop has begun since a place in the log, by a resume or a first step."""
        with self._log.open("rb") as log:
            log.seek(since)
            said = log.read()
        return b"resumed after step" in said or b" step 1/" in said

    def steps(self) -> int:
        return self.folder.metrics.path.read_bytes().count(b"\n") if self.folder.metrics.path.exists() else 0

    def saving(self) -> bool:
        """Return whether there is a checkpoint without COMPLETE."""
        folders = [path for path in self.folder.checkpoints.glob("step_*") if path.is_dir()]
        return any(not (folder / "COMPLETE").exists() for folder in folders)


def wait_for(moment: str, training: Training, processes: list[subprocess.Popen[bytes]], choose: random.Random) -> None:
    """Wait for the moment, or until a process has ended."""
    running = lambda: all(process.poll() is None for process in processes)  # noqa: E731
    if moment == "start":
        time.sleep(choose.uniform(0.0, 8.0))
        return
    since = training.said()
    while running() and not training.has_begun(since):
        time.sleep(0.02)
    goal = training.steps() + choose.randint(1, 2 * STEPS_PER_CYCLE)
    while running() and training.steps() < goal:
        time.sleep(0.002)
    while moment == "save" and running() and not training.saving():
        time.sleep(0.0005)
    while moment == "evaluation" and running() and training.steps() % EVALUATE_EVERY:
        time.sleep(0.0005)
    if moment != "step":
        time.sleep(choose.uniform(0.0, 0.03))


def disturb(training: Training, choose: random.Random) -> str:
    """Run one cycle; return what was done to it."""
    moment = choose.choice(["start", "step", "save", "save", "evaluation"])
    number = choose.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
    one_rank = choose.random() < 0.5
    processes = training.start()
    wait_for(moment, training, processes, choose)
    victims = [choose.choice(processes)] if one_rank else processes
    in_save = training.saving()
    for process in victims:
        process.send_signal(number)
    # A launcher takes a while to notice that a rank is gone
    end_of(processes, GRACE_SECONDS if number != signal.SIGKILL else choose.uniform(0.0, 3.0))
    codes = [process.returncode for process in processes]
    if number != signal.SIGKILL and moment != "start":
        assert set(codes) in ({STOPPED}, {0}), f"{number.name} at {moment}: exit codes {codes}"
    where = f"at a {moment}, {'while' if in_save else 'not while'} files are written"
    return f"{number.name} to {'one rank' if one_rank else 'all ranks'} {where}"


def end_of(processes: list[subprocess.Popen[bytes]], grace: float) -> None:
    """Wait for all processes, killing as a launcher does those that outlive the others or the grace period."""
    limit = time.monotonic() + grace
    while time.monotonic() < limit and any(process.poll() is None for process in processes):
        if any(process.poll() not in (None, 0, STOPPED) for process in processes):
            limit = min(limit, time.monotonic() + 5)
        time.sleep(0.05)
    for process in processes:
        process.kill()
        process.wait()


def prepare(folder: Path, steps: int) -> Path:
    """Write a suite of a few documents, and the config."""
    for domain in ("wiki", "code"):
        target = folder / "suite" / domain
        target.mkdir(parents=True)
        documents = islice(read_documents(str(ROOT / "shards/sample/eval" / domain / "val.jsonl.zst")), 3)
        target.joinpath("val.jsonl").write_text("".join(json.dumps({"text": d.text[:1000]}) + "\n" for d in documents))
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(folder=folder, steps=steps, save_every=SAVE_EVERY, evaluate_every=EVALUATE_EVERY))
    return config


def figures(log: StepLog) -> list[tuple[object, ...]]:
    return [tuple(record[key] for key in COMPARED) for record in log.read()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="seed of the disturbances")
    parser.add_argument("--folder", type=Path, help="folder to work in, which is kept; default: a temporary one")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    arguments = parser.parse_intermixed_args()
    choose = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder or Path(name)
        config = prepare(folder, STEPS_PER_CYCLE * arguments.cycles)
        untouched, training = (
            Training(config, RunFolder(folder / name), arguments.ranks, arguments.overrides)
            for name in ("untouched", "disturbed")
        )
        untouched.finish()
        done: Counter[str] = Counter()
        for cycle in range(arguments.cycles):
            what = disturb(training, choose)
            done[what] += 1
            print(f"{cycle + 1}: {what}; {training.steps()} steps recorded", flush=True)
        training.finish()
        expected, found = figures(untouched.folder.metrics), figures(training.folder.metrics)
        evals = [list(run.folder.evals.read()) for run in (untouched, training)]
    for what, times in sorted(done.items()):
        print(f"{times:3d} x {what}")
    equal = found == expected and evals[0] == evals[1]
    verdict = "equal" if equal else "DIFFERENT"
    print(f"{arguments.cycles} cycles, {len(found)} steps, {len(evals[1])} evaluation records: {verdict}")
    return not equal


if __name__ == "__main__":
    sys.exit(main())
