"""Time what `metrics.noise_scale` costs: `python benchmarks/gradient_noise.py [--micro-batch-size 4] [--steps 40]`.

One rank trains the quickstart's model on the same rows, in turns with and without the norms of the micro-batches'
gradients. Prints the medians of both in seconds of the processor, which other work on the machine changes less than the
clock's. `--tiny` is for a try.
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

from pretrain.config import load_config
from pretrain.engine import Engine
from pretrain.run.metrics import Meter
from pretrain.topology import started

QUICKSTART = Path(__file__).resolve().parents[1] / "configs/quickstart.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro-batch-size", type=int, default=4, help="rows, of the 8 of a step")
    parser.add_argument("--steps", type=int, default=40, help="steps of each kind")
    parser.add_argument("--tiny", action="store_true", help="a model of no use, to see that the script works")
    arguments = parser.parse_args()
    config = load_config(QUICKSTART, ["model.dim=32", "model.ffn_dim=32"] * arguments.tiny)
    n_rows, size = config.train.global_batch_size, arguments.micro_batch_size
    rows = Rows.draw(n_rows, config.data.seq_len, config.model.vocab_size, config.data.seq_len // 2)
    parts = (config.model, config.optim, config.parallel, config.deepspeed_config())
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with started(config.parallel) as topology:
        engines = {kind: Engine(*parts, size, n_rows // size, topology, 0, kind) for kind in seconds}
        for number in range(2 * (arguments.steps + 2)):
            kind, start = bool(number % 2), time.process_time()
            engines[kind].train_step(rows.tokens, rows.segment_ids, rows.n_targets, number // 2, 1e-3, Meter())
            if number >= 4:  # the first two of each kind allocate
                seconds[kind].append(time.process_time() - start)
    without, with_norms = (statistics.median(seconds[kind]) for kind in (False, True))
    print(
        f"{n_rows // size} micro-batches of {size} rows, medians of {arguments.steps} steps, seconds of the processor"
    )
    print(f"without: {without:.4f}")
    print(f"with:    {with_norms:.4f}, {with_norms / without - 1:+.2%}")


if __name__ == "__main__":
    main()
