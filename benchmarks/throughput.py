"""Measure how fast a config's model trains on this machine: tokens/s, MFU, peak memory, without the loader.

    python benchmarks/throughput.py --config configs/llama-125m-pile.yaml [key.path=value ...]
    deepspeed benchmarks/throughput.py --config configs/llama-7b-pile-dolma-tp2.yaml --micro-batch-sizes 1 2 4

Each micro-batch size runs in turn on random rows; medians after a warm-up. All ranks are measured together. For one
GPU, `benchmarks/gpu.py` tries a range of settings.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from training_rows import Rows

from pretrain.config import RunConfig, load_config
from pretrain.engine import Engine
from pretrain.model.compilation import compiled_graphs
from pretrain.model.size import flops_per_token, memory_per_rank
from pretrain.run.metrics import device_meter, mfu, peak_memory_bytes, total_peak_flops
from pretrain.topology import Topology, started


class Training:
    """Training steps of a config's model on the same random rows.

    Args:
        micro_batch_size, micro_steps: rows of a forward pass on each rank, and forward passes in a step.
        document_tokens: length of the documents in the rows; None: one document a row.
    """

    def __init__(
        self,
        config: RunConfig,
        here: Topology,
        micro_batch_size: int,
        micro_steps: int = 1,
        document_tokens: int | None = None,
    ) -> None:
        self._config, self._here = config, here
        self._micro_batch_size = micro_batch_size
        parts = config.model, config.optim, config.parallel, config.deepspeed_config()
        self.engine = Engine(*parts, micro_batch_size, micro_steps, here, config.run.seed)
        size = micro_batch_size * micro_steps, config.data.seq_len, config.model.vocab_size
        self._rows = Rows.draw(*size, document_tokens, seed=here.dp_rank)
        self._tokens = self._rows.tokens.to(here.device)
        self._meter = device_meter(here.device)

    def step(self) -> dict[str, float]:
        """Make a step; return the seconds of its parts and of the whole, which ends with the device's work."""
        self._meter.start_step()
        n_targets = self._rows.n_targets * self._here.dp_size
        self.engine.train_step(self._tokens, self._rows.segment_ids, n_targets, 0, 1e-4, self._meter)
        return self._meter.end_step()

    def measure(self, steps: int, warmup: int) -> dict[str, object]:
        """Make `warmup + steps` steps; return medians over the last `steps`."""
        config, here = self._config, self._here
        begin = time.perf_counter()
        for _ in range(warmup):
            self.step()
        warmup_seconds, graphs = time.perf_counter() - begin, compiled_graphs()
        parts = [self.step() for _ in range(steps)]
        median = {part: statistics.median(each[part] for each in parts) for part in parts[0]}
        speed = self._rows.targets.numel() * here.dp_size / median["step"]
        flops = flops_per_token(config.model, self._rows.context)
        share = mfu(flops, speed, total_peak_flops(config.metrics, here))
        work = dataclasses.replace(config.workload(here.dp_size), micro_batch_size=self._micro_batch_size)
        estimate = memory_per_rank(work)
        return {
            "tokens_per_second": round(speed),
            "mfu": None if share is None else round(share, 4),
            "flops_per_token": flops,
            "peak_memory_gb": round(peak_memory_bytes(here.device) / 1e9, 2),
            "estimated_memory_gb": round(estimate.total / 1e9, 2),
            "estimated_host_gb": round(estimate.host / 1e9, 2),
            "median_seconds": {part: round(seconds, 5) for part, seconds in median.items()},
            "step_seconds": [round(each["step"], 5) for each in parts],
            "warmup_seconds": round(warmup_seconds, 2),
            "graphs_compiled_after_warmup": compiled_graphs() - graphs,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--micro-batch-sizes", type=int, nargs="+", help="default: the config's")
    parser.add_argument("--document-tokens", type=int, help="length of the documents; default: one document a row")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    with started(config.parallel) as here:
        device = torch.cuda.get_device_name() if here.device.type == "cuda" else "CPU"
        for size in arguments.micro_batch_sizes or [config.micro_batch_size(here.dp_size)]:
            if here.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            training = Training(config, here, size, document_tokens=arguments.document_tokens)
            result = training.measure(arguments.steps, arguments.warmup)
            if here.is_main:
                print(json.dumps({"device": device, "ranks": here.world_size, "micro_batch_size": size, **result}))
            del training
    return 0


if __name__ == "__main__":
    sys.exit(main())
