"""Properties that need a CUDA device: FlexAttention is exact, and a bf16 step equals plain PyTorch in fp32."""

from __future__ import annotations

import pytest
import torch

from pretrain.model.attention import attention_within_pieces
from pretrain.topology import ParallelConfig, Topology
from tests.distributed.parity import LEARNING_RATES, OPTIM, global_batches, model_config, run_case
from tests.reference_model import Shape, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_flex_attention_equals_sdpa(dtype: torch.dtype, tolerance: float, kv_heads: int) -> None:
    torch.manual_seed(0)
    segments = torch.sort(torch.randint(0, 6, (3, 512), device="cuda")).values
    q = torch.randn(3, 8, 512, 64, device="cuda", dtype=dtype, requires_grad=True)
    k, v = (torch.randn(3, kv_heads, 512, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2))
    results = []
    for backend in ("sdpa", "flex"):
        out = attention_within_pieces(segments, backend)(q, k, v)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
    for sdpa, flex in zip(*results, strict=True):
        torch.testing.assert_close(flex.float(), sdpa.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_training_in_bf16_equals_the_reference(topology: Topology, zero_stage: int, tmp_path) -> None:
    assert ParallelConfig().tp_size == topology.world_size == 1
    run_case(topology, 1, 8, False, "fp32", tmp_path)  # leaves the weights that both start from
    config = model_config(False)
    weights = {name: w.cpu() for name, w in torch.load(tmp_path / "weights-untied.pt").items()}
    expected, _ = train(
        weights, Shape(config.n_layers, config.n_heads, config.kv_heads, qk_norm=True), global_batches(),
        LEARNING_RATES, weight_decay=OPTIM.weight_decay, betas=OPTIM.betas, eps=OPTIM.eps,
        grad_clip=OPTIM.grad_clip, z_loss=OPTIM.z_loss,
    )  # fmt: skip
    found = run_case(topology, zero_stage, 2, False, "bf16", tmp_path)["history"]
    for step, (ours, wanted) in enumerate(zip(found, expected, strict=True)):
        assert ours == pytest.approx(wanted, rel=2e-2), f"step {step}"
