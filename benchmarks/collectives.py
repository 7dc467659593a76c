"""Count what tensor-parallel ranks send each other in a step: `python benchmarks/collectives.py [--tp-size 2]`.

Calls and bytes a layer are the difference between models of three layers and of two, forward and backward apart. Bytes
are those of each collective's input on one rank. `--root CHECKOUT` counts those of another checkout.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    if "--root" in sys.argv:
        sys.path[0] = str(Path(sys.argv[sys.argv.index("--root") + 1]).resolve())

import torch
import torch.multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.model.transformer import ModelConfig, Transformer
from pretrain.topology import ParallelConfig, free_port, started

ROWS, LENGTH = 4, 512
MODEL = {"dim": 512, "n_heads": 8, "ffn_dim": 1536, "vocab_size": 4096, "qk_norm": False}


class Collectives(TorchDispatchMode):
    """Counts the calls of each collective inside, and the bytes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        if name.startswith(("c10d::", "_c10d_functional::")) and "wait" not in name and "_wrap" not in name:
            kind = name.partition("::")[2].partition(".")[0].rstrip("_").replace("all_reduce", "allreduce")
            self.calls[kind] += 1
            self.bytes[kind] += sum(x.nbytes for x in tree_leaves(args[0]) if isinstance(x, torch.Tensor))
        return function(*args, **(kwargs or {}))


def counted(layers: int, parallel: ParallelConfig) -> tuple[Collectives, Collectives]:
    """Count the collectives of a forward and of a backward pass."""
    config = ModelConfig.model_validate(MODEL | {"n_layers": layers})
    model = Transformer(config, parallel) if parallel.model_fields_set - {"tp_size"} else Transformer(config)
    model.initialize(seed=0)
    model.bfloat16().train()
    tokens = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    with Collectives() as forward:
        logits = model(tokens, torch.ones_like(tokens))
    with Collectives() as backward:
        logits.float().sum().backward()
    return forward, backward


def run(rank: int, parallel: ParallelConfig, port: int) -> None:
    """Count on one rank; rank 0 prints."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": parallel.tp_size, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in environment.items()} | {"MASTER_ADDR": "127.0.0.1"}
    with started(parallel) as topology:
        two, three = counted(2, parallel), counted(3, parallel)
    if not topology.is_main:
        return
    for name, shorter, longer in zip(("forward", "backward"), two, three, strict=True):
        for kind in longer.calls:
            calls, sent = longer.calls[kind] - shorter.calls[kind], longer.bytes[kind] - shorter.bytes[kind]
            if calls:
                print(f"  {name:9} {kind:28} {calls} calls, {sent / 1e6:.2f} MB a layer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp-size", type=int, default=2)
    parser.add_argument("--root", type=Path, help="another checkout, whose model is counted instead")
    arguments = parser.parse_args()
    layouts: list[dict[str, Any]] = [{}]
    if not arguments.root:
        layouts.append({"sequence_parallel": True})
    for layout in layouts:
        parallel = ParallelConfig.model_validate({"tp_size": arguments.tp_size, **layout})
        print(
            f"tp_size {parallel.tp_size} {layout or ''}: {ROWS} x {LENGTH} tokens, dim {MODEL['dim']}, bf16", flush=True
        )
        torch.multiprocessing.spawn(run, (parallel, free_port()), nprocs=parallel.tp_size)


if __name__ == "__main__":
    main()
