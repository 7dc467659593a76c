"""Time what `metrics.layers_every` costs: `python benchmarks/layers.py [--repeats 7]`.

One rank makes training steps of one model on the same rows, in turns with and without the layers' figures. Prints the
medians of both, what the figures add, within the step and beside it, and what that comes to at one measured step in a
hundred. `--tiny` is for a try.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training_rows import Rows

from pretrain.deepspeed_keys import deepspeed_config
from pretrain.engine import Engine
from pretrain.model.size import parameter_count
from pretrain.model.transformer import LlamaConfig
from pretrain.optim import OptimConfig
from pretrain.parallel_config import ParallelConfig
from pretrain.run.metrics import Meter, MetricsConfig
from pretrain.topology import started

MODEL = LlamaConfig(dim=512, n_layers=8, n_heads=8, vocab_size=32_000)
TINY = LlamaConfig(dim=64, n_layers=2, n_heads=4, vocab_size=1000)
ROWS, LENGTH, DOCUMENT = 8, 512, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="steps of each kind")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--tiny", action="store_true", help="a model of no use, to see that the script works")
    arguments = parser.parse_args()
    model, optim = TINY if arguments.tiny else MODEL, OptimConfig(learning_rate=1e-4)
    parallel = ParallelConfig()
    rows = Rows.draw(ROWS, LENGTH, model.vocab_size, DOCUMENT)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    beside: list[float] = []
    with started(parallel) as topology:
        ds_config = deepspeed_config(parallel, optim, arguments.precision, {})
        engine = Engine(model, optim, parallel, ds_config, ROWS, 1, topology, seed=0)
        for number in range(2 * (arguments.repeats + 1)):
            measured, start = bool(number % 2), time.perf_counter()
            stats = engine.train_step(rows.tokens, rows.segment_ids, rows.n_targets, number, 1e-4, Meter(), measured)
            whole = time.perf_counter() - start
            if number < 2:
                continue  # the first of each kind
            apart = stats.layers.seconds if stats.layers else 0.0
            seconds[measured].append(whole - apart)
            beside += [apart] if measured else []
    plain, within, passes = (statistics.median(values) for values in (seconds[False], seconds[True], beside))
    every = MetricsConfig().layers_every
    assert every is not None
    print(
        f"{parameter_count(model) / 1e6:.3g}M parameters, {ROWS} x {LENGTH} tokens, {arguments.precision}, medians of"
    )
    print(f"{arguments.repeats} steps: {plain:.2f} s without figures")
    print(f"activations, beside the step:       {passes:.2f} s")
    print(f"norms of weights, within the step:  {within - plain:.2f} s")
    print(f"at one step in {every}: {(within - plain + passes) / plain / every:.2%} of the time")


if __name__ == "__main__":
    main()
