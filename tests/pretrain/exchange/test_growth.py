"""A grown model computes what the smaller one does, and all of it learns."""

from __future__ import annotations

import pytest
import torch

from pretrain.exchange.growth import GrownWeights, growable
from pretrain.model.loss import next_token_targets, training_loss
from pretrain.model.transformer import LlamaConfig, Transformer
from pretrain.model.weights import fill
from shards import ConfigError
from tests.pretrain.exchange.test_exchange import Memory

SMALL = {
    "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 48, "vocab_size": 97, "init_std": 0.2,
    "norm_eps": 1e-4,
}  # fmt: skip
WIDER = {"dim": 64, "n_heads": 8, "n_kv_heads": 4, "ffn_dim": 112, "norm_eps": 5e-5}

pytestmark = pytest.mark.usefixtures("topology")


def build(**changes: object) -> Transformer:
    model = Transformer(LlamaConfig.model_validate(SMALL | changes))
    model.initialize(seed=3)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model


def grown(small: Transformer, **changes: object) -> Transformer:
    large = Transformer(LlamaConfig.model_validate(small.config.model_dump() | changes))
    growable(small.config, large.config)
    fill(large, GrownWeights(Memory(small), small.config, large.config, seed=4), 0, 1)
    return large


TOKENS = torch.randint(0, 97, (2, 25), generator=torch.Generator().manual_seed(1))
SEGMENTS = torch.tensor([[1] * 9 + [2] * 16, [1] * 20 + [0] * 5])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"n_layers": 5},
        {"ffn_dim": 96},
        {"dim": 64, "n_heads": 8, "norm_eps": 5e-5},  # more query heads of as many groups
        WIDER,
        {**WIDER, "n_layers": 3},
    ],
)
def test_its_logits_are_those_of_the_smaller_model(tied: bool, changes: dict[str, object]) -> None:
    small = build(tie_embeddings=tied)
    with torch.no_grad():
        expected, found = (model(TOKENS, SEGMENTS) for model in (small, grown(small, **changes)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_norms_of_heads_stay_as_they_are() -> None:
    small = build(qk_norm=True, norm_eps=1e-12)
    with torch.no_grad():
        expected, found = (
            model(TOKENS, SEGMENTS) for model in (small, grown(small, **(WIDER | {"norm_eps": 5e-13}), n_layers=4))
        )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_all_of_it_learns(tied: bool) -> None:
    model = grown(build(tie_embeddings=tied), **WIDER, n_layers=4)
    targets, before = next_token_targets(TOKENS, SEGMENTS), [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # what reads a new place learns once something has been written to it
        optimizer.zero_grad()
        model(TOKENS[:, :-1], SEGMENTS[:, :-1], lambda *x: training_loss(*x, targets, 0.0)).total.backward()
        optimizer.step()
    for (name, now), old in zip(model.named_parameters(), before, strict=True):
        moved = (now != old).detach()
        assert moved.any(0).all(), name
        if name != "embedding.weight":  # of whose tokens some do not occur
            assert moved.any(-1).all(), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 64, "n_heads": 8}, "set model.norm_eps=5e-05"),
        ({"dim": 64, "n_heads": 4, "norm_eps": 5e-5}, "model.head_dim=16, but the smaller model has 8"),
        ({"n_layers": 1}, "model.n_layers=1 is less than the smaller model's 2"),
        ({"ffn_dim": 40}, "model.ffn_dim=40 is less than the smaller model's 48"),
        ({"vocab_size": 98}, "model.vocab_size=98, but the smaller model has 97"),
        ({"n_kv_heads": 4}, "fewer query heads than the smaller model's 2"),
    ],
)
def test_what_would_compute_something_else_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        growable(LlamaConfig.model_validate(SMALL), LlamaConfig.model_validate(SMALL | changes))
