"""What adapters cost is what they take, and their slices, merged weights and refusals are right."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config import load_config
from pretrain.config_changes import compare_for_resume
from pretrain.model.architecture import WeightSpec
from pretrain.model.lora import LoraConfig
from pretrain.model.loss import Targets, training_loss
from pretrain.model.size import Workload, checkpoint_bytes, flops_of_documents, memory_per_rank, parameter_count
from pretrain.model.transformer import LlamaConfig, Transformer
from pretrain.model.weights import AdaptedWeights, MergedWeights, fill, trained_specs, weight_specs
from pretrain.parallel_config import ParallelConfig
from shards import ConfigError

SMALL = LlamaConfig(dim=48, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=80, vocab_size=101)
LORA = LoraConfig(r=3, alpha=12, targets=("wk", "wo", "w3", "w2"))
ADAPTED = SMALL.model_copy(update={"lora": LORA})
LLAMA_7B = LlamaConfig(dim=4096, n_layers=32, n_heads=32, vocab_size=32_000)
QUICKSTART = Path("configs/quickstart.yaml")


class Drawn:
    """Weights of these shapes, drawn by their names; a source of slices of them."""

    def __init__(self, specs: dict[str, WeightSpec]) -> None:
        self._specs = specs

    def read(self, name: str, index: int = 0, count: int = 1) -> Tensor:
        spec = self._specs[name]
        generator = torch.Generator().manual_seed(list(self._specs).index(name))
        return torch.randn(spec.shape, generator=generator)[spec.bounds(index, count)]


@pytest.mark.usefixtures("topology")
def test_a_model_trains_its_adapters_alone() -> None:
    model = Transformer(ADAPTED)
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name: spec.shape for name, spec in trained_specs(ADAPTED).items()}
    assert trained["blocks.1.attention.wk.lora.b"] == (24, 3)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == set(weight_specs(ADAPTED)) == set(trained_specs(SMALL))


@pytest.mark.usefixtures("topology")
def test_flops_with_adapters_are_those_that_torch_counts() -> None:
    model, lengths = Transformer(ADAPTED), (3, 17, 40)
    model.initialize(seed=0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for length in lengths:
            tokens = torch.arange(length)[None]
            model(tokens, torch.ones_like(tokens)).sum().backward()
    squares = sum(length**2 for length in lengths)
    assert counter.get_total_flops() == flops_of_documents(ADAPTED, sum(lengths), 2 * squares)


@pytest.mark.usefixtures("topology")
@pytest.mark.parametrize("tp_size", [1, 2])
def test_merged_weights_compute_what_the_adapters_do(tp_size: int) -> None:
    base, adapters = Drawn(weight_specs(SMALL)), Drawn(trained_specs(ADAPTED))
    merged = MergedWeights(base, adapters, ADAPTED)
    for name, spec in weight_specs(SMALL).items():
        for rank in range(tp_size):
            part = merged.read(name, rank, tp_size)
            torch.testing.assert_close(part, merged.read(name)[spec.bounds(rank, tp_size)])
    beside, instead = Transformer(ADAPTED).double(), Transformer(SMALL).double()
    fill(beside, AdaptedWeights(base, adapters), 0, 1)
    fill(instead, merged, 0, 1)
    tokens = torch.arange(20)[None]
    found, wanted = (model(tokens, torch.ones_like(tokens)) for model in (beside, instead))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)  # merged in fp32


@pytest.mark.usefixtures("topology")
def test_a_frozen_output_has_no_gradient_and_the_states_have_theirs() -> None:
    states, weight = torch.randn(1, 9, 8, requires_grad=True), torch.randn(30, 8)
    targets = Targets(torch.arange(8), torch.arange(8))
    gradients = []
    for output in (weight, weight.clone().requires_grad_()):
        training_loss(states, output, targets, z_loss=0.1).total.backward()
        gradients.append(states.grad)
        states.grad = None
    assert torch.equal(*gradients)
    assert weight.grad is None


def test_memory_counts_states_of_the_adapters_alone() -> None:
    lora = LoraConfig(r=16, alpha=32)
    model = LLAMA_7B.model_copy(update={"lora": lora})
    # A and B of wq, wk, wv and wo, each 16 * (4096 + 4096); of w1, w3 and w2, each 16 * (4096 + 11008)
    trained = 32 * 16 * (4 * 8192 + 3 * 15_104)
    assert trained == 39_976_960
    work = Workload(model, ParallelConfig(), 8, 1, 2048, bytes_per_weight=2)
    found = memory_per_rank(work)
    assert found.weights == 2 * (parameter_count(LLAMA_7B) + trained)
    assert (found.gradients, found.optimizer) == (4 * trained, 12 * trained // 8)
    assert memory_per_rank(dataclasses.replace(work, averaged=True)).optimizer == 16 * trained // 8
    assert checkpoint_bytes(model, 2) == 14 * trained
    # On two tp ranks: half of W; of A and B the half that is split, and all of the other
    halves = 32 * 16 * (4 * (4096 + 2048) + 2 * (4096 + 5504) + (5504 + 4096))
    split = dataclasses.replace(work, parallel=ParallelConfig(tp_size=2))
    assert memory_per_rank(split).weights == 2 * (parameter_count(LLAMA_7B) // 2 + split.trained)
    assert split.trained == halves
    partitioned = dataclasses.replace(work, parallel=ParallelConfig(zero_stage=3))
    assert memory_per_rank(partitioned).weights == 2 * ((parameter_count(LLAMA_7B) + trained) // 8)
    whole = memory_per_rank(dataclasses.replace(work, model=LLAMA_7B))
    assert found.activations < whole.activations


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["init_from=null"], "model.lora: adapters are trained on a model that exists; set init_from"),
        (["init_optimizer=true"], "model.lora: the state of an optimizer of all weights means nothing to adapters"),
        (["optim.name=muon"], "model.lora: optim.name=muon orthogonalizes matrices"),
        (["model.parametrization=mup", "model.base={dim: 8, n_layers: 1}"], "set parametrization: standard"),
        (["model.lora.targets=[wq, w4]"], "\"w4\" is wrong; it should be 'wq', 'wk'"),
        (["model.lora.targets=[wq, wq]"], "model.lora.targets: name each matrix once"),
        (["model.lora.targets=[]"], "model.lora.targets: name each matrix once, and at least one"),
        (
            ["optim.learning_rate_groups={norm.weight: 2.0}"],
            "no weight's name matches 'norm.weight'; the names are",
        ),
        (
            ["model.lora.dropout=0.1", "parallel.tp_size=2", "parallel.sequence_parallel=true"],
            "model.lora.dropout=0.1: with parallel.sequence_parallel each tensor-parallel rank draws masks of its own",
        ),
    ],
)
def test_what_adapters_cannot_do_is_refused_with_what_would_be_right(overrides: list[str], message: str) -> None:
    given = ["model.lora={r: 8, alpha: 16}", "init_from=models/x"]
    assert load_config(QUICKSTART, given).model.lora is not None
    with pytest.raises(ConfigError, match="model.lora|learning_rate_groups") as caught:
        load_config(QUICKSTART, [*given, *overrides])
    assert message in str(caught.value)


def test_a_resume_may_find_the_model_elsewhere_but_not_other_adapters() -> None:
    given = ["model.lora={r: 8, alpha: 16}", "init_from=models/x"]
    old = load_config(QUICKSTART, given)
    refused, allowed = compare_for_resume(old, load_config(QUICKSTART, [*given, "init_from=models/y"]), 5)
    assert (refused, [change.key for change in allowed]) == ([], ["init_from"])
    for change in ("model.lora.r=4", "model.lora.alpha=8", "model.lora.dropout=0.5", "model.lora.targets=[wq]"):
        refused, _ = compare_for_resume(old, load_config(QUICKSTART, [*given, change]), 5)
        assert refused, change
    plain = load_config(QUICKSTART, ["init_from=models/x"])
    assert compare_for_resume(plain, load_config(QUICKSTART, ["init_from=models/y"]), 5)[0]
    assert compare_for_resume(plain, old, 5)[0]
