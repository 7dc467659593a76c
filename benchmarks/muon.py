"""Compare Muon with AdamW on the same text, each at its best learning rate: `python benchmarks/muon.py`.

Trains a small model on the bundled text, from three rates on and further by factors of two until the best lies between
two others; then the best again with other seeds, which change weights and data. Prints the mean loss of the last steps
in nats, and after which share of the steps Muon's running mean is where AdamW's ends. No row is seen twice, so the
losses are those of new text. `--png FILE` draws them. A line is printed as each model ends.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple, get_args

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from small_models import batches, make_engine, model_config

from pretrain.model.transformer import LlamaConfig
from pretrain.optim import OptimConfig, OptimizerName, learning_rate_at
from pretrain.parallel_config import ParallelConfig
from pretrain.run.metrics import Meter
from pretrain.topology import Topology, started

ROWS, LENGTH, LAST = 16, 64, 20
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)


class Run(NamedTuple):
    """The losses of a run's steps, and its processor's seconds a step."""

    losses: list[float]
    seconds: float

    @property
    def last(self) -> float:
        """The mean loss of the last steps; infinite if the run has diverged."""
        mean = statistics.mean(self.losses[-LAST:])
        return mean if math.isfinite(mean) else math.inf


class Search(NamedTuple):
    """One optimizer's runs: of the first seed by learning rate, and of all seeds at the best."""

    by_rate: dict[float, Run]
    at_best: list[Run]

    @property
    def best(self) -> float:
        return best_rate(self.by_rate)


class Task(NamedTuple):
    """A model and its batches, to be trained."""

    model: LlamaConfig
    steps: int
    index: Path
    topology: Topology


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--init-std", type=float, help="of the weights; the default is 1 / sqrt(width)")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3], help="where the search begins")
    parser.add_argument("--seeds", type=int, default=3, help="at the best rate")
    parser.add_argument("--png", type=Path, help="where to draw a picture")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as index, started(ParallelConfig()) as topology:
        init = {"init_std": arguments.init_std or arguments.width**-0.5}
        model = model_config(arguments.width, arguments.layers, "standard").model_copy(update=init)
        task = Task(model, arguments.steps, Path(index), topology)
        found = {name: search(name, arguments.rates, arguments.seeds, task) for name in OPTIMIZERS}
    print(table(found))
    if arguments.png:
        draw(found, arguments.png)


def search(name: OptimizerName, rates: list[float], seeds: int, task: Task) -> Search:
    """Find an optimizer's best rate, and train with it from several seeds."""
    by_rate = {rate: train(name, rate, 0, task) for rate in rates}
    while (best := best_rate(by_rate)) in (lowest := min(by_rate), highest := max(by_rate)):
        rate = lowest / 2 if best == lowest else highest * 2
        by_rate[rate] = train(name, rate, 0, task)
    return Search(by_rate, [by_rate[best], *(train(name, best, seed, task) for seed in range(1, seeds))])


def best_rate(by_rate: dict[float, Run]) -> float:
    return min(by_rate, key=lambda rate: by_rate[rate].last)


def train(name: OptimizerName, rate: float, seed: int, task: Task) -> Run:
    """Train a model with a linear schedule, of which the first tenth is a warm-up."""
    optim = OptimConfig(name=name, learning_rate=rate, schedule="linear", warmup_steps=task.steps // 10, floor=0.0)
    engine = make_engine(task.model, optim, ROWS, task.topology, seed)
    losses, begun = [], time.process_time()
    data = batches(ROWS, LENGTH, seed, task.index)
    for step, (tokens, segment_ids, n_targets) in zip(range(task.steps), data, strict=False):
        now = learning_rate_at(step, optim, task.steps)
        losses.append(engine.train_step(tokens, segment_ids, n_targets, step, now, Meter()).loss)
    run = Run(losses, (time.process_time() - begun) / task.steps)
    print(f"{name} {rate:.2e} seed {seed}: {run.last:.4f}, {run.seconds:.3f} s a step", flush=True)
    return run


def smoothed(losses: list[float]) -> list[float]:
    """Return the mean of each loss and those before it, as many as count as the last."""
    return [statistics.mean(losses[max(0, end - LAST) : end]) for end in range(1, len(losses) + 1)]


def table(found: dict[OptimizerName, Search]) -> str:
    """Return Markdown: the losses by rate, those of all seeds at the best, and what Muon saves."""
    rates = sorted({rate for search in found.values() for rate in search.by_rate})
    lines = [
        f"| optimizer | {' | '.join(f'{rate:.1e}' for rate in rates)} | best rate, by seed | s a step |",
        "|" + "---|" * (len(rates) + 3),
    ]
    for name, search in found.items():
        by_rate = [f"{search.by_rate[rate].last:.3f}" if rate in search.by_rate else "" for rate in rates]
        seeds = ", ".join(f"{run.last:.3f}" for run in search.at_best)
        seconds = statistics.median(run.seconds for run in search.by_rate.values())
        lines.append(f"| {name} | {' | '.join(by_rate)} | {search.best:.1e}: {seeds} | {seconds:.3f} |")
    shares = []
    for adamw, muon in zip(found["adamw"].at_best, found["muon"].at_best, strict=True):
        reached = [step for step, loss in enumerate(smoothed(muon.losses), start=1) if loss <= adamw.last]
        shares.append(f"{reached[0] / len(muon.losses):.0%}" if reached else "never")
    return "\n".join([*lines, "", f"Muon is where AdamW ends after {', '.join(shares)} of the steps, by seed."])


def draw(found: dict[OptimizerName, Search], path: Path) -> None:
    """Draw the loss over the rate, and over the tokens at the best rate, a line for each seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(8, 3.2), layout="constrained", dpi=110)
    FigureCanvasAgg(picture)
    by_rate, over_tokens = picture.subplots(1, 2)
    for (name, search), color in zip(found.items(), ("0.55", "0.0"), strict=True):
        rates = sorted(search.by_rate)
        by_rate.semilogx(rates, [search.by_rate[rate].last for rate in rates], "o-", color=color, ms=3, label=name)
        for number, run in enumerate(search.at_best):
            tokens = [ROWS * LENGTH * step / 1000 for step in range(1, len(run.losses) + 1)]
            label = f"{name}, {search.best:.1e}" if number == 0 else None
            over_tokens.plot(tokens, smoothed(run.losses), color=color, lw=1, label=label)
    ends = [run.last for search in found.values() for run in search.at_best]
    over_tokens.set_ylim(min(ends) - 0.1, max(ends) + 2)
    tried = sorted({rate for search in found.values() for rate in search.by_rate})
    by_rate.set_xticks(tried, [f"{rate:.1e}" for rate in tried])
    by_rate.minorticks_off()
    by_rate.set_xlabel("learning rate", fontsize=8)
    by_rate.set_ylabel(f"loss of the last {LAST} steps, nats", fontsize=8)
    over_tokens.set_xlabel("thousand tokens", fontsize=8)
    over_tokens.set_ylabel(f"mean loss of {LAST} steps, nats", fontsize=8)
    for axes in (by_rate, over_tokens):
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=7)
    picture.savefig(path)


if __name__ == "__main__":
    main()
