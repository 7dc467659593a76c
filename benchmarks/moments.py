"""Compare moments in fp32 and in bf16, rounded at random and to the nearest: `python benchmarks/moments.py`.

Trains a small model on the bundled text with each, from several seeds, which change weights and data. Prints the mean
loss of the last steps in nats, and how much larger the root of AdamW's second moment is at the end than that of fp32,
as the median over all weights. Rounding to the nearest is what `optim.moments: bf16` does not do. A line is printed as
each model ends.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from small_models import batches, make_engine, model_config
from torch import Tensor

from pretrain import adamw
from pretrain.engine import Engine
from pretrain.optim import OptimConfig, learning_rate_at
from pretrain.parallel_config import ParallelConfig
from pretrain.run.metrics import Meter
from pretrain.topology import Topology, started

ROWS, LENGTH, LAST = 16, 64, 20
WIDTH, LAYERS, RATE = 128, 4, 8e-3
KINDS = ("fp32", "bf16", "bf16, to the nearest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--beta2", type=float, nargs="+", default=[0.95, 0.999])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    losses: dict[tuple[float, str], list[float]] = defaultdict(list)
    ratios: dict[tuple[float, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as index, started(ParallelConfig()) as topology:
        for beta2 in arguments.beta2:
            for seed in range(arguments.seeds):
                exact = None
                for kind in KINDS:
                    engine, loss = train(kind, beta2, seed, arguments.steps, Path(index), topology)
                    found = second_moment(engine)
                    exact = found if exact is None else exact
                    losses[beta2, kind].append(loss)
                    ratios[beta2, kind].append(float((found / exact).nanmedian().sqrt()))
                    print(f"{beta2} {kind}, seed {seed}: {loss:.4f}, {ratios[beta2, kind][-1]:.4f}", flush=True)
    print(
        f"| beta2 | moments | {' | '.join(f'seed {seed}' for seed in range(arguments.seeds))} | mean | second moment |"
    )
    print("|" + "---|" * (arguments.seeds + 4))
    for (beta2, kind), values in losses.items():
        cells = [f"{value:.3f}" for value in (*values, statistics.mean(values))]
        print(f"| {beta2} | {kind} | {' | '.join(cells)} | {statistics.mean(ratios[beta2, kind]):.3f} |")


def train(kind: str, beta2: float, seed: int, steps: int, index: Path, topology: Topology) -> tuple[Engine, float]:
    """Train a model with moments of a kind; return it, and the mean loss of the last steps."""
    model = model_config(WIDTH, LAYERS, "standard").model_copy(update={"init_std": WIDTH**-0.5})
    values = {"learning_rate": RATE, "schedule": "linear", "warmup_steps": steps // 10, "floor": 0.0}
    optim = OptimConfig.parse({**values, "betas": [0.9, beta2], "moments": kind[:4]})
    engine = make_engine(model, optim, ROWS, topology, seed)
    rounded = (lambda values, _: values.bfloat16()) if "nearest" in kind else adamw.rounded_at_random
    found = []
    with mock.patch.object(adamw, "rounded_at_random", rounded):
        for step, (tokens, segment_ids, n_targets) in zip(
            range(steps), batches(ROWS, LENGTH, seed, index), strict=False
        ):
            now = learning_rate_at(step, optim, steps)
            found.append(engine.train_step(tokens, segment_ids, n_targets, step, now, Meter()).loss)
    return engine, statistics.mean(found[-LAST:])


def second_moment(engine: Engine) -> Tensor:
    """Return the running means of the squared gradients of all weights, flat."""
    states = engine.deepspeed.optimizer.optimizer.state.values()
    return torch.cat([state["exp_avg_sq"].float().flatten() for state in states])


if __name__ == "__main__":
    main()
