"""The recurrent model computes what a loop over the tokens does, for each document of a packed row separately."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain.evaluation.plausibility import doubt_of_first_loss
from pretrain.model.loss import Loss, next_token_targets, training_loss
from pretrain.model.recurrent import Recurrent, RecurrentConfig, scan
from pretrain.model.size import flops_per_token, parameter_count
from pretrain.model.weights import weight_specs
from pretrain.parallel_config import ParallelConfig
from pretrain.rng import seeded
from pretrain.topology import Topology
from tests.examples import examples

SEGMENTS = torch.tensor([[1] * 9 + [2] * 1 + [3] * 14, [-1] * 8 + [1] * 12 + [0] * 4])  # three pieces; one, and padding


def build(parallel: dict[str, object] | None = None, **changes: object) -> Recurrent:
    values = {"dim": 24, "n_layers": 3, "context_dim": 20, "ffn_dim": 40, "vocab_size": 97, "init_std": 0.2}
    model = Recurrent(RecurrentConfig.model_validate(values | changes), ParallelConfig.model_validate(parallel or {}))
    model.initialize(seed=5)
    return model


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(1))


def normalized(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def logits_of_piece(w: dict[str, Tensor], n_layers: int, tokens: Tensor) -> Tensor:
    """Return the logits [T, vocab_size] of one piece [T], token by token, as the module's docstring says."""
    contexts = [torch.zeros(len(w["blocks.0.gate.bias"])) for _ in range(n_layers)]
    found = []
    for token in tokens:
        x = w["embedding.weight"][token]
        for i in range(n_layers):
            b = f"blocks.{i}."
            read = normalized(x, w[b + "norm.weight"])
            a = torch.sigmoid(w[b + "gate.weight"] @ read + w[b + "gate.bias"])
            contexts[i] = a * contexts[i] + (1 - a) * (w[b + "candidate.weight"] @ read)
            hidden = w[b + "w1.weight"] @ normalized(contexts[i], w[b + "context_norm.weight"])
            x = x + w[b + "w2.weight"] @ (hidden * torch.sigmoid(hidden))
        found.append(w.get("output.weight", w["embedding.weight"]) @ normalized(x, w["norm.weight"]))
    return torch.stack(found)


@pytest.mark.usefixtures("topology")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_loss_and_gradients_equal_those_of_a_loop_over_the_tokens_of_each_piece(tied: bool, checkpointing: str) -> None:
    model = build({"activation_checkpointing": checkpointing}, tie_embeddings=tied).train()
    with torch.no_grad():
        for _, norm in model.named_parameters():
            if norm.dim() == 1:
                norm.add_(torch.randn(norm.shape, generator=torch.Generator().manual_seed(len(norm))) * 0.2)
    tokens = random_tokens(2, 24)
    targets = next_token_targets(tokens, SEGMENTS)
    head = functools.partial(training_loss, targets=targets, z_loss=0.0)
    loss: Loss = model(tokens[:, :-1], SEGMENTS[:, :-1], head)
    loss.total.backward()

    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = torch.zeros(())
    for row, begin, end, learned in ((0, 0, 9, 0), (0, 9, 10, 0), (0, 10, 24, 10), (1, 0, 20, 8)):
        piece = tokens[row, begin:end]
        logits = logits_of_piece(weights, 3, piece)[:-1]
        nll = F.cross_entropy(logits, piece[1:], reduction="none")
        expected = expected + nll[max(0, learned - begin - 1) :].sum()
    expected.backward()
    torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-4, atol=1e-5, msg=name)


def test_layers_are_measured_by_the_tokens_that_are_no_padding(topology: Topology) -> None:
    model, tokens = build().eval(), random_tokens(2, 24)
    measurement = model.measurement(topology)
    seen: dict[int, list[Tensor]] = {i: [] for i in range(3)}
    with torch.no_grad(), measurement.of(SEGMENTS):
        for i, block in enumerate(model.blocks):
            block.register_forward_hook(lambda _block, inputs, x, i=i: seen[i].extend((inputs[0], x)))
        model(tokens, SEGMENTS)
    found, real = measurement.finish(), SEGMENTS.flatten() != 0
    for i, (before, after) in seen.items():
        weights = model.blocks[i].state_dict()
        read = normalized(before[real], weights["norm.weight"])
        kept = torch.sigmoid(read @ weights["gate.weight"].T + weights["gate.bias"])
        assert found["context_kept"][i] == pytest.approx(float(kept.mean()), rel=1e-5)
        assert found["residual_rms"][i] == pytest.approx(float(after[real].square().mean()) ** 0.5, rel=1e-5)
        assert found["residual_max"][i] == pytest.approx(float(after[real].abs().max()), rel=1e-5)


