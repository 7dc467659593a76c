"""Read each rank's part of each weight from DeepSpeed's files. files -> zero_files -> {weights, universal}.

DeepSpeed concatenates the flattened weights of each optimizer group on each tensor-parallel rank and divides them over
the data-parallel ranks: ZeRO-1 and 2 cut the whole flat group at equal lengths, ZeRO-3 cuts every weight separately.
What is read are the fp32 master weights, on which every optimizer step works, and their moments.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shards import CheckpointError

_OPTIMIZER_FILE = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")

AVERAGE = "ema"  # key of the moving average of the weights, in the optimizer's state

# DeepSpeed does not describe the types of what it saves.
Saved = Mapping[str, Any]


@dataclass(frozen=True)
class Fragment:
    """One rank's part of one weight: the flat states of its group, and the part's place in them."""

    shape: torch.Size  # the weight's shape on its tensor-parallel rank
    # "fp32", "exp_avg", but under Muon "exp_avg_sq", and AVERAGE if kept: flat; "step": updates made
    states: Mapping[str, Tensor]
    start: int
    numel: int


Partition = Mapping[str, Fragment]  # one rank's fragments, by weight


def read_partitions(engine: Path) -> tuple[list[list[Partition]], Saved]:
    """Map what each rank holds, [tp_rank][dp_rank], without reading it; return it with one model file's content."""
    files = {(int(m[2]), int(m[1])): path for path in engine.iterdir() if (m := _OPTIMIZER_FILE.search(path.name))}
    tp_size, dp_size = (max((place[i] for place in files), default=-1) + 1 for i in (0, 1))
    if not files or len(files) != tp_size * dp_size:
        raise CheckpointError(f"{engine} lacks optimizer files of some ranks")
    partitions: list[list[Partition]] = []
    for tp_rank in range(tp_size):
        metadata = _load(next(engine.glob(f"*mp_rank_{tp_rank:02d}_model_states.pt")))
        of_rank = [_load(files[tp_rank, dp_rank])["optimizer_state_dict"] for dp_rank in range(dp_size)]
        read = _zero_3_partition if "fp32_flat_groups" in of_rank[0] else _zero_1_partition
        groups: Sequence[Mapping[str, torch.Size]] = metadata["param_shapes"]
        partitions.append([dict(read(saved, groups, dp_rank, dp_size)) for dp_rank, saved in enumerate(of_rank)])
    return partitions, metadata


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)  # DeepSpeed saves its own classes


def _zero_1_partition(
    saved: Saved, groups: Sequence[Mapping[str, torch.Size]], dp_rank: int, dp_size: int
) -> Iterator[tuple[str, Fragment]]:
    """Read a partition of ZeRO-1 or 2: a group is one flat tensor cut at equal lengths; the file lists the owners."""
    shapes = {name: shape for group in groups for name, shape in group.items()}
    optimizer = saved["base_optimizer_state"]["state"]  # empty before the first step
    for i, addresses in enumerate(saved["param_slice_mappings"]):
        states = {**optimizer.get(i, {}), "fp32": saved["single_partition_of_fp32_groups"][i]}
        for name, address in addresses.items():
            yield name, Fragment(shapes[name], states, address.start, address.numel)


def _zero_3_partition(
    saved: Saved, groups: Sequence[Mapping[str, torch.Size]], dp_rank: int, dp_size: int
) -> Iterator[tuple[str, Fragment]]:
    """Read a partition of ZeRO-3: each weight is cut into dp_size equal lengths, the last padded, group by group."""
    optimizer = saved["optimizer_state_dict"]["state"]  # empty before the first step
    for i, shapes in enumerate(groups):
        states = {**optimizer.get(i, {}), "fp32": saved["fp32_flat_groups"][i]}
        start = 0
        for name, shape in shapes.items():
            size = ceil(shape.numel() / dp_size)
            yield name, Fragment(shape, states, start, max(0, min(size, shape.numel() - dp_rank * size)))
            start += size


def whole(ranks: Sequence[Partition], name: str, key: str) -> Tensor:
    """Join the dp ranks' fragments of a weight's state into their tensor-parallel rank's part."""
    fragments = [rank[name] for rank in ranks if name in rank]
    if key == "step":
        return torch.as_tensor(fragments[0].states[key])
    flat = torch.cat([fragment.states[key].narrow(0, fragment.start, fragment.numel) for fragment in fragments])
    return flat.view(fragments[0].shape)
