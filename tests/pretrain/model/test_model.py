"""The model computes what LLaMA computes, for each document of a packed row separately."""

from __future__ import annotations

import functools

import psutil
import pytest
import torch
from fairscale.nn.model_parallel import layers as fairscale_layers
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM

from pretrain.model.kv_cache import KVCache
from pretrain.model.loss import Loss, next_token_targets, training_loss
from pretrain.model.pieces import pieces_of, valid_targets
from pretrain.model.rotary import rotary_angles, rotate
from pretrain.model.transformer import LlamaConfig, Transformer
from pretrain.parallel_config import ParallelConfig
from pretrain.rng import seeded
from pretrain.topology import Topology
from shards import ConfigError
from tests.reference_model import Shape, batch_loss, piece_logits, pieces

# Of the frequencies of heads of size 8, one is unchanged, one scaled by 8, and two lie in between.
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 40.0,
    "original_max_position_embeddings": 200,
}  # fmt: skip
# Of its four frequencies one is unchanged and one or two are scaled by 4, all before position 24
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 2.0, "beta_slow": 0.05}
SCALINGS: list[dict[str, object] | None] = [
    LLAMA3,
    {"rope_type": "linear", "factor": 4.0},
    YARN,
    YARN | {"attention_factor": 1.5},
    YARN | {"mscale": 1.2, "mscale_all_dim": 0.6, "truncate": False},
    {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 20},
]
SEGMENTS = torch.tensor([[1] * 9 + [2] * 1 + [3] * 14, [1] * 20 + [0] * 4])  # [2, 24]: three pieces; one and padding


