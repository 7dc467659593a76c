"""Count what ranks send each other: `python benchmarks/collectives.py [--tp-size 2] [--sp-size 2] [--dp-size 2]`.

Of tensor-parallel ranks, and of those that share the tokens of rows, the calls and bytes of a layer, forward and
backward apart: the difference between models of three layers and of two. Of data-parallel ranks those of a whole
optimizer step, for each ZeRO stage, beside the parameters' number. Bytes are those of each collective's input on one
rank, as the program hands it over.
`--root CHECKOUT` counts the layers of another checkout.
"""

from __future__ import annotations

import argparse
import itertools
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

from pretrain.model.size import parameter_count
from pretrain.model.transformer import LlamaConfig, Transformer
from pretrain.parallel_config import ParallelConfig
from pretrain.topology import free_port, started

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
            # Its first argument is the output, and what a gather makes is as large as all of its inputs together.
            given = args[1] if kind == "_reduce_scatter_base" else args[0]
            self.bytes[kind] += sum(x.nbytes for x in tree_leaves(given) if isinstance(x, torch.Tensor))
        return function(*args, **(kwargs or {}))


def counted(layers: int, parallel: ParallelConfig) -> tuple[Collectives, Collectives]:
    """Count the collectives of a forward and of a backward pass."""
    config = LlamaConfig.model_validate(MODEL | {"n_layers": layers})
    whole = not parallel.model_fields_set - {"tp_size"}
    model = Transformer(config) if whole else Transformer(config, parallel, "varlen")
    model.initialize(seed=0)
    model.bfloat16().train()
    tokens = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    with Collectives() as forward:
        logits = model(tokens, torch.ones_like(tokens))
    with Collectives() as backward:
        logits.float().sum().backward()
    return forward, backward


def set_environment(rank: int, world_size: int, port: int) -> None:
    """Set what a launcher would."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in numbers.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}


def count_step(rank: int, world_size: int, port: int, parallel: ParallelConfig, micro_steps: int) -> None:
    """Count the collectives of an optimizer step after the first; rank 0 prints."""
    from pretrain.deepspeed_keys import deepspeed_config  # another checkout may lack them
    from pretrain.engine import Engine
    from pretrain.optim import OptimConfig
    from pretrain.run.metrics import Meter

    set_environment(rank, world_size, port)
    config, optim = LlamaConfig.model_validate(MODEL | {"n_layers": 4}), OptimConfig()
    with started(parallel) as topology:
        ds_config = deepspeed_config(parallel, optim, "bf16", {})
        engine = Engine(config, optim, parallel, ds_config, 1, micro_steps, topology, seed=0)
        tokens = torch.zeros(micro_steps, LENGTH + 1, dtype=torch.int64)
        batch = tokens, torch.ones_like(tokens), micro_steps * LENGTH * world_size
        engine.train_step(*batch, 0, 1e-3, Meter())
        with Collectives() as found:
            engine.train_step(*batch, 1, 1e-3, Meter())
    if topology.is_main:
        for kind, calls in sorted(found.calls.items()):
            print(f"  {kind:28} {calls:4} calls, {found.bytes[kind] / 1e6:8.2f} MB a step", flush=True)


def run(rank: int, world_size: int, parallel: ParallelConfig, port: int) -> None:
    """Count on one rank; rank 0 prints."""
    set_environment(rank, world_size, port)
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
    parser.add_argument("--sp-size", type=int, default=2)
    parser.add_argument("--root", type=Path, help="another checkout, whose model is counted instead")
    parser.add_argument("--dp-size", type=int, default=2)
    arguments = parser.parse_args()
    layouts: list[dict[str, Any]] = [{"tp_size": arguments.tp_size}]
    if not arguments.root:
        layouts.append({"tp_size": arguments.tp_size, "sequence_parallel": True})
        layouts.append({"sp_size": arguments.sp_size})
    for layout in layouts:
        ranks = layout.get("tp_size", 1) * layout.get("sp_size", 1)
        print(f"{layout}: {ROWS} x {LENGTH} tokens, dim {MODEL['dim']}, bf16", flush=True)
        where = ranks, ParallelConfig.model_validate(layout), free_port()
        torch.multiprocessing.spawn(run, where, nprocs=ranks)
    if arguments.root:
        return
    parameters = parameter_count(LlamaConfig.model_validate(MODEL | {"n_layers": 4}))
    for stage, micro_steps in itertools.product((1, 2, 3), (1, 4)):
        print(
            f"dp_size {arguments.dp_size}, ZeRO-{stage}, {micro_steps} micro-steps, {parameters / 1e6:.2f}M parameters"
        )
        where = arguments.dp_size, free_port(), ParallelConfig.model_validate({"zero_stage": stage}), micro_steps
        torch.multiprocessing.spawn(count_step, where, nprocs=arguments.dp_size)


if __name__ == "__main__":
    main()
