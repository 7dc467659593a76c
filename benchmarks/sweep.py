"""Measure what a sweep of small runs saves by forking them: `python benchmarks/sweep.py --runs 8 --steps 20`.

Trains the quickstart's model at as many learning rates, once with each run in a process that imports everything for
itself and once with runs forked from a process that has, and compares their losses, which are equal.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.cluster.submission import runs_of
from pretrain.commands.sweep import plans_of, slots_of
from pretrain.sweep.local import LocalSweep
from pretrain.sweep.slot import Slot

CONFIG = Path("configs/quickstart.yaml")


def cpu_seconds() -> float:
    """Return the CPU's seconds of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def train(folder: Path, n_runs: int, steps: int, jobs: int, is_warm: bool) -> tuple[float, float, list[list[float]]]:
    """Train the runs; return the seconds that it took, those of the CPU, and each run's losses."""
    rates = folder / "sweep.yaml"
    rates.write_text(json.dumps({"optim.learning_rate": [(i + 1) * 1e-3 for i in range(n_runs)]}))
    typed = [f"run.dir={folder}", f"train.steps={steps}", "evaluation.suite=null", "wandb.mode=disabled"]
    plans = plans_of(CONFIG, typed, runs_of(CONFIG, typed, rates))
    slots = [Slot(slot.environment, is_warm) for slot in slots_of(jobs)]
    sweep = LocalSweep(folder / "x.sweep", plans, slots)
    begun, used = time.perf_counter(), cpu_seconds()
    while not sweep.is_done:
        sweep.advance()
        time.sleep(0.1)
    seconds, of_cpu = time.perf_counter() - begun, cpu_seconds() - used
    assert all(point.state == "finished" for point in sweep.points), [point.note for point in sweep.points]
    records = [(plan.folder / "metrics.jsonl").read_text().splitlines() for plan in plans]
    return seconds, of_cpu, [[json.loads(line)["loss"] for line in lines] for lines in records]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    losses = []
    for is_warm in (False, True, False, True):
        with tempfile.TemporaryDirectory() as folder:
            seconds, of_cpu, found = train(Path(folder), arguments.runs, arguments.steps, arguments.jobs, is_warm)
        losses.append(found)
        how = "forked from a process that has imported all" if is_warm else "a process that imports all for itself"
        print(f"{seconds:6.1f} s, {of_cpu:6.1f} s of CPU for {arguments.runs} runs, each {how}", flush=True)
    assert all(found == losses[0] for found in losses), "the losses differ"
    print("losses are equal")


if __name__ == "__main__":
    main()
