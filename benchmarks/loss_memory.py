"""Measure what the loss takes beside its inputs and their gradients: `python benchmarks/loss_memory.py`.

The peak of all tensors alive while it and its gradients are computed, less the gradients themselves, beside the plain
form (logits, their fp32 copy, cross-entropy).
"""

from __future__ import annotations

import argparse
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.model.loss import Targets, training_loss
from pretrain.parallel_config import ParallelConfig
from pretrain.topology import started


class PeakMemory(TorchDispatchMode):
    """Tracks the bytes of all tensors that operations make, and the most that are alive at once."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.alive = {tensor.untyped_storage()._cdata: 0 for tensor in inputs}  # views of them take nothing
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return made


def peak_of(loss: Callable[[Tensor, Tensor, Tensor], Tensor], tokens: int, vocab_size: int, dim: int) -> int:
    """Return the peak in bytes, less the inputs' gradients, which exist whatever the loss."""
    with FakeTensorMode():
        hidden = torch.empty(1, tokens, dim, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(vocab_size, dim, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.empty(tokens, dtype=torch.int64)
        with PeakMemory(hidden, weight, targets) as memory:
            loss(hidden, weight, targets).backward()
        return memory.peak - hidden.nbytes - weight.nbytes


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute the loss of this project."""
    return training_loss(hidden, weight, Targets(torch.arange(len(targets)), targets), 0.0).total


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute the loss by way of all logits."""
    return torch.nn.functional.cross_entropy((hidden[0] @ weight.t()).float(), targets, reduction="sum")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 128_256])
    parser.add_argument("--dims", type=int, nargs="+", default=[256, 2048, 4096])
    arguments = parser.parse_args()
    print("tokens  vocabulary   dim  plain MB  chunked MB")
    with started(ParallelConfig()):
        for vocab_size in arguments.vocabularies:
            for dim in arguments.dims:
                found = [peak_of(loss, arguments.tokens, vocab_size, dim) / 1e6 for loss in (plain, chunked)]
                print(f"{arguments.tokens:6} {vocab_size:11} {dim:5} {found[0]:9.0f} {found[1]:11.0f}")


if __name__ == "__main__":
    main()
