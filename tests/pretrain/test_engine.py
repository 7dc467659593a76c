"""Memory savings change no numbers, and DeepSpeed's configuration follows from the config."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from pretrain.deepspeed_keys import batch_sizes, deepspeed_config
from pretrain.engine import Engine
from pretrain.layer_figures import LayerFigures
from pretrain.model.architecture import Precision
from pretrain.model.kv_cache import KVCache
from pretrain.model.loss import next_token_targets
from pretrain.model.pieces import valid_targets
from pretrain.model.size import Workload, memory_per_rank
from pretrain.optim import OptimConfig
from pretrain.parallel_config import ParallelConfig
from pretrain.rng import derive_seed
from pretrain.run.metrics import Meter
from pretrain.topology import Topology
from pretrain.zero_pieces import OwnPiece
from shards import ConfigError
from tests.distributed.nonfinite import fingerprint
from tests.distributed.parity import OPTIM, global_batches, model_config

Figures = Callable[..., list[tuple[float, float]]]


def history(
    topology: Topology, precision: Precision = "bf16", layers: list[LayerFigures] | None = None, **parallel: object
) -> list[tuple[float, float]]:
    """Return (loss, gradient norm) of three steps; add the layers' figures to a list, if there is one."""
    config = ParallelConfig.model_validate(parallel)
    derived = deepspeed_config(config, OPTIM, precision, {})
    engine = Engine(model_config(tied=True), OPTIM, config, derived, 2, 4, topology, seed=3)
    found = []
    for step, (tokens, segment_ids) in enumerate(global_batches()[:3]):
        n_targets = int(valid_targets(segment_ids).sum())
        stats = engine.train_step(tokens, segment_ids, n_targets, step, 1e-3, Meter(), measured=layers is not None)
        found.append((stats.loss, stats.grad_norm))
        if layers is not None and stats.layers:
            layers.append(stats.layers)
    return found


@pytest.fixture(scope="module")
def figures(topology: Topology) -> Figures:
    """Return a function from a layout to its `history`, which several tests compare with."""
    return functools.cache(functools.partial(history, topology))


@pytest.fixture(scope="module")
def plain(figures: Figures) -> list[tuple[float, float]]:
    """Return (loss, gradient norm) of three steps without any savings of memory."""
    return figures(zero_stage=1)


def test_ranks_with_other_tokens_draw_other_dropout(topology: Topology) -> None:
    def seed(tp_rank: int, sp_rank: int, dp_rank: int, split_tokens: bool, sp_size: int = 2) -> int:
        here = replace(topology, tp_rank=tp_rank, sp_rank=sp_rank, dp_rank=dp_rank, sp_size=sp_size)
        return Engine._dropout_seed(SimpleNamespace(topology=here, seed=3, _split_tokens=split_tokens), 5, 1)

    places = list(itertools.product((0, 1), repeat=3))
    assert len({seed(*place, split_tokens=True) for place in places}) == 8
    whole = [seed(*place, split_tokens=False) for place in places]
    assert whole[:4] == whole[4:], "tp ranks with the same tokens draw the same"
    assert len(set(whole)) == 4
    assert seed(0, 0, 1, False, sp_size=1) == derive_seed(3, "dropout", 5, 1, 1), "that of runs before rows were shared"


@pytest.mark.parametrize(
    "parallel",
    [
        {"zero_stage": 1},
        {"zero_stage": 2, "offload": "optimizer"},
        {"zero_stage": 3, "offload": "parameters", "activation_checkpointing": "full"},
    ],
)
def test_measuring_the_layers_changes_no_figures(
    topology: Topology, figures: Figures, parallel: dict[str, object]
) -> None:
    layers: list[LayerFigures] = []
    found = history(topology, layers=layers, **parallel)
    assert found == figures(**parallel)
    assert len(layers) == 3
    for (_, grad_norm), of_step in zip(found, layers, strict=True):
        assert math.hypot(*(norms.gradient for norms in of_step.weights.values())) == pytest.approx(grad_norm, rel=1e-5)