def build(parallel: dict[str, object] | None = None, **changes: object) -> Transformer:
    values = {"dim": 48, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2, "ffn_dim": 80, "vocab_size": 97, "init_std": 0.2}
    model = Transformer(LlamaConfig.model_validate(values | changes), ParallelConfig.model_validate(parallel or {}))
    model.initialize(seed=5)
    return model


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.usefixtures("topology")
@pytest.mark.parametrize(
    ("tied", "kv_heads", "scaling"),
    [(False, 6, None), (True, 2, LLAMA3), *((False, 1, scaling) for scaling in SCALINGS)],
)
def test_logits_equal_those_of_transformers(tied: bool, kv_heads: int, scaling: dict[str, object] | None) -> None:
    ours = build(tie_embeddings=tied, n_kv_heads=kv_heads, rope_theta=5e4, rope_scaling=scaling)
    theirs = LlamaForCausalLM(
        TheirConfig(
            hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=kv_heads,
            intermediate_size=80, vocab_size=97, rms_norm_eps=1e-5, tie_word_embeddings=tied,
            rope_parameters={"rope_theta": 5e4, **(scaling or {"rope_type": "default"})}, attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    names = {
        "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj", "feed_forward.w2": "mlp.down_proj",
    }  # fmt: skip
    weights = {}
    for name, weight in ours.state_dict().items():
        for our_part, their_part in names.items():
            name = name.replace(our_part, their_part)
        name = {"embedding.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight"}.get(name, name)
        weights[name.replace("blocks.", "model.layers.")] = weight
    weights["model.norm.weight"] = weights.pop("norm.weight")
    theirs.load_state_dict(weights)
    tokens = random_tokens(2, 90)  # well beyond the original lengths
    with torch.no_grad():
        found, expected = ours(tokens, torch.ones_like(tokens)), theirs(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.usefixtures("topology")
def test_a_model_adopts_other_positions_also_where_its_blocks_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    compiled, tokens = build({"compile": True}), random_tokens(2, 24)
    for changes in ({}, {"rope_theta": 50.0}, {"rope_theta": 50.0, "rope_scaling": YARN}, {}):
        plain = build(**changes)
        compiled.adopt(plain.config)
        results = []
        for model in (compiled, plain):
            model.zero_grad()
            logits = model(tokens, SEGMENTS)
            logits.logsumexp(-1).sum().backward()
            results.append((logits.detach(), model.blocks[0].attention.wq.weight.grad))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_scalings_are_told_apart_and_each_has_its_own_keys() -> None:
    def parse(**scaling: object) -> object:
        return LlamaConfig.parse({"dim": 8, "n_layers": 1, "n_heads": 1, "vocab_size": 9, "rope_scaling": scaling}, "m")

    assert parse(factor=8.0) == parse(rope_type="llama3", factor=8.0), "as configs from before there was a choice"
    for scaling, message in (
        ({"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings: missing"),
        (YARN | {"low_freq_factor": 1.0}, "rope_scaling.low_freq_factor: unknown key"),
        (YARN | {"mscale": 1.0}, "mscale and mscale_all_dim"),
        (YARN | {"beta_slow": 2.0}, "beta_fast=2.0 must be above beta_slow=2.0"),
        ({"rope_type": "linear", "factor": 1.0}, "rope_scaling.factor: 1.0 is wrong"),
        ({"rope_type": "longrope", "factor": 4.0}, 'rope_scaling.rope_type: "longrope" is wrong; it should be one of'),
    ):
        with pytest.raises(ConfigError) as caught:
            parse(**scaling)
        assert message in str(caught.value)


@pytest.mark.usefixtures("topology")
def test_the_gradient_through_a_scaled_rotation_is_that_of_plain_operations() -> None:
    scaling = LlamaConfig.parse(
        {"dim": 8, "n_layers": 1, "n_heads": 1, "vocab_size": 9, "rope_scaling": YARN}
    ).rope_scaling
    x = torch.randn(1, 5, 2, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64, requires_grad=True)
    cos, sin = rotary_angles(torch.arange(5)[None], 8, 1e4, scaling)
    first, second = x.chunk(2, -1)
    plain = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    gradients = [torch.autograd.grad((out * weight).sum(), x)[0] for out in (rotate(x, cos, sin), plain)]
    torch.testing.assert_close(gradients[0].float(), gradients[1].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("topology")
@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "n_kv_heads": 1, "rope_scaling": LLAMA3}])
def test_a_cache_gives_each_token_the_logits_of_one_forward_pass(changes: dict[str, object]) -> None:
    model, tokens, cache = build(**changes), random_tokens(2, 24), KVCache(n_layers=3, max_length=24)
    with torch.no_grad():
        whole = model(tokens, torch.ones_like(tokens))
        parts = [model(part, cache=cache) for part in tokens.split([7, 1, 1, 10, 5], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("topology")
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_packed_row_gives_each_document_the_logits_that_it_gets_alone(qk_norm: bool) -> None:
    model, tokens = build(qk_norm=qk_norm), random_tokens(2, 24)
    with torch.no_grad():
        packed = model(tokens, SEGMENTS)
        for row, segment in ((0, 1), (0, 2), (0, 3), (1, 1)):
            piece = tokens[row][SEGMENTS[row] == segment]
            alone = model(piece[None], torch.ones(1, len(piece), dtype=torch.int64))[0]
            torch.testing.assert_close(packed[row][SEGMENTS[row] == segment], alone, rtol=1e-5, atol=1e-5)
    assert packed.isfinite().all()  # padding too: a NaN there would reach the gradients through 0 * NaN


@pytest.mark.usefixtures("topology")
@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"tie_embeddings": True, "n_kv_heads": 1}])
def test_logits_equal_the_plain_reference(changes: dict[str, object]) -> None:
    model, tokens = build(**changes), random_tokens(2, 24)
    config = model.config
    shape = Shape(3, 6, config.kv_heads, qk_norm=config.qk_norm, tied=config.tie_embeddings)
    with torch.no_grad():
        found = pieces(model(tokens, SEGMENTS), SEGMENTS)  # type: ignore[arg-type]
        for logits, piece in zip(found, pieces(tokens, SEGMENTS), strict=True):
            expected = piece_logits(dict(model.named_parameters()), shape, piece)
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("topology")
def test_tokens_of_prompts_are_read_and_never_learned() -> None:
    """Compare with plain PyTorch; a token that is only a prompt's has its output lowered everywhere, never raised."""
    model, tokens = build(qk_norm=True), random_tokens(2, 25)
    segments = torch.cat((SEGMENTS, SEGMENTS[:, -1:]), dim=1)
    segments[0, :5], segments[0, 10:14], segments[0, 18:20], segments[1] = -1, -3, -3, -segments[1]
    tokens[tokens == 96] = 0
    tokens[segments < 0] = 96
    seen: list[torch.Tensor] = []

    def head(hidden: torch.Tensor, weight: torch.Tensor) -> Loss:
        seen.append(hidden)
        return training_loss(hidden, weight, next_token_targets(tokens, segments), z_loss=1e-3)

    loss = model(tokens[:, :-1], segments[:, :-1], head)
    loss.total.backward()
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in model.named_parameters()}
    shape = Shape(3, 6, 2, qk_norm=True, tied=False)
    mean, squares = batch_loss(weights, shape, tokens, segments, 1e-3)
    n_targets = len(loss.nll)
    assert n_targets == 4 + (25 - 10) - 4 - 2  # piece 1 without its prompt; piece 3 without two of them
    assert mean.item() * n_targets == pytest.approx(loss.nll.sum().item(), rel=1e-5)
    ((mean + squares) * n_targets).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-4, atol=1e-5, msg=name)
    hidden = seen[0].detach().flatten(0, 1)[next_token_targets(tokens, segments).positions]
    logits = hidden @ model.get_parameter("output.weight").detach().t()
    slope = logits.softmax(-1)[:, 96] * (1 + 2e-3 * logits.logsumexp(-1))  # nothing is subtracted for a target
    torch.testing.assert_close(model.get_parameter("output.weight").grad[96], slope @ hidden, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("topology")
@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointing_changes_no_gradient(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", lambda block, **options: compile_(block, **options))
    tokens, gradients = random_tokens(2, 25), {}
    segments = torch.cat((SEGMENTS, SEGMENTS[:, -1:]), dim=1)
    for what in ("none", "selective", "full"):
        parallel = {"activation_checkpointing": what, "compile": compiled}
        model = build(parallel, dropout=0.1, attention_dropout=0.1, qk_norm=True)
        head = functools.partial(training_loss, targets=next_token_targets(tokens, segments), z_loss=1e-3)
        with seeded(7, torch.device("cpu")):
            model(tokens[:, :-1], SEGMENTS, head).total.backward()
        gradients[what] = [p.grad for p in model.parameters()]
    for plain, selective, full in zip(*gradients.values(), strict=True):
        assert torch.equal(plain, selective)
        assert torch.equal(plain, full)


@pytest.mark.usefixtures("topology")
@pytest.mark.parametrize("dropout", [{"dropout": 0.3}, {"attention_dropout": 0.3}])
def test_dropout_depends_on_the_seed_alone(dropout: dict[str, object]) -> None:
    model, tokens = build(**dropout), random_tokens(1, 24)
    segments = torch.ones_like(tokens)

    def run(seed: int) -> torch.Tensor:
        with seeded(seed, torch.device("cpu")):
            return model(tokens, segments)

    first = run(1)
    torch.rand(5)
    assert torch.equal(first, run(1))
    assert not torch.equal(first, run(2))
    model.eval()
    assert torch.equal(run(1), run(2))


def test_positions_restart_in_each_piece() -> None:
    expected = [[*range(9), 0, *range(14)], [*range(20), *range(4)]]
    assert pieces_of(SEGMENTS, torch.device("cpu")).positions.tolist() == expected


def test_targets_are_the_next_tokens_of_the_same_piece() -> None:
    segments = torch.tensor([[1, 1, 2, 3, 3, 0, 0]])
    assert valid_targets(segments).tolist() == [[True, False, False, True, False, False]]


@pytest.mark.usefixtures("topology")
@pytest.mark.parametrize(("init", "kurtosis"), [("normal", 3.0), ("trunc_normal", 2.8)])
def test_initial_weights_have_the_configured_spread(init: str, kurtosis: float, topology: Topology) -> None:
    model = build(dim=256, n_heads=4, n_kv_heads=4, ffn_dim=512, init=init, init_std=0.03)
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            assert torch.equal(weight, torch.ones_like(weight)), name
            continue
        std = 0.03 / 6**0.5 if name.endswith(("wo.weight", "w2.weight")) else 0.03
        assert weight.std().item() == pytest.approx(std, rel=0.03), name
        if init == "trunc_normal":
            assert weight.abs().max() <= 3 * std
    w1 = model.get_parameter("blocks.0.feed_forward.w1.weight")
    assert ((w1 / w1.std()) ** 4).mean().item() == pytest.approx(kurtosis, abs=0.1)


@pytest.mark.usefixtures("topology")
@pytest.mark.parametrize("tp_size", [1, 2])
def test_weights_that_are_not_drawn_yet_take_no_memory(tp_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairscale_layers, "get_model_parallel_world_size", lambda: tp_size)
    before = psutil.Process().memory_info().rss
    model = Transformer(LlamaConfig(dim=1024, n_layers=2, n_heads=8, vocab_size=16_000))
    grown = psutil.Process().memory_info().rss - before
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert weights > 50e6
    assert grown < 0.3 * weights  # the process may grow a little by itself
