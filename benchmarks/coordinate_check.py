"""Check that activations move as much in wide models as in narrow ones: `python benchmarks/coordinate_check.py`.

Trains models of several widths for a few steps on the same batch, with the standard parametrization and with mup.
Prints how far the residual stream after the last block and the logits have moved from those of the initial weights, as
a root mean square, and the exponent of the width that they grow with; with mup they do not. `--png FILE` draws it.

Source: Yang et al. 2022, arXiv 2203.03466, appendix D.1.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import get_args

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from small_models import PARAMETRIZATIONS, batches, make_engine, model_config
from torch import Tensor

from pretrain.engine import Engine
from pretrain.model.transformer import LlamaConfig
from pretrain.optim import OptimConfig, OptimizerName
from pretrain.parallel_config import ParallelConfig
from pretrain.run.metrics import Meter
from pretrain.topology import Topology, started

ROWS, LENGTH, RATE = 8, 64, 4e-3
FIGURES = ("residual stream", "logits")
Moves = dict[tuple[str, str, int], dict[int, float]]  # parametrization, figure, step -> width -> root mean square


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--optimizer", choices=get_args(OptimizerName), default="adamw")
    parser.add_argument("--png", type=Path, help="where to draw a picture")
    arguments = parser.parse_args()
    moves: Moves = defaultdict(dict)
    with tempfile.TemporaryDirectory() as index, started(ParallelConfig()) as topology:
        batch = next(batches(ROWS, LENGTH, 0, Path(index)))
        for parametrization in PARAMETRIZATIONS:
            for width in arguments.widths:
                runs = [
                    moved(
                        model_config(width, arguments.layers, parametrization),
                        OptimConfig(name=arguments.optimizer, learning_rate=RATE, weight_decay=0.0),
                        arguments.steps,
                        seed,
                        batch,
                        topology,
                    )
                    for seed in range(arguments.seeds)
                ]
                for key in runs[0]:
                    moves[parametrization, *key][width] = math.sqrt(sum(run[key] ** 2 for run in runs) / len(runs))
    print(table(moves, arguments.widths))
    if arguments.png:
        draw(moves, arguments.png)


def moved(
    config: LlamaConfig,
    optim: OptimConfig,
    steps: int,
    seed: int,
    batch: tuple[Tensor, Tensor, int],
    topology: Topology,
) -> dict[tuple[str, int], float]:
    """Train a model; return how far each figure has moved after each step."""
    tokens, segment_ids, n_targets = batch
    engine = make_engine(config, optim, ROWS, topology, seed)
    first = activations(engine, tokens, segment_ids)
    found = {}
    for step in range(steps):
        engine.train_step(tokens, segment_ids, n_targets, step, RATE, Meter())
        for name, now, before in zip(FIGURES, activations(engine, tokens, segment_ids), first, strict=True):
            found[name, step + 1] = float((now - before).square().mean().sqrt())
    return found


@torch.no_grad()
def activations(engine: Engine, tokens: Tensor, segment_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the residual stream after the last block, and the logits."""
    seen: list[Tensor] = []
    last = engine.model.blocks[-1]
    with last.register_forward_hook(lambda _block, _inputs, x: seen.append(x.clone())):
        logits = engine.model.eval()(tokens[:, :-1], segment_ids[:, :-1])
    return seen[0], logits


def exponent(by_width: dict[int, float]) -> float:
    """Fit the exponent of a power law of the width, by least squares of the logarithms."""
    x = [math.log(width) for width in by_width]
    y = [math.log(value) for value in by_width.values()]
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - x_mean) ** 2 for a in x)


def table(moves: Moves, widths: list[int]) -> str:
    """Return a Markdown table: a row for each parametrization, figure and step."""
    lines = [
        "| parametrization | what has moved | step | "
        + " | ".join(f"width {width}" for width in widths)
        + " | exponent |",
        "|" + "---|" * (len(widths) + 4),
    ]
    for (parametrization, figure, step), by_width in moves.items():
        values = " | ".join(f"{value:.3g}" for value in by_width.values())
        lines.append(f"| {parametrization} | {figure} | {step} | {values} | {exponent(by_width):+.2f} |")
    return "\n".join(lines)


def draw(moves: Moves, path: Path) -> None:
    """Draw a panel for each parametrization and figure, a line for each step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(9, 3), layout="constrained", dpi=110)
    FigureCanvasAgg(picture)
    panels = [(figure, parametrization) for figure in FIGURES for parametrization in PARAMETRIZATIONS]
    steps = max(step for _, _, step in moves)
    for axes, (figure, parametrization) in zip(picture.subplots(1, len(panels)), panels, strict=True):
        for step in range(1, steps + 1):
            by_width = moves[parametrization, figure, step]
            shade = str(0.75 * (1 - step / steps))
            axes.loglog(list(by_width), list(by_width.values()), "o-", color=shade, ms=3, label=f"step {step}")
        axes.set_title(f"{figure}, {parametrization}", fontsize=9)
        axes.set_xlabel("width", fontsize=8)
        axes.set_xticks(list(by_width), [str(width) for width in by_width], fontsize=7)
        axes.minorticks_off()
        axes.tick_params(axis="y", labelsize=7)
        everything = [v for (_, name, _), found in moves.items() if name == figure for v in found.values()]
        axes.set_ylim(min(everything) / 1.3, max(everything) * 1.3)
    picture.axes[0].set_ylabel("rms of the change", fontsize=8)
    picture.axes[0].legend(fontsize=7)
    picture.savefig(path)


if __name__ == "__main__":
    main()
