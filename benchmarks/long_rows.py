"""Show the memory of one rank against the length of its rows: `python benchmarks/long_rows.py [--png FILE]`.

Estimates for two shipped configs with rows of 8k to 128k tokens, one a micro-batch, on 8 ranks of which 1, 2 or 4 share
a row: with full checkpointing alone, and with feed-forward networks a few tokens at a time and blocks' inputs on the
host. By the same estimate, the longest row that leaves a part of a GPU free.

    python benchmarks/long_rows.py --measure      # a small model on CPU ranks: the processes' peak memory

`benchmarks/memory_model.py` compares such estimates with simulated steps.

What is measured is the most resident memory (VmHWM) of a rank in a training step, less what it had before the model was
made. On a CPU the host's memory is the device's, so nothing is measured of inputs that are moved there.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from pretrain.config import RunConfig, load_config
from pretrain.deepspeed_keys import deepspeed_config
from pretrain.engine import Engine
from pretrain.model.size import memory_per_rank
from pretrain.model.transformer import LlamaConfig
from pretrain.optim import OptimConfig
from pretrain.parallel_config import ParallelConfig
from pretrain.run.metrics import Meter
from pretrain.topology import started

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MODELS = ("llama-1b-dolma", "llama-7b-pile-dolma")
LENGTHS = (8192, 16384, 32768, 65536, 131072)
SP_SIZES = (1, 2, 4)
RANKS, TILE = 8, 4096
MEMORY = (80e9, 141e9)  # of an H100 and an H200
FREE = 0.08  # of which: for CUDA, NCCL and the allocator's gaps
LONGEST, GRAIN = 2_000 * 1024, 8 * 1024  # tokens of the longest row that is looked for, and the step
SAVED = {
    "full": (),
    "flat": (f"parallel.feed_forward_tokens={TILE}", "parallel.offload=activations"),
}
NAMES = {"full": "full checkpointing", "flat": "with tiles and offload"}
SMALL = LlamaConfig(dim=64, n_layers=2, n_heads=4, ffn_dim=1024, vocab_size=256)
MEASURED_LENGTHS, DOCUMENT = (8192, 32768), 256


class Case(NamedTuple):
    """One config of a rank."""

    model: str
    seq_len: int
    sp_size: int
    saved: str  # a key of SAVED

    @property
    def config(self) -> RunConfig:
        settings = (
            f"data.seq_len={self.seq_len}", "train.micro_batch_size=1", f"parallel.sp_size={self.sp_size}",
            "parallel.zero_stage=2", "parallel.compile=false", "parallel.activation_checkpointing=full",
        )  # fmt: skip
        return load_config(CONFIGS / f"{self.model}.yaml", [*settings, *SAVED[self.saved]])


def cases() -> Iterator[Case]:
    return (Case(*values) for values in itertools.product(MODELS, LENGTHS, SP_SIZES, SAVED))


def estimated(case: Case) -> tuple[float, float]:
    """Return the bytes of a rank on its device and on the host."""
    found = memory_per_rank(case.config.workload(RANKS // case.sp_size))
    assert found is not None
    return found.total, found.host


def table(found: dict[Case, tuple[float, float]]) -> str:
    """Return the figures in GB, a line for each model and length."""
    columns = [(sp, saved) for saved in SAVED for sp in SP_SIZES]
    head = ["model", "tokens a row", *(f"sp {sp}, {NAMES[saved]}" for sp, saved in columns), "host, sp 1"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for model in MODELS:
        for length in LENGTHS:
            sizes = [found[Case(model, length, *column)][0] for column in columns]
            host = found[Case(model, length, 1, "flat")][1]
            lines.append([model, f"{length:,}", *(f"{size / 1e9:.1f}" for size in [*sizes, host])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def longest_table() -> str:
    """Return the longest rows that fit, in thousands (1,024) of tokens, a line for each model and GPU."""
    columns = [(sp, saved) for saved in SAVED for sp in SP_SIZES]
    head = ["model", "GPU", *(f"sp {sp}, {NAMES[saved]}" for sp, saved in columns)]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for model, memory in itertools.product(MODELS, MEMORY):
        found = [longest(model, memory * (1 - FREE), *column) // 1024 for column in columns]
        most = [f"{length:,}" if length < LONGEST // 1024 else f"over {LONGEST // 1024:,}" for length in found]
        lines.append([model, f"{memory / 1e9:.0f} GB", *most])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def longest(model: str, memory: float, sp_size: int, saved: str) -> int:
    """Return the tokens of the longest row with which a rank takes no more than so many bytes."""
    grains = range(1, LONGEST // GRAIN + 1)
    fits = bisect.bisect_right(grains, memory, key=lambda n: estimated(Case(model, n * GRAIN, sp_size, saved))[0])
    return fits * GRAIN


def draw(found: dict[Case, tuple[float, float]], file: Path) -> None:
    """Draw a rank's memory against the length of its rows, a panel a model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(10, 4), layout="constrained", dpi=110)
    FigureCanvasAgg(picture)
    panels = picture.subplots(1, len(MODELS), sharey=True, squeeze=False)
    for panel, model in zip(panels[0], MODELS, strict=True):
        for saved, style in (("full", "--"), ("flat", "-")):
            for sp_size, color in zip(SP_SIZES, ("C0", "C1", "C2"), strict=True):
                sizes = [found[Case(model, length, sp_size, saved)][0] / 1e9 for length in LENGTHS]
                label = f"sp {sp_size}, {NAMES[saved]}"
                panel.plot(LENGTHS, sizes, style, color=color, marker="o", markersize=4, label=label)
        for memory in MEMORY:
            panel.axhline(memory / 1e9, color="gray", linewidth=0.8)
            panel.text(LENGTHS[0], memory / 1e9, f"{memory / 1e9:.0f} GB", va="bottom", color="gray", fontsize=8)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(LENGTHS, [f"{length // 1024}k" for length in LENGTHS])
        panel.set_yticks((5, 10, 20, 50, 100, 200), ["5", "10", "20", "50", "100", "200"])
        panel.minorticks_off()
        panel.set_xlabel("tokens a row")
        panel.set_title(model)
    panels[0][0].set_ylabel(f"GB of one of {RANKS} ranks, estimated")
    panels[0][-1].legend(fontsize=8)
    picture.savefig(file)