@pytest.mark.parametrize(
    "parallel",
    [
        {"zero_stage": 0},
        {"zero_stage": 2, "activation_checkpointing": "selective"},
        {"zero_stage": 1, "offload": "optimizer"},
        {"zero_stage": 2, "offload": "optimizer", "activation_checkpointing": "full"},
        {"zero_stage": 3, "offload": ["parameters", "activations"], "activation_checkpointing": "full"},
    ],
)
def test_memory_savings_change_no_figures(
    topology: Topology, plain: list[tuple[float, float]], parallel: dict[str, object]
) -> None:
    for found, expected in zip(history(topology, **parallel), plain, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_step_without_targets_changes_nothing(topology: Topology, zero_stage: int) -> None:
    parallel = ParallelConfig.model_validate({"zero_stage": zero_stage})
    derived = deepspeed_config(parallel, OPTIM, "bf16", {})
    engine = Engine(model_config(tied=True), OPTIM, parallel, derived, 2, 4, topology, seed=3)
    tokens, segment_ids = global_batches()[0]
    n_targets = int(valid_targets(segment_ids).sum())
    assert engine.train_step(tokens, segment_ids, n_targets, 0, 1e-3, Meter()).applied
    before = fingerprint(engine)  # momentum and weight decay would move the weights
    stats = engine.train_step(tokens, torch.zeros_like(segment_ids), 0, 1, 1e-3, Meter())
    assert not stats.applied
    assert math.isnan(stats.loss)
    assert math.isnan(stats.grad_norm)
    assert fingerprint(engine) == before


@pytest.mark.parametrize("immediate", [False, True])
def test_zero_1_holds_its_gradients_once_and_as_estimated(
    topology: Topology, plain: list[tuple[float, float]], immediate: bool
) -> None:
    """Compare with DeepSpeed's default, which also keeps the bf16 gradients; figures are equal to the last bit."""
    model, parallel = model_config(tied=True), ParallelConfig()
    derived = deepspeed_config(parallel, OPTIM, "bf16", {})
    derived["bf16"]["immediate_grad_update"] &= immediate
    engine = Engine(model, OPTIM, parallel, derived, 2, 4, topology, seed=3)
    take_step, found = engine.deepspeed.optimizer.step, []

    def measured() -> None:
        sums = engine.deepspeed.optimizer.fp32_groups_gradients_flat
        own = [parameter.grad for parameter in engine.model.parameters() if parameter.grad is not None]
        found.append(sum(gradient.nbytes for gradient in (*sums, *own)))
        take_step()

    engine.deepspeed.optimizer.step = measured
    figures = []
    for step, (tokens, segment_ids) in enumerate(global_batches()[:3]):
        n_targets = int(valid_targets(segment_ids).sum())
        stats = engine.train_step(tokens, segment_ids, n_targets, step, 1e-3, Meter())
        figures.append((stats.loss, stats.grad_norm))
    assert figures == plain
    work = Workload(model, parallel, dp_size=1, micro_batch_size=2, seq_len=24, bytes_per_weight=2)
    estimate = memory_per_rank(work).gradients
    assert found == pytest.approx([estimate if immediate else estimate * 1.5] * 3, rel=0.01)


@pytest.mark.parametrize(("checkpointing", "zero_stage"), [("none", 1), ("selective", 2), ("full", 3)])
def test_training_and_scoring_compile_once_each_and_compute_the_same(
    topology: Topology, checkpointing: str, zero_stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter, compiled = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda block, **options: compiled(block, backend=counter, **options))
    torch._dynamo.reset()
    model = model_config(tied=True)
    layout = {"zero_stage": zero_stage, "activation_checkpointing": checkpointing}
    parallel = ParallelConfig.model_validate(layout | {"compile": True})
    engine = Engine(model, OPTIM, parallel, deepspeed_config(parallel, OPTIM, "fp32", {}), 2, 4, topology, seed=3)
    counts, figures = [], []
    for step, (tokens, segment_ids) in enumerate(global_batches()[:3]):
        n_targets = int(valid_targets(segment_ids).sum())
        stats = engine.train_step(tokens, segment_ids, n_targets, step, 1e-3, Meter())
        figures.append((stats.loss, stats.grad_norm))
        counts.append(counter.frame_count)
        engine.score(tokens[:2, :-1], segment_ids[:2, :-1], next_token_targets(tokens[:2], segment_ids[:2]))
        counts.append(counter.frame_count)
        for length in range(2, 20):  # more lengths than torch compiles before it gives up
            engine.next_logits(tokens[:1, :length], KVCache(model.n_layers, 32))
    assert counts == [1, 2, 2, 2, 2, 2]  # a graph for all blocks, in training and in scoring
    uncompiled = history(topology, precision="fp32", **layout)
    assert figures == [pytest.approx(step, rel=1e-5) for step in uncompiled]


def test_flex_attention_is_refused_without_cuda(topology: Topology) -> None:
    if topology.device.type == "cuda":
        pytest.skip("this machine has CUDA")
    with pytest.raises(ConfigError, match=r"parallel\.attention=flex needs CUDA"):
        history(topology, attention="flex")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"train_batch_size": 8}, r"deepspeed\.train_batch_size is refused: it follows from the section train"),
        ({"zero_optimization": {"stage": 2}}, r"deepspeed\.zero_optimization\.stage=2 contradicts 1"),
        ({"zero_optimization": True}, r"deepspeed\.zero_optimization=True contradicts"),
        ({"optimizer": {"type": "Adam"}}, r"deepspeed\.optimizer is refused: it follows from the sections optim"),
        ({"optimizer": {}}, r"deepspeed\.optimizer is refused"),
        ({"scheduler": {"type": "WarmupLR"}}, r"deepspeed\.scheduler is refused: it follows from the sections"),
        ({"fp16": {"enabled": False}}, r"deepspeed\.fp16 is refused: it follows"),
        ({"bf16": {"check_grad_overflow": False}}, r"deepspeed\.bf16\.check_grad_overflow is refused: it follows"),
        ({"checkpoint": {"load_universal": True}}, r"deepspeed\.checkpoint is refused: the section checkpoint"),
        (
            {"managed_gradient_accumulation": False},
            r"managed_gradient_accumulation is refused: the gradients of all",
        ),
        ({"something_new": 1}, r"deepspeed\.something_new is refused: it is not known to be harmless"),
        *(
            ({"zero_optimization": {key: value}}, rf"deepspeed\.zero_optimization\.{key} is refused.*leave it out")
            for key, value in (
                ("round_robin_gradients", True),
                ("load_from_fp32_weights", False),
                ("elastic_checkpoint", True),
                ("sub_group_size", 3000),
                ("parameter_alignment", True),
                ("zero_quantized_weights", True),
            )
        ),
        (
            {"zero_optimization": {"reduce_bucket_size": "5e8"}},
            "reduce_bucket_size='5e8' is wrong; .* whole number",
        ),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, "reduce_bucket_size=0 is wrong"),
        ({"dump_state": 1}, "deepspeed.dump_state=1 is wrong; it should be true or false"),
    ],
)
def test_contradictions_are_refused(extra: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        deepspeed_config(ParallelConfig(), OptimConfig(), "bf16", extra)


def test_deepspeed_keys_that_we_do_not_derive_pass_through() -> None:
    extra = {"zero_optimization": {"reduce_bucket_size": 1000}, "memory_breakdown": True}
    derived = deepspeed_config(ParallelConfig(), OptimConfig(grad_clip=0.5), "bf16", extra)
    assert derived["zero_optimization"]["reduce_bucket_size"] == 1000
    assert derived["memory_breakdown"] is True
    assert derived["gradient_clipping"] == 0.5
    assert batch_sizes(4, 2, 3)["train_batch_size"] == 24


@pytest.mark.parametrize(
    "parallel",
    [
        {"zero_stage": 1},
        {"zero_stage": 2, "offload": "optimizer"},
        {"zero_stage": 3},
    ],
)
def test_the_average_of_the_weights_is_shown_and_changes_no_figures(
    topology: Topology, figures: Figures, parallel: dict[str, object]
) -> None:
    config = ParallelConfig.model_validate(parallel)
    model, derived = model_config(tied=True), deepspeed_config(config, OPTIM, "bf16", {})
    engine = Engine(model, OPTIM, config, derived, 2, 4, topology, seed=3)
    found, weights = [], []
    tokens, segment_ids = global_batches()[4]
    targets = next_token_targets(tokens, segment_ids)
    for step, (ids, segments) in enumerate(global_batches()[:3]):
        stats = engine.train_step(ids, segments, int(valid_targets(segments).sum()), step, 1e-3, Meter())
        found.append((stats.loss, stats.grad_norm))
        weights.append({name: piece_of(engine, weight) for name, weight in engine.model.named_parameters()})
        engine.average.update([1.0, 0.5, 0.25][step])
        engine.average.show(True)
        averaged = engine.score(tokens[:, :-1], segment_ids[:, :-1], targets).nll
        engine.average.show(False)
    assert found == figures(**parallel)
    first, second, third = weights
    means = {name: 0.75 * (first[name] + second[name]) / 2 + 0.25 * third[name] for name in first}
    trained = engine.score(tokens[:, :-1], segment_ids[:, :-1], targets).nll
    engine.set_weights(SimpleNamespace(read=lambda name, index, count: means[name]))
    expected = engine.score(tokens[:, :-1], segment_ids[:, :-1], targets).nll
    assert torch.allclose(averaged, expected, rtol=2e-2)  # a weight may be rounded to the next bf16
    assert (averaged - expected).norm() < 0.1 * (trained - expected).norm()


def piece_of(engine: Engine, parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return a copy of the fp32 values of a whole weight; one rank has all of it."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return OwnPiece(parameter, engine.deepspeed.optimizer, 0).weights.clone().view(shape)
