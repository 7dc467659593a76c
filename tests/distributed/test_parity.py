"""Losses, gradient norms, layers' figures and the noise do not depend on the layout, and equal plain PyTorch's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.parity import LEARNING_RATES, MEASURED, OPTIM, global_batches, model_config
from tests.distributed.ranks import run_ranks
from tests.reference_model import Shape, Weights, batch_loss, layer_figures, target_counts, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def single(folder: Path) -> dict[str, dict]:
    """Run every case on one rank, which also leaves the weights that all cases start from."""
    return run_cases(1, 1, 1, folder)


@pytest.fixture(scope="module")
def references(folder: Path, single: dict[str, dict]) -> dict[bool, dict[str, Any]]:
    """Return what `parity` does of five steps in plain PyTorch, for tied and untied embeddings."""
    results = {}
    for tied in (False, True):
        config = model_config(tied)
        weights = torch.load(folder / f"weights-{'tied' if tied else 'untied'}.pt")
        if tied:
            del weights["output.weight"]
        shape = Shape(config.n_layers, config.n_heads, config.kv_heads, qk_norm=True, tied=tied)
        layers: list[dict[str, Any]] = []
        rows: list[tuple[torch.Tensor, torch.Tensor]] = []

        def observe(
            before: Weights,
            gradients: Weights,
            after: Weights,
            shape: Shape = shape,
            layers: list = layers,
            rows: list = rows,
        ) -> None:
            layers.append(_layers(before, gradients, after, shape, len(layers)))
            rows.append(_rows(before, shape, len(rows)))

        history, _ = train(
            weights, shape, global_batches(), LEARNING_RATES,
            weight_decay=OPTIM.weight_decay, betas=OPTIM.betas, eps=OPTIM.eps,
            grad_clip=OPTIM.grad_clip, z_loss=OPTIM.z_loss, observe=observe,
        )  # fmt: skip
        results[tied] = {"history": history, "layers": [layers[step] for step in MEASURED], "rows": rows}
    return results


def _layers(before: Weights, gradients: Weights, after: Weights, shape: Shape, step: int) -> dict[str, Any]:
    """Return the figures of each block and the norms of each weight, by their definitions."""
    tokens, segment_ids = global_batches()[step]
    figures = layer_figures(before, shape, tokens[:, :-1], segment_ids[:, :-1])
    vectors = (before, gradients, {name: after[name].detach() - weight for name, weight in before.items()})
    for key, values in zip(("weight_norm", "gradient_norm", "update_norm"), vectors, strict=True):
        parts = [[v for name, v in values.items() if name.startswith(f"blocks.{i}.")] for i in range(shape.n_layers)]
        figures[key] = [float(torch.cat([v.flatten() for v in part]).norm()) for part in parts]
    figures["update_ratio"] = [u / w for u, w in zip(figures["update_norm"], figures["weight_norm"], strict=True)]
    return {"layers": figures, "weights": {name: [float(v[name].norm()) for v in vectors] for name in before}}


def _rows(weights: Weights, shape: Shape, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what each row of a step adds to the gradient [rows, weights] of the mean loss, and its targets [rows]."""
    w = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    tokens, segment_ids = global_batches()[step]
    counts = target_counts(segment_ids)
    gradients = []
    for row in range(len(tokens)):
        loss = sum(batch_loss(w, shape, tokens[row : row + 1], segment_ids[row : row + 1], OPTIM.z_loss))
        found = torch.autograd.grad(loss * counts[row] / counts.sum(), list(w.values()))
        gradients.append(torch.cat([of_weight.flatten() for of_weight in found]).double())
    return torch.stack(gradients), counts


def _noise(rows: tuple[torch.Tensor, torch.Tensor], micro_batches: list[list[int]]) -> list[float] | None:
    """Solve for signal and variance what the squared norms of batch and micro-batches are on average."""
    gradients, counts = rows
    if len(micro_batches) == 1:
        return None
    parts = sum(float(gradients[part].sum(0).square().sum()) for part in micro_batches)
    n_targets = int(counts.sum())
    share = sum(int(counts[part].sum()) ** 2 for part in micro_batches) / n_targets**2
    means = [[1, 1 / n_targets], [share, 1 / n_targets]]
    return np.linalg.solve(means, [float(gradients.sum(0).square().sum()), parts]).tolist()


def run_cases(tp_size: int, sp_size: int, dp_size: int, folder: Path) -> dict[str, dict]:
    ranks = tp_size * sp_size * dp_size
    run_ranks(ranks, "tests.distributed.parity", str(tp_size), str(sp_size), str(folder))
    return json.loads((folder / f"tp{tp_size}-sp{sp_size}-dp{dp_size}.json").read_text())


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("tp_size", "sp_size", "dp_size"),
    [(1, 1, 1), (2, 1, 1), (1, 1, 2), (2, 1, 2), (1, 4, 1), (2, 2, 1), (1, 2, 2)],
)
def test_training_equals_the_reference(
    tp_size: int,
    sp_size: int,
    dp_size: int,
    folder: Path,
    single: dict[str, dict],
    references: dict[bool, dict[str, Any]],
) -> None:
    cases = single if tp_size * sp_size * dp_size == 1 else run_cases(tp_size, sp_size, dp_size, folder)
    for case, result in cases.items():
        tolerance = 1e-4 if case.startswith("fp32") else 2e-2
        expected = references["untied" not in case]
        for step, (found, wanted) in enumerate(zip(result["history"], expected["history"], strict=True)):
            assert found == pytest.approx(wanted, rel=tolerance), f"{case}, step {step}: loss, grad_norm"
        tolerance = 1e-4 if case.startswith("fp32") else 0.1  # the gradient of a single vector, in bf16
        for found, wanted in zip(result["layers"], expected["layers"], strict=True):
            for what in ("layers", "weights"):
                assert found[what].keys() == wanted[what].keys()
                for name, values in wanted[what].items():
                    assert found[what][name] == pytest.approx(values, rel=tolerance), f"{case}: {what}, {name}"
        for step, (found, rows) in enumerate(zip(result["noise"], expected["rows"], strict=True)):
            wanted = _noise(rows, result["micro_batches"])
            if wanted is None or sp_size > 1:
                assert found is None, f"{case}: nothing follows from a single micro-batch, or from parts of rows"
                continue
            # The signal is a difference of squared norms, which may be far greater.
            near = pytest.approx(wanted[0], abs=tolerance * expected["history"][step][1] ** 2)
            assert found[0] == near, f"{case}, step {step}: signal"
            assert found[1] == pytest.approx(wanted[1], rel=tolerance), f"{case}, step {step}: variance"
        assert result["replicated_equal"], f"{case}: copies of a weight differ between ranks"