@pytest.mark.usefixtures("topology")
def test_contexts_give_each_token_the_logits_of_one_forward_pass_in_memory_that_does_not_grow() -> None:
    model, tokens = build().eval(), random_tokens(2, 24)
    cache = model.config.new_cache(max_length=24)
    with torch.no_grad():
        whole = model(tokens, torch.ones_like(tokens))
        parts = [model(part, cache=cache) for part in tokens.split([7, 1, 1, 10, 5], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)
    assert cache.length == 24
    kept = [context.values for context in cache.of_layers if context.values is not None]
    assert [values.shape for values in kept] == [(2, 20)] * 3
    assert [values.untyped_storage().nbytes() for values in kept] == [2 * 20 * 4] * 3


@settings(max_examples=examples(100))
@given(st.integers(1, 70), st.integers(1, 3), st.integers(0, 1 << 30))
def test_the_scan_and_its_gradients_are_those_of_a_loop(length: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, length, 3, generator=generator) * (torch.rand(rows, length, 1, generator=generator) > 0.1)
    new, gradient = torch.randn(2, rows, length, 3, generator=generator)
    ours, looped = ([x.clone().requires_grad_() for x in (kept, new)] for _ in range(2))
    carried, states = torch.zeros(rows, 3), []
    for t in range(length):
        carried = looped[0][:, t] * carried + looped[1][:, t]
        states.append(carried)
    expected = torch.stack(states, dim=1)
    found = scan(*ours)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad(found, ours, gradient), torch.autograd.grad(expected, looped, gradient), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_the_scan_is_an_operator_that_can_be_compiled() -> None:
    inputs = [x.requires_grad_() for x in (torch.rand(2, 7, 3), torch.randn(2, 7, 3))]
    torch.library.opcheck(scan, tuple(inputs))


@pytest.mark.usefixtures("topology")
@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_compiled_blocks_are_one_graph_that_computes_the_same(
    checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    tokens = random_tokens(2, 24)
    head = functools.partial(training_loss, targets=next_token_targets(tokens, SEGMENTS), z_loss=1e-3)
    found = []
    for parallel in ({}, {"compile": True, "activation_checkpointing": checkpointing}):
        model = build(parallel, dropout=0.2).train()
        with seeded(3, torch.device("cpu")):
            model(tokens[:, :-1], SEGMENTS[:, :-1], head).total.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("topology")
def test_in_bf16_contexts_are_still_summed_in_fp32() -> None:
    model, tokens = build().eval(), random_tokens(1, 400)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())  # the same weights in both
        whole = model(tokens, torch.ones_like(tokens))
        cache = model.config.new_cache(400)
        rounded = model.bfloat16()(tokens, torch.ones_like(tokens)).float()
        model(tokens, cache=cache)
    assert all(context.values is not None and context.values.dtype == torch.float32 for context in cache.of_layers)
    assert float((rounded - whole).norm() / whole.norm()) < 0.02


@pytest.mark.usefixtures("topology")
def test_dropout_changes_training_and_nothing_else() -> None:
    model, tokens = build(dropout=0.5), random_tokens(2, 24)

    def logits(seed: int) -> Tensor:
        with torch.no_grad(), seeded(seed, torch.device("cpu")):
            return model(tokens, SEGMENTS)

    model.train()
    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))
    model.eval()
    assert torch.equal(logits(1), logits(2))


@pytest.mark.usefixtures("topology")
@pytest.mark.parametrize("tied", [False, True])
def test_the_listed_weights_are_those_of_the_model(tied: bool) -> None:
    model = build(tie_embeddings=tied, vocab_multiple=64)
    named = {name: tuple(p.shape) for name, p in model.named_parameters()}
    specs = weight_specs(model.config)
    assert {name: spec.shape for name, spec in specs.items()} == {
        name: (97, *shape[1:]) if name in ("embedding.weight", "output.weight") else shape
        for name, shape in named.items()
    }
    order = [name for name, _ in model.named_parameters() if "norm.weight" != name != "output.weight"]
    assert list(specs) == [*order, "norm.weight", *([] if tied else ["output.weight"])]


def test_sizes_are_those_that_the_formulas_give() -> None:
    config = RecurrentConfig(dim=256, n_layers=6, vocab_size=1000, tie_embeddings=True)
    layer = 2 * 256 * 256 + 2 * 256 * 512 + 3 * 256
    assert parameter_count(config) == 6 * layer + 1000 * 256 + 256 == 2_620_160
    assert flops_per_token(config, 64) == 6 * (6 * (2 * 256 * 256 + 2 * 256 * 512) + 1000 * 256)


@pytest.mark.usefixtures("topology")
def test_a_drawn_model_begins_at_the_loss_that_is_expected_of_it() -> None:
    model = build(init_std=0.1, dim=64, vocab_size=500).eval()
    tokens = torch.randint(0, 500, (4, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(tokens, torch.ones_like(tokens))
    assert float(logits.var()) == pytest.approx(model.config.logit_variance, rel=0.2)
    assert math.isfinite(float(logits.sum()))


@pytest.mark.parametrize(("tied", "doubted"), [(False, True), (True, False)])
def test_a_first_loss_is_doubted_only_where_it_is_known(tied: bool, doubted: bool) -> None:
    config = RecurrentConfig(dim=256, n_layers=1, vocab_size=4096, tie_embeddings=tied)
    assert (doubt_of_first_loss(13.6, config, "step 1") is not None) == doubted
    assert doubt_of_first_loss(8.9, config, "step 1") is None
