"""Measure what a long prompt takes before the first token: `OMP_NUM_THREADS=1 python benchmarks/generate.py`.

Memory is that of all tensors that are alive at once beside the weights, simulated, so that any length and model can be
asked for: `--config configs/llama-1b-dolma.yaml --simulate 131072`. Time is measured, with drawn weights, on the GPU if
there is one; on a CPU it is that of one core, so that other work on the machine hardly counts.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import torch
from loss_memory import PeakMemory
from torch._subclasses import FakeTensorMode

from pretrain.config import RunConfig, load_config
from pretrain.inference.forward_model import ForwardModel
from pretrain.model.prefill import next_logits
from pretrain.parallel_config import ParallelConfig
from pretrain.topology import Topology, started

_NEXT_TOKENS = 8  # timed after the prompt


@torch.no_grad()
def peak_of(config: RunConfig, length: int) -> int:
    """Return the most bytes alive beside the weights while a prompt of so many tokens is read, and one token after."""
    torch.set_default_dtype(torch.bfloat16 if config.precision == "bf16" else torch.float32)
    with FakeTensorMode():
        model = config.model.make(ParallelConfig(), "sdpa").eval()
        torch.set_default_dtype(torch.float32)
        tokens = torch.zeros(1, length, dtype=torch.int64)
        with PeakMemory(*model.parameters()) as memory:
            cache = config.model.new_cache(length + 1)
            next_logits(model, tokens, cache)
            next_logits(model, tokens[:, :1], cache)
        return memory.peak


def seconds_of(model: ForwardModel, length: int, topology: Topology) -> tuple[float, float]:
    """Return the seconds in which a prompt of so many tokens is read, and those of a token after it."""
    clock = time.perf_counter if topology.device.type == "cuda" else time.process_time
    tokens = torch.randint(model.config.vocab_size, (1, length + _NEXT_TOKENS), device=topology.device)
    cache = model.config.new_cache(length + _NEXT_TOKENS)
    begun = clock()
    model.next_logits(tokens[:, :length], cache).cpu()
    read = clock()
    for i in range(length, length + _NEXT_TOKENS):
        model.next_logits(tokens[:, i : i + 1], cache).cpu()
    return read - begun, (clock() - read) / _NEXT_TOKENS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--tokens", type=int, nargs="*", default=[1024, 2048, 4096, 8192, 16_384])
    parser.add_argument("--simulate", type=int, nargs="*", default=[], help="lengths of which there is no time")
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    print(" tokens    peak MB   tokens/s  next token, ms")
    with started(ParallelConfig()) as topology:
        for length in arguments.simulate:
            print(f"{length:7,} {peak_of(config, length) / 1e6:10.1f}", flush=True)
        if not arguments.tokens:
            return
        model = ForwardModel(config.model, ParallelConfig(), config.precision, topology)
        model._model.initialize(seed=0)
        seconds_of(model, 64, topology)
        for length in arguments.tokens:
            prompt, token = seconds_of(model, length, topology)
            peak = peak_of(config, length) / 1e6
            print(f"{length:7,} {peak:10.1f} {length / prompt:10,.0f} {1e3 * token:14.2f}", flush=True)


if __name__ == "__main__":
    main()
