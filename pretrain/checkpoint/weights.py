"""The weights in a checkpoint, whole, whatever topology saved them. DeepSpeed's files -> weights -> {export, generate}.

No process group and no GPU: the files are mapped, and a weight is put together when it is asked for, from the fp32
master weights that every optimizer step works on. DeepSpeed flattens the weights of each optimizer group on each
tensor-parallel rank, one after the other, and divides them over the data-parallel ranks:

    ZeRO-1, 2   the whole flat group is cut once; each file says which stretch of which weight it holds
    ZeRO-3      every weight is cut by itself, padded to equal parts; a file holds its parts in the order of the model
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.store import Checkpoint
from pretrain.model.weights import WeightSpec
from shards import CheckpointError

_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


class CheckpointWeights:
    """A checkpoint's weights by name.

    Args:
        checkpoint: its files are compared with their hashes first.
        specs: of all its weights.
    Raises:
        CheckpointError: if it is damaged, or is no checkpoint of a model with these weights.
    """

    def __init__(self, checkpoint: Checkpoint, specs: Mapping[str, WeightSpec]) -> None:
        if broken := checkpoint.broken_files():
            raise CheckpointError("; ".join(broken))
        self._specs = specs
        self._folder = checkpoint.folder / "engine"
        files: dict[int, dict[int, Path]] = {}  # tp rank -> dp rank -> file
        for path in self._folder.iterdir():
            if found := _OPTIMIZER_FILE.fullmatch(path.name):
                files.setdefault(int(found[2]), {})[int(found[1])] = path
        if not files:
            raise CheckpointError(f"{self._folder} has no optimizer states of DeepSpeed ZeRO")
        self._tp_ranks = [_stretches(rank, dict(sorted(of_rank.items()))) for rank, of_rank in sorted(files.items())]
        for name in specs:
            if not all(name in stretches for stretches in self._tp_ranks):
                raise CheckpointError(f"{self._folder} has no weight {name}; its run's config.yaml has another model")

    def read(self, name: str, index: int = 0, count: int = 1) -> Tensor:
        """A weight, or its slice for tensor-parallel rank `index` of `count`, fp32."""
        spec = self._specs[name]
        if spec.shard_dim is None:
            return self._slice(name, spec, 0, spec.shape)
        shape = list(spec.shape)
        shape[spec.shard_dim] //= len(self._tp_ranks)
        slices = [self._slice(name, spec, rank, tuple(shape)) for rank in range(len(self._tp_ranks))]
        return spec.slice_of(torch.cat(slices, spec.shard_dim), index, count)

    def _slice(self, name: str, spec: WeightSpec, rank: int, shape: tuple[int, ...]) -> Tensor:
        stretches = self._tp_ranks[rank][name]
        flat = torch.cat(stretches)
        size = torch.Size(shape).numel()
        if not 0 <= len(flat) - size < len(stretches):  # ZeRO-3 pads by less than one value a part
            raise CheckpointError(f"{self._folder}: {name} has {len(flat)} values on tp rank {rank}, not {size}")
        return flat[:size].view(shape)


Stretches = dict[str, list[Tensor]]  # the flat pieces of each weight's slice, fp32, in order, mapped from the files


def _stretches(tp_rank: int, files: Mapping[int, Path]) -> Stretches:
    """What the files of one tensor-parallel rank hold, by dp rank."""
    states = [_load(path)["optimizer_state_dict"] for path in files.values()]
    if "fp32_flat_groups" in states[0]:
        model_states = next(iter(files.values())).with_name(f"zero_pp_rank_0_mp_rank_{tp_rank:02d}_model_states.pt")
        sizes = {name: shape.numel() for group in _load(model_states)["param_shapes"] for name, shape in group.items()}
        return _of_zero_3([state["fp32_flat_groups"] for state in states], sizes)
    return _of_zero_1_and_2(states)


def _load(path: Path) -> dict[str, Any]:
    # DeepSpeed pickles classes of its own; what is read here is a run's own, compared with its hash before
    content: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    return content


def _of_zero_1_and_2(states: list[dict[str, Any]]) -> Stretches:
    found: Stretches = {}
    for state in states:
        groups = zip(state["single_partition_of_fp32_groups"], state["param_slice_mappings"], strict=True)
        for flat, mapping in groups:
            for name, at in mapping.items():
                found.setdefault(name, []).append(flat[at.start : at.start + at.numel])
    return found


def _of_zero_3(dp_ranks: list[list[Tensor]], sizes: Mapping[str, int]) -> Stretches:
    found: Stretches = {name: [] for name in sizes}
    for groups in dp_ranks:
        ends = list(itertools.accumulate(len(flat) for flat in groups))
        start = 0
        for name, size in sizes.items():
            stop = start + -(-size // len(dp_ranks))
            for flat, end in zip(groups, ends, strict=True):
                begin = end - len(flat)
                if begin < stop and start < end:
                    found[name].append(flat[max(start - begin, 0) : stop - begin])
            start = stop
    return found