def measure() -> None:
    """Print the peak memory of CPU ranks that share rows."""
    print("| tokens a row | sp | full checkpointing, MB | with tiles, MB |\n| ---: | ---: | ---: | ---: |")
    for sp_size in SP_SIZES:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        # What is freed goes back to the system at once, so that resident memory is memory in use
        place |= {"WORLD_SIZE": str(sp_size), "MALLOC_MMAP_THRESHOLD_": "65536", "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, __file__, "--rank-of", str(sp_size)]
        ranks = [
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True,
                             env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(sp_size)
        ]  # fmt: skip
        said = [rank.communicate()[0] for rank in ranks]
        found = [[json.loads(line) for line in text.splitlines() if line.startswith("[")] for text in said]
        for index, length in enumerate(MEASURED_LENGTHS):
            most = [max(of_rank[2 * index + saved][0] for of_rank in found) / 1e6 for saved in (0, 1)]
            print(f"| {length:,} | {sp_size} | {most[0]:,.0f} | {most[1]:,.0f} |", flush=True)


def measure_rank(sp_size: int) -> None:
    """Take two steps with rows of each length, with and without tiles; print the bytes that each took."""
    with mock.patch("pretrain.engine.keep_freed_memory"), started(ParallelConfig(sp_size=sp_size)) as here:
        for length in MEASURED_LENGTHS:
            for tile in (None, 512):
                before = _resident("VmRSS")
                parallel = ParallelConfig(
                    sp_size=sp_size, zero_stage=2, activation_checkpointing="full", feed_forward_tokens=tile
                )
                small = {"zero_optimization": {"reduce_bucket_size": 1 << 22}}
                derived = deepspeed_config(parallel, OptimConfig(), "fp32", small)
                engine = Engine(SMALL, OptimConfig(), parallel, derived, 1, 1, here, 0)
                tokens = torch.randint(SMALL.vocab_size, (1, length + 1))
                segment_ids = torch.arange(length + 1)[None] // DOCUMENT + 1
                Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
                for step in range(2):
                    engine.train_step(tokens, segment_ids, length, step, 1e-3, Meter())
                print(json.dumps([_resident("VmHWM") - before, length, tile]), flush=True)
                engine.deepspeed.destroy()
                del engine


def _resident(name: str) -> int:
    """Return a figure of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--png", type=Path, help="where to draw a picture")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--rank-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        measure_rank(arguments.rank_of)
    elif arguments.measure:
        measure()
    else:
        found = {case: estimated(case) for case in cases()}
        print(table(found))
        print("", longest_table(), sep="\n")
        if arguments.png:
            draw(found, arguments.png)


if __name__ == "__main__":
    main()
