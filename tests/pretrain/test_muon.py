"""Muon's update is a matrix with singular values near 1, whatever saves memory and whichever steps are left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.deepspeed_keys import deepspeed_config
from pretrain.engine import Engine
from pretrain.model.architecture import Precision
from pretrain.model.size import checkpoint_bytes
from pretrain.muon import orthogonalize
from pretrain.optim import OptimConfig
from pretrain.parallel_config import ParallelConfig
from pretrain.step_stats import Limits
from pretrain.topology import Topology
from tests.distributed.nonfinite import fingerprint, infinite_loss, step
from tests.distributed.parity import GLOBAL_ROWS, model_config
from tests.reference_model import orthogonalized

OPTIM = OptimConfig(name="muon", grad_clip=0.5)


def random_matrix(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16), (1, 8)])
def test_singular_values_are_mapped_and_singular_vectors_kept(shape: tuple[int, int]) -> None:
    matrix = random_matrix(*shape)
    found = orthogonalize(matrix)
    torch.testing.assert_close(found, orthogonalized(matrix), rtol=0, atol=2e-5)
    torch.testing.assert_close(orthogonalize(1e-20 * matrix), found, rtol=0, atol=2e-5)
    assert float((orthogonalize(matrix.bfloat16()).float() - found).norm()) < 0.03 * float(found.norm())


def test_values_far_apart_come_close_to_1_and_nothing_stays_nothing() -> None:
    u, _, v = torch.linalg.svd(random_matrix(32, 48), full_matrices=False)
    values = torch.linalg.svdvals(orthogonalize(u * torch.logspace(0, -1.9, 32) @ v))
    assert 0.65 < float(values.min()) < float(values.max()) < 1.2
    assert torch.equal(orthogonalize(torch.zeros(3, 5)), torch.zeros(3, 5))


def make_engine(topology: Topology, precision: Precision, **parallel: object) -> Engine:
    config = ParallelConfig.model_validate(parallel)
    derived = deepspeed_config(config, OPTIM, precision, {})
    return Engine(model_config(tied=False), OPTIM, config, derived, 2, GLOBAL_ROWS // 2, topology, seed=3)


# Of gradients that differ in the last bits, some numbers are rounded to bf16 otherwise before they are orthogonalized.
@pytest.mark.parametrize(
    ("precision", "tolerance", "parallel"),
    [
        ("fp32", 1e-5, {"zero_stage": 1, "offload": "optimizer"}),
        ("fp32", 1e-5, {"zero_stage": 2, "offload": "optimizer"}),
        ("fp32", 1e-5, {"zero_stage": 3, "offload": "parameters"}),
        ("bf16", 1e-2, {"zero_stage": 2}),
        ("bf16", 1e-2, {"zero_stage": 3}),
    ],
)
def test_memory_savings_change_no_figures(
    topology: Topology, precision: Precision, tolerance: float, parallel: dict[str, object]
) -> None:
    plain, saving = make_engine(topology, precision), make_engine(topology, precision, **parallel)
    for number in range(3):
        wanted, found = step(plain, topology, number), step(saving, topology, number)
        assert (found.loss, found.grad_norm) == pytest.approx((wanted.loss, wanted.grad_norm), rel=tolerance)


@pytest.mark.parametrize(("precision", "zero_stage"), [("bf16", 1), ("fp32", 1), ("fp32", 2), ("fp32", 3)])
def test_a_step_that_is_left_out_leaves_no_trace(topology: Topology, precision: Precision, zero_stage: int) -> None:
    engine = make_engine(topology, precision, zero_stage=zero_stage)
    assert step(engine, topology, 0).applied
    before = fingerprint(engine)
    with infinite_loss(engine, topology):
        assert not step(engine, topology, 1).applied
    assert step(engine, topology, 1, Limits(loss=0.1)).refused
    assert fingerprint(engine) == before
    assert step(engine, topology, 1).applied
    assert fingerprint(engine) != before


def test_a_checkpoint_has_one_moment_of_a_matrix_and_the_size_that_is_expected(topology: Topology) -> None:
    engine = make_engine(topology, "bf16")
    step(engine, topology, 0)
    sizes: list[int] = []

    def add(item: object) -> None:
        if isinstance(item, torch.Tensor):
            sizes.append(item.nbytes)
        elif isinstance(item, dict | list):
            for value in item.values() if isinstance(item, dict) else item:
                add(value)

    engine.save(Path("unused"), lambda path, content: add(content))
    # Beyond the weights and moments there are only counters
    assert sum(sizes) == pytest.approx(checkpoint_bytes(model_config(tied=False), 2, "muon"), abs=1000)
