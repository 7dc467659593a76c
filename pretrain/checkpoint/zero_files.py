"""Reads from DeepSpeed's files which part of each weight each rank holds. files -> zero_files -> {weights, universal}.

DeepSpeed flattens the weights of each optimizer group on each tensor-parallel rank, one after the other, and divides
them over the data-parallel ranks: with ZeRO-1 and 2 the whole flat group is cut at equal lengths, with ZeRO-3 every
weight by itself. The fp32 master weights, on which every optimizer step works, and their moments are read.
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

_SHARE = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")

# DeepSpeed does not describe the types of what it saves
Saved = Mapping[str, Any]


@dataclass(frozen=True)
class Fragment:
    """One rank's piece of one weight: the flat states of its group, and where in them the piece lies."""

    shape: torch.Size  # of the weight on its tensor-parallel rank
    states: Mapping[str, Tensor]  # "fp32", "exp_avg", "exp_avg_sq": flat; "step": the optimizer's count
    start: int
    numel: int


Share = Mapping[str, Fragment]  # what one rank holds, by weight


def read_shares(engine: Path) -> tuple[list[list[Share]], Saved]:
    """Map what each rank holds, [tp_rank][dp_rank], without reading it; return that and one model file's content."""
    files = {(int(m[2]), int(m[1])): path for path in engine.iterdir() if (m := _SHARE.search(path.name))}
    tp_size, dp_size = (max((place[i] for place in files), default=-1) + 1 for i in (0, 1))
    if not files or len(files) != tp_size * dp_size:
        raise CheckpointError(f"{engine} does not hold the optimizer's files of all ranks")
    shares: list[list[Share]] = []
    for tp_rank in range(tp_size):
        metadata = _load(next(engine.glob(f"*mp_rank_{tp_rank:02d}_model_states.pt")))
        of_rank = [_load(files[tp_rank, dp_rank])["optimizer_state_dict"] for dp_rank in range(dp_size)]
        read = _partitioned_share if "fp32_flat_groups" in of_rank[0] else _sliced_share
        groups: Sequence[Mapping[str, torch.Size]] = metadata["param_shapes"]
        shares.append([dict(read(saved, groups, dp_rank, dp_size)) for dp_rank, saved in enumerate(of_rank)])
    return shares, metadata


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)  # DeepSpeed saves classes of its own


def _sliced_share(
    saved: Saved, groups: Sequence[Mapping[str, torch.Size]], dp_rank: int, dp_size: int
) -> Iterator[tuple[str, Fragment]]:
    """Read a share of ZeRO-1 or 2: each group is one flat tensor cut at equal lengths; the file says who holds what."""
    shapes = {name: shape for group in groups for name, shape in group.items()}
    optimizer = saved["base_optimizer_state"]["state"]  # nothing before the first step
    for i, addresses in enumerate(saved["param_slice_mappings"]):
        states = {**optimizer.get(i, {}), "fp32": saved["single_partition_of_fp32_groups"][i]}
        for name, address in addresses.items():
            yield name, Fragment(shapes[name], states, address.start, address.numel)


def _partitioned_share(
    saved: Saved, groups: Sequence[Mapping[str, torch.Size]], dp_rank: int, dp_size: int
) -> Iterator[tuple[str, Fragment]]:
    """Read a share of ZeRO-3: each weight is cut into dp_size equal pieces, the last padded; a group's lie in a row."""
    optimizer = saved["optimizer_state_dict"]["state"]  # nothing before the first step
    for i, shapes in enumerate(groups):
        states = {**optimizer.get(i, {}), "fp32": saved["fp32_flat_groups"][i]}
        start = 0
        for name, shape in shapes.items():
            piece = ceil(shape.numel() / dp_size)
            yield name, Fragment(shape, states, start, max(0, min(piece, shape.numel() - dp_rank * piece)))
            start += piece


def whole(ranks: Sequence[Share], name: str, key: str) -> Tensor:
    """Join the pieces that the dp ranks hold of a weight's state into what their tensor-parallel rank holds."""
    pieces = [rank[name] for rank in ranks if name in rank]
    if key == "step":
        return torch.as_tensor(pieces[0].states[key])
    flat = torch.cat([piece.states[key].narrow(0, piece.start, piece.numel) for piece in pieces])
    return flat.view(pieces[0].shape)
