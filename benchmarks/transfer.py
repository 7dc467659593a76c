"""Find the best learning rate of models of several sizes: `python benchmarks/transfer.py --widths 64 128 256`.

Trains each size at each rate, with the standard parametrization and with mup, for as many steps of the bundled text.
Initial values have a standard deviation of 1 / sqrt(width), under mup that of the base's width.
Prints the mean loss of the last steps in nats, the best rate of each size by a parabola through the best of the grid
and its neighbours, and by which factor that rate moves from one size to another. `--depths 2 4 8` goes by depth at the
first width instead. `--png FILE` draws it. A line is printed as each model ends, since all take a while; `--keep FILE`
also notes it there, and trains none again that is noted.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from small_models import BASE_DIM, PARAMETRIZATIONS, Kept, batches, make_engine, model_config

from pretrain.optim import OptimConfig, learning_rate_at
from pretrain.parallel_config import ParallelConfig
from pretrain.run.metrics import Meter
from pretrain.topology import Topology, started

ROWS, LENGTH, LAST = 16, 64, 20
Size = tuple[int, int]  # width, depth
Losses = dict[tuple[str, Size], dict[float, float]]  # rate -> mean over the seeds of the loss of the last steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--depths", type=int, nargs="+", help="several depths, all of the first width")
    parser.add_argument("--layers", type=int, default=2, help="of every width")
    parser.add_argument("--rates", type=float, nargs="+", default=[2.0**-power for power in range(10, 3, -1)])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--png", type=Path, help="where to draw a picture")
    parser.add_argument("--keep", type=Path, help="a file of JSON lines, with losses by size and rate")
    arguments = parser.parse_args()
    sizes = [(width, arguments.layers) for width in arguments.widths]
    if arguments.depths:
        sizes = [(arguments.widths[0], depth) for depth in arguments.depths]
    losses: Losses = defaultdict(dict)
    kept = Kept(arguments.keep)
    with tempfile.TemporaryDirectory() as index, started(ParallelConfig()) as topology:
        for parametrization in PARAMETRIZATIONS:
            for size in sizes:
                for rate in arguments.rates:
                    found = []
                    for seed in range(arguments.seeds):
                        what = [parametrization, *size, rate, arguments.steps, seed]
                        train = functools.partial(
                            last_loss, parametrization, size, rate, arguments.steps, seed, Path(index), topology
                        )
                        found.append(kept.get(what, train))
                    losses[parametrization, size][rate] = statistics.mean(found)
                    print(f"{parametrization} {size} {rate:.2e} {statistics.mean(found):.4f}", flush=True)
    print(table(losses, arguments.rates))
    if arguments.png:
        draw(losses, arguments.png)


def last_loss(
    parametrization: str, size: Size, rate: float, steps: int, seed: int, index: Path, topology: Topology
) -> float:
    """Train a model; return the mean loss of the last steps; infinite if it has diverged."""
    optim = OptimConfig(learning_rate=rate, schedule="linear", warmup_steps=steps // 10, floor=0.0)
    width = size[0] if parametrization == "standard" else BASE_DIM  # mup derives this size's from the base's
    model = model_config(*size, parametrization).model_copy(update={"init_std": width**-0.5})
    engine = make_engine(model, optim, ROWS, topology, seed)
    found = []
    for step, (tokens, segment_ids, n_targets) in zip(range(steps), batches(ROWS, LENGTH, seed, index), strict=False):
        now = learning_rate_at(step, optim, steps)
        found.append(engine.train_step(tokens, segment_ids, n_targets, step, now, Meter()).loss)
    mean = statistics.mean(found[-LAST:])
    return mean if math.isfinite(mean) else math.inf


def best_rate(by_rate: dict[float, float]) -> float:
    """Return the rate at the lowest point of a parabola in its logarithm; at an end of the grid, that end."""
    rates = sorted(by_rate)
    place = min(range(len(rates)), key=lambda i: by_rate[rates[i]])
    if place in (0, len(rates) - 1) or not math.isfinite(by_rate[rates[place + 1]]):
        return rates[place]
    x, y = zip(*((math.log(rate), by_rate[rate]) for rate in rates[place - 1 : place + 2]), strict=True)
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    return math.exp((x[0] + x[1]) / 2 - left * (x[2] - x[0]) / 2 / (right - left))


def table(losses: Losses, rates: list[float]) -> str:
    """Return a Markdown table: a row for each parametrization and size."""
    lines = [
        f"| parametrization | width x layers | {' | '.join(f'{rate:.1e}' for rate in rates)} | best rate |",
        "|" + "---|" * (len(rates) + 3),
    ]
    best: dict[str, list[float]] = defaultdict(list)
    for (parametrization, (width, depth)), by_rate in losses.items():
        best[parametrization].append(best_rate(by_rate))
        values = " | ".join(f"{by_rate[rate]:.3f}" for rate in rates)
        lines.append(f"| {parametrization} | {width} x {depth} | {values} | {best[parametrization][-1]:.2e} |")
    moved = [f"{name} by a factor of {max(found) / min(found):.2f}" for name, found in best.items()]
    return "\n".join([*lines, "", f"The best rate moves: {', '.join(moved)}."])


def draw(losses: Losses, path: Path) -> None:
    """Draw the loss over the rate: a panel for each parametrization, a line for each size, its best rate marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(8, 3.2), layout="constrained", dpi=110)
    FigureCanvasAgg(picture)
    sizes = list(dict.fromkeys(size for _, size in losses))
    for axes, parametrization in zip(
        picture.subplots(1, len(PARAMETRIZATIONS), sharey=True), PARAMETRIZATIONS, strict=True
    ):
        for number, (width, depth) in enumerate(sizes):
            by_rate = {r: loss for r, loss in losses[parametrization, (width, depth)].items() if math.isfinite(loss)}
            shade = str(0.75 * (1 - (number + 1) / len(sizes)))
            axes.semilogx(list(by_rate), list(by_rate.values()), "o-", color=shade, ms=3, label=f"{width} x {depth}")
            axes.axvline(best_rate(losses[parametrization, (width, depth)]), color=shade, ls=":", lw=1)
        tried = sorted({rate for by_rate in losses.values() for rate in by_rate})
        axes.set_xticks(tried, [f"{rate:.0e}" for rate in tried])
        axes.minorticks_off()
        axes.set_title(parametrization, fontsize=9)
        axes.set_xlabel("learning rate", fontsize=8)
        axes.tick_params(labelsize=7)
    finite = [loss for by_rate in losses.values() for loss in by_rate.values() if math.isfinite(loss)]
    picture.axes[0].set_ylim(min(finite) - 0.1, min(min(finite) + 2.0, max(finite) + 0.1))
    picture.axes[0].set_ylabel(f"loss of the last {LAST} steps, nats", fontsize=8)
    picture.axes[0].legend(title="width x layers", fontsize=7, title_fontsize=7)
    picture.savefig(path)


if __name__ == "__main__":
    main()
