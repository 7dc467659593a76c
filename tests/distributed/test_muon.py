"""Muon trains the same model in every layout, which is that of a plain reference, and goes on in any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.checkpoint.zero_files import read_partitions, whole
from pretrain.model.weights import weight_specs
from tests.distributed.muon import LATER, MODEL, OPTIM, RATE, SAVED, STAGES, STEPS, batches
from tests.distributed.ranks import run_ranks
from tests.reference_model import Shape, Weights, train

LAYOUTS = [(1, 2), (2, 2), (1, 1)]  # (tp_size, dp_size); each goes on from checkpoints of the one before


def saved(folder: Path) -> Weights:
    """Read the whole fp32 weights of a checkpoint."""
    tp_ranks, _ = read_partitions(folder / "engine")
    found = {}
    for name, spec in weight_specs(MODEL).items():
        weight = spec.joined(
            [whole(ranks, name, "fp32") for ranks in tp_ranks[: 1 if spec.shard_dim is None else None]]
        )
        assert weight is not None
        found[name] = weight
    return found


def reference(initial: Weights) -> dict[int, Weights]:
    """Train in plain PyTorch, with singular values instead of iterations; return the weights by step."""
    shape = Shape(MODEL.n_layers, MODEL.n_heads, MODEL.kv_heads, qk_norm=True, tied=True)
    by_step: dict[int, Weights] = {}
    train(
        {name: initial[name] for name in weight_specs(MODEL)}, shape, batches(), [RATE] * STEPS,
        weight_decay=OPTIM.weight_decay, betas=OPTIM.betas, eps=OPTIM.eps, grad_clip=OPTIM.grad_clip,
        z_loss=OPTIM.z_loss, momentum=OPTIM.momentum, scale_of=MODEL.scale_of,
        observe=lambda before, gradients, after: by_step.update(
            {len(by_step) + 1: {name: weight.detach().clone() for name, weight in after.items()}}
        ),
    )  # fmt: skip
    return by_step


@pytest.mark.distributed
def test_every_layout_and_stage_trains_the_same_model(tmp_path: Path) -> None:
    folders: list[Path] = []
    for tp_size, dp_size in LAYOUTS:
        folder = tmp_path / f"{tp_size}x{dp_size}"
        run_ranks(tp_size * dp_size, "tests.distributed.muon", str(tp_size), str(folder), *map(str, folders[-1:]))
        folders.append(folder)
    wanted = reference(torch.load(folders[-1] / "1" / "initial.pt"))
    for folder in folders:
        for stage in STAGES:
            for checkpoint, step in {str(SAVED): SAVED, str(STEPS): STEPS, "other": LATER}.items():
                path = folder / str(stage) / checkpoint
                for name, weight in saved(path).items() if checkpoint != "other" or folder != folders[0] else ():
                    torch.testing.assert_close(weight, wanted[step][name], rtol=0, atol=1e-4, msg=f"{path}: {name}")
