"""Measure what a long prompt takes before the first token: `python benchmarks/generate.py`.

A process for each length makes a config's model with drawn weights, lets it read as many random tokens, and prints the
most memory that this took beside the weights, tokens a second, and the time of the next token. On a CPU, seconds are
those of one core's time (start it with OMP_NUM_THREADS=1), so that other work on the machine hardly counts.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from pretrain.config import load_config
from pretrain.inference.forward_model import ForwardModel
from pretrain.topology import ParallelConfig, started

_NEXT_TOKENS = 8  # timed after the prompt


def measure(config_path: Path, length: int) -> None:
    """Print the figures of a prompt of so many tokens."""
    config = load_config(config_path)
    with started(ParallelConfig()) as topology:
        model = ForwardModel(config.model, ParallelConfig(), config.precision, topology)
        model._model.initialize(seed=0)
        tokens = torch.randint(config.model.vocab_size, (1, length + _NEXT_TOKENS), device=topology.device)
        model.next_logits(tokens[:, :64], config.model.new_cache(64))
        clock = time.perf_counter if topology.device.type == "cuda" else time.process_time
        before = _start_peak(topology.device)
        cache = config.model.new_cache(length + _NEXT_TOKENS)
        seconds = [clock()]
        model.next_logits(tokens[:, :length], cache).cpu()
        seconds.append(clock())
        for i in range(length, length + _NEXT_TOKENS):
            model.next_logits(tokens[:, i : i + 1], cache).cpu()
        seconds.append(clock())
        peak = _peak(topology.device) - before
    speed, next_ms = length / (seconds[1] - seconds[0]), 1e3 * (seconds[2] - seconds[1]) / _NEXT_TOKENS
    print(f"{length:7,} {peak / 1e6:10.1f} {speed:10,.0f} {next_ms:14.2f}", flush=True)


def _start_peak(device: torch.device) -> int:
    """Forget the most memory so far; return the bytes in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    return _peak(device)


def _peak(device: torch.device) -> int:
    """Return the most bytes that were in use since then."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16_384])
    arguments = parser.parse_args()
    print(" tokens    peak MB   tokens/s  next token, ms")
    context = multiprocessing.get_context("spawn")
    for length in arguments.tokens:
        process = context.Process(target=measure, args=(arguments.config, length))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"{length} tokens: the process ended with {process.exitcode}")


if __name__ == "__main__":
    main()
