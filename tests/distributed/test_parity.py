"""Losses and gradient norms do not depend on how the work is split, and equal a plain PyTorch reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.parity import LEARNING_RATES, OPTIM, global_batches, model_config
from tests.distributed.ranks import run_ranks
from tests.reference_model import Shape, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def single(folder: Path) -> dict[str, dict]:
    """Run every case on one rank, which also leaves the weights that all cases start from."""
    return run_cases(1, 1, folder)


@pytest.fixture(scope="module")
def references(folder: Path, single: dict[str, dict]) -> dict[bool, list[tuple[float, float]]]:
    """Return (loss, gradient norm) of five steps in plain PyTorch, for tied and untied embeddings."""
    histories = {}
    for tied in (False, True):
        config = model_config(tied)
        weights = torch.load(folder / f"weights-{'tied' if tied else 'untied'}.pt")
        if tied:
            del weights["output.weight"]
        shape = Shape(config.n_layers, config.n_heads, config.kv_heads, qk_norm=True, tied=tied)
        histories[tied], _ = train(
            weights, shape, global_batches(), LEARNING_RATES,
            weight_decay=OPTIM.weight_decay, betas=OPTIM.betas, eps=OPTIM.eps,
            grad_clip=OPTIM.grad_clip, z_loss=OPTIM.z_loss,
        )  # fmt: skip
    return histories


def run_cases(tp_size: int, dp_size: int, folder: Path) -> dict[str, dict]:
    run_ranks(tp_size * dp_size, "tests.distributed.parity", str(tp_size), str(folder))
    return json.loads((folder / f"tp{tp_size}-dp{dp_size}.json").read_text())


@pytest.mark.distributed
@pytest.mark.parametrize(("tp_size", "dp_size"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_training_equals_the_reference(
    tp_size: int,
    dp_size: int,
    folder: Path,
    single: dict[str, dict],
    references: dict[bool, list[tuple[float, float]]],
) -> None:
    cases = single if tp_size * dp_size == 1 else run_cases(tp_size, dp_size, folder)
    for case, result in cases.items():
        tolerance = 1e-4 if case.startswith("fp32") else 2e-2
        expected = references["untied" not in case]
        for step, (found, wanted) in enumerate(zip(result["history"], expected, strict=True)):
            assert found == pytest.approx(wanted, rel=tolerance), f"{case}, step {step}: loss, grad_norm"
        assert result["replicated_equal"], f"{case}: replicated weights differ between tp ranks"
