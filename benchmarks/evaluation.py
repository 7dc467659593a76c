"""Measure how fast a suite is scored: tokens/s of the whole evaluation, and of bare forward passes over full rows.

    python benchmarks/evaluation.py --config configs/x.yaml --suite shards/sample/eval [key.path=value ...]

The forward passes have as many rows, each a single document of seq_len tokens without padding, and their logits are not
used. The evaluation includes padding, the losses and the sums of each document, but not loading the suite.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from pretrain.config import load_config
from pretrain.evaluation.eval_set import find_suite, load_suite
from pretrain.evaluation.scoring import evaluate
from pretrain.inference.forward_model import ForwardModel
from pretrain.model.transformer import LlamaConfig
from pretrain.model.weights import weight_specs
from pretrain.topology import started
from shards import Tokenizer


class Drawn:
    """Weights drawn like those of a model before its first step."""

    def __init__(self, config: LlamaConfig) -> None:
        self._specs = weight_specs(config)

    def read(self, name: str, index: int = 0, count: int = 1) -> Tensor:
        spec = self._specs[name]
        return (torch.randn(spec.shape) * 0.02)[spec.bounds(index, count)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--suite", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3, help="repetitions, alternating, of which medians are shown")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, [*arguments.overrides, f"evaluation.suite={arguments.suite}"])
    seq_len, batch_size = config.data.seq_len, config.evaluation.batch_size or 8
    tokenizer = Tokenizer.of(config.data)
    with started(config.parallel) as here:
        model = ForwardModel(config.model, config.parallel, config.precision, here)
        model.set_weights(Drawn(config.model))
        suite = find_suite(config.evaluation)
        assert suite is not None
        eval_set = load_suite(suite, config.evaluation, tokenizer, seq_len, "bf16", here.dp_rank, here.dp_size)
        targets = int(eval_set.targets.sum())
        passes = -(-eval_set.num_rows // (here.dp_size * batch_size))
        tokens = torch.randint(config.model.vocab_size, (batch_size, seq_len), device=here.device)
        segment_ids = torch.ones(tokens.shape, dtype=torch.int64)
        rates: dict[str, list[float]] = {"evaluation": [], "forward": []}
        for _ in range(arguments.repeats):
            begin = time.perf_counter()
            evaluate(model.score, eval_set, here, batch_size)
            rates["evaluation"].append(targets / (time.perf_counter() - begin))
            begin = time.perf_counter()
            for _ in range(passes):
                model.logits(tokens, segment_ids)
            if here.device.type == "cuda":
                torch.cuda.synchronize()
            rates["forward"].append(passes * batch_size * seq_len * here.dp_size / (time.perf_counter() - begin))
    medians = {name: statistics.median(found) for name, found in rates.items()}
    full = eval_set.num_rows * seq_len
    result = {
        "targets": targets,
        "rows": eval_set.num_rows,
        "share of positions that are targets": round(targets / full, 4),
        "evaluation tokens/s": round(medians["evaluation"]),
        "forward-only tokens/s": round(medians["forward"]),
        "ratio": round(medians["evaluation"] / medians["forward"], 3),
    }
    if here.is_main:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
