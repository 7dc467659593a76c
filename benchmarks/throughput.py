"""Measure how fast a config's model trains on this machine: tokens/s, MFU, peak memory, without the loader.

    python benchmarks/throughput.py --config configs/llama-125m-pile.yaml [key.path=value ...]
    deepspeed benchmarks/throughput.py --config configs/llama-7b-pile-dolma-tp2.yaml --micro-batch-sizes 1 2 4

Each micro-batch size runs in turn, one micro-step per step, on rows of three documents each; medians after a warm-up.
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
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from pretrain.config import RunConfig, load_config
from pretrain.engine import Engine
from pretrain.model.pieces import valid_targets
from pretrain.model.size import flops_per_token, memory_per_rank
from pretrain.run.metrics import device_meter, mfu, peak_flops_of, peak_memory_bytes
from pretrain.topology import Topology, started


def measure(config: RunConfig, here: Topology, micro_batch_size: int, steps: int, warmup: int) -> dict[str, object]:
    """Train `warmup + steps` steps of one micro-batch each; return medians over the last `steps`."""
    parts = config.model, config.optim, config.parallel, config.deepspeed_config()
    engine = Engine(*parts, micro_batch_size, 1, here, config.run.seed)
    seq_len = config.data.seq_len
    generator = torch.Generator().manual_seed(here.dp_rank)
    tokens = torch.randint(config.model.vocab_size, (micro_batch_size, seq_len + 1), generator=generator)
    segment_ids = (torch.arange(seq_len + 1) * 3 // (seq_len + 1) + 1).expand_as(tokens).contiguous()
    tokens = tokens.to(here.device)
    n_targets = int(valid_targets(segment_ids).sum()) * here.dp_size
    meter = device_meter(here.device)
    seconds = []
    for step in range(warmup + steps):
        start = time.perf_counter()
        engine.train_step(tokens, segment_ids, n_targets, step, 1e-4, meter)
        seconds.append(time.perf_counter() - start)
    tokens_per_second = micro_batch_size * seq_len * here.dp_size / statistics.median(seconds[warmup:])
    peak = config.metrics.peak_flops
    if peak is None and here.device.type == "cuda":
        peak = peak_flops_of(torch.cuda.get_device_name())
    work = dataclasses.replace(config.workload(here.dp_size), micro_batch_size=micro_batch_size)
    estimate = memory_per_rank(work)
    share = mfu(flops_per_token(config.model, seq_len), tokens_per_second, peak * here.world_size if peak else None)
    return {
        "micro_batch_size": micro_batch_size,
        "tokens_per_second": round(tokens_per_second),
        "mfu": None if share is None else round(share, 4),
        "peak_memory_gb": round(peak_memory_bytes(here.device) / 1e9, 2),
        "estimated_memory_gb": round(estimate.total / 1e9, 2),
        "step_seconds": [round(s, 4) for s in seconds[warmup:]],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--micro-batch-sizes", type=int, nargs="+", help="default: the config's")
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
            result = measure(config, here, size, arguments.steps, arguments.warmup)
            if here.is_main:
                print(json.dumps({"device": device, "ranks": here.world_size, **result}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
