"""Properties that need a CUDA device: attention is exact and never waits, a bf16 step equals plain PyTorch in fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from pretrain.model import loss
from pretrain.model.architecture import Heads
from pretrain.model.attention import Attend, AttentionBackend, attention_within_pieces
from pretrain.model.attention_choice import AttentionShape, attention_backend, with_fastest_attention
from pretrain.model.cached_attention import cached_attention
from pretrain.model.pieces import pieces_of
from pretrain.model.recurrent import scan
from pretrain.model.rotary import rotary_angles, rotate
from pretrain.parallel_config import ParallelConfig
from pretrain.topology import Topology
from tests.distributed.parity import LEARNING_RATES, OPTIM, global_batches, model_config, run_case
from tests.pretrain.model.test_cached_attention import masked_softmax
from tests.reference_model import Shape, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


CUDA = torch.device("cuda")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
BACKENDS = [
    ("varlen", torch.bfloat16),
    ("flex", torch.bfloat16),
    ("flex", torch.float32),
    ("sdpa", torch.bfloat16),
]


def segment_ids(seed: int) -> Tensor:
    """Return the segment ids of three rows, cut at random places, each with padding or none."""
    generator = torch.Generator().manual_seed(seed)
    return torch.sort(torch.randint(0, 6, (3, 512), generator=generator), descending=True).values


def heads(kv_heads: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator(CUDA).manual_seed(0)
    shapes = ((3, 512, n, 64) for n in (8, kv_heads, kv_heads))
    return [torch.randn(*s, device=CUDA, generator=generator).to(dtype).requires_grad_() for s in shapes]


def results(ids: Tensor, backend: AttentionBackend, inputs: list[Tensor]) -> list[Tensor]:
    """Return the output and the gradients of the inputs."""
    out = attention_within_pieces(pieces_of(ids, CUDA), backend)(*inputs)
    return [out, *torch.autograd.grad(out, inputs, torch.cos(out.detach()))]


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_every_attention_equals_that_with_the_whole_mask(
    backend: AttentionBackend, dtype: torch.dtype, kv_heads: int
) -> None:
    for ids in (segment_ids(0), torch.ones(3, 512, dtype=torch.int64), torch.arange(1, 513).expand(3, -1)):
        inputs = heads(kv_heads, dtype)
        expected = results(ids, "sdpa", [x.detach().float().requires_grad_() for x in inputs])
        for found, wanted in zip(results(ids, backend, inputs), expected, strict=True):
            atol = TOLERANCE[dtype] * max(1.0, wanted.abs().max().item())
            torch.testing.assert_close(found.float(), wanted, rtol=TOLERANCE[dtype], atol=atol)


@pytest.mark.parametrize("backend", ["varlen", "flex", "sdpa"])
def test_attention_never_waits_for_the_device(backend: AttentionBackend) -> None:
    inputs = heads(2, torch.bfloat16)
    results(segment_ids(1), backend, inputs)  # compiles, and asks the device for what it can do
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(segment_ids(2), backend, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["varlen", "flex", "sdpa"])
def test_attention_is_compiled_once_for_all_documents(backend: AttentionBackend) -> None:
    def layer(attend: Attend, cos: Tensor, sin: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(rotate(q, cos, sin), rotate(k, cos, sin), v)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, backend=counter, dynamic=False, fullgraph=True)
    inputs = heads(2, torch.bfloat16)
    for seed in range(10):
        pieces = pieces_of(segment_ids(seed), CUDA)
        attend = attention_within_pieces(pieces, backend)
        cos, sin = rotary_angles(pieces.positions, 64, 1e4)
        outs = [function(attend, cos, sin, *inputs) for function in (layer, compiled)]
        eager, found = ([out, *torch.autograd.grad(out, inputs, torch.cos(outs[0].detach()))] for out in outs)
        for one, other in zip(eager, found, strict=True):
            torch.testing.assert_close(other, one, rtol=2e-2, atol=2e-2 * max(1.0, one.abs().max().item()))
    assert counter.frame_count == 1


def test_auto_is_measured_and_runs(topology: Topology) -> None:
    shape = AttentionShape(rows=4, length=2048, n_heads=8, n_kv_heads=2, head_dim=64, dtype=torch.bfloat16)
    chosen = with_fastest_attention(ParallelConfig(), topology, shape)
    assert chosen.attention in ("varlen", "flex", "sdpa")
    assert attention_backend(chosen, topology, Heads(4, 2, 64), torch.bfloat16) == chosen.attention


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_training_in_bf16_equals_the_reference(topology: Topology, zero_stage: int, tmp_path) -> None:
    assert ParallelConfig().tp_size == topology.world_size == 1
    run_case(topology, "fp32", False, 8, {"zero_stage": 1}, tmp_path)  # leaves the weights that both start from
    config = model_config(False)
    weights = {name: w.cpu() for name, w in torch.load(tmp_path / "weights-untied.pt").items()}
    expected, _ = train(
        weights, Shape(config.n_layers, config.n_heads, config.kv_heads, qk_norm=True), global_batches(),
        LEARNING_RATES, weight_decay=OPTIM.weight_decay, betas=OPTIM.betas, eps=OPTIM.eps,
        grad_clip=OPTIM.grad_clip, z_loss=OPTIM.z_loss,
    )  # fmt: skip
    found = run_case(topology, "bf16", False, 2, {"zero_stage": zero_stage}, tmp_path)["history"]
    for step, (ours, wanted) in enumerate(zip(found, expected, strict=True)):
        assert ours == pytest.approx(wanted, rel=2e-2), f"step {step}"


@pytest.mark.parametrize("summed_weights", [0, 1 << 26])
def test_the_loss_is_scaled_without_rounding_the_scale(
    topology: Topology, summed_weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert topology.device.type == "cuda"
    monkeypatch.setattr(loss, "SUMMED_WEIGHTS", summed_weights)
    generator = torch.Generator(CUDA).manual_seed(0)
    hidden, weight = (torch.randn(*s, device=CUDA, generator=generator).bfloat16() for s in ((1, 4096, 64), (512, 64)))
    targets = loss.Targets(torch.arange(4096, device=CUDA), torch.randint(512, (4096,), device=CUDA))
    norms = []
    for scale in (1.0, 0.3343):  # bf16 would make it 0.334
        inputs = [x.clone().requires_grad_() for x in (hidden, weight)]
        total = loss.training_loss(*inputs, targets, 0.0).total
        gradients = torch.autograd.grad(total * torch.full((), scale, device=CUDA), inputs)
        norms.append([float(gradient.double().norm()) for gradient in gradients])
    for whole, scaled in zip(*norms, strict=True):
        assert scaled / whole == pytest.approx(0.3343, rel=2e-4)


@pytest.mark.parametrize("length", [1, 64, 1000])
def test_a_scan_on_cuda_equals_that_on_the_cpu(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    kept, new, gradient = (torch.rand(3, length, 40, generator=generator) for _ in range(3))
    found = []
    for device in ("cpu", "cuda"):
        inputs = [x.to(device).requires_grad_() for x in (kept, new)]
        out = scan(*inputs)
        found.append([x.cpu() for x in (out, *torch.autograd.grad(out, inputs, gradient.to(device)))])
    for on_cpu, on_cuda in zip(*found, strict=True):
        torch.testing.assert_close(on_cuda, on_cpu, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_dim", [64, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_attention_to_a_cache_equals_that_with_a_mask(dtype: torch.dtype, kept: torch.dtype, head_dim: int) -> None:
    for count, n_tokens in ((300, 300), (300, 9000), (1, 9000)):
        q = torch.randn(2, count, 8, head_dim, device=CUDA).to(dtype)
        keys, values = torch.randn(2, 2, 2, n_tokens, head_dim, device=CUDA).to(kept)
        found, expected = cached_attention(q, keys, values), masked_softmax(q.float(), keys, values)
        torch.testing.assert_close(found.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
