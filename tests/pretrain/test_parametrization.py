"""mup is its textbook form, with all multipliers moved into the weights, and the standard one at the base's size."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pretrain.model.transformer import LlamaConfig, Transformer
from pretrain.optim import OptimConfig, parameter_groups
from pretrain.topology import Topology
from tests.reference_model import Shape, Weights, piece_logits

SMALL = {"dim": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 32, "vocab_size": 40}
LARGE = {"dim": 64, "n_layers": 6, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 160, "vocab_size": 40}
BASE = {"dim": 16, "ffn_dim": 32, "n_layers": 2, "head_dim": 8}


def drawn(config: LlamaConfig) -> Weights:
    """Return a model's initial weights."""
    model = Transformer(config)
    model.initialize(seed=5)
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("more", [{}, {"qk_norm": True, "tie_embeddings": True}])
def test_at_the_size_of_its_base_mup_is_the_standard_parametrization(topology: Topology, more: dict) -> None:
    standard = LlamaConfig.model_validate({**SMALL, **more})
    mup = LlamaConfig.model_validate({**SMALL, **more, "parametrization": "mup", "base": BASE})
    weights, scaled = drawn(standard), drawn(mup)
    assert weights.keys() == scaled.keys()
    assert all(torch.equal(weights[name], scaled[name]) for name in weights)
    named = [(name, torch.nn.Parameter(weight)) for name, weight in weights.items()]
    for optim in (OptimConfig(), OptimConfig(name="muon")):
        assert parameter_groups(named, optim, mup.scale_of) == parameter_groups(named, optim, standard.scale_of)


def textbook(name: str, width: float, depth: float, qk_norm: bool) -> tuple[float, float, float]:
    """Return the multiplier of what a weight is applied to, and the factors of its initial values and learning rate.

    Sources: Yang et al. 2022, table 3 with multipliers; Dey et al. 2025, table 1 with alpha = 1. Attention logits are
    divided by head_dim, and equal the standard ones at the base's.
    """
    logits = math.sqrt(BASE["head_dim"] / (LARGE["dim"] / LARGE["n_heads"]))
    part = name.removesuffix(".weight").rpartition(".")[2]
    if part in ("wq", "wk", "wv", "w1", "w3", "wo", "w2"):
        multiplier = {"wo": 1 / depth, "w2": 1 / depth, "wq": 1 if qk_norm else logits}.get(part, 1)
        width = LARGE["ffn_dim"] / BASE["ffn_dim"] if part == "w2" else width  # of what a unit sums
        return multiplier, 1 / math.sqrt(width), 1 / width
    if part == "q_norm":
        return logits, 1, 1
    return (1 / width if name == "norm.weight" else 1), 1, 1


@pytest.mark.parametrize("more", [{}, {"qk_norm": True, "tie_embeddings": True}])
def test_training_equals_the_textbook_form_with_multipliers(topology: Topology, more: dict) -> None:
    config = LlamaConfig.model_validate({**LARGE, **more, "parametrization": "mup", "base": BASE})
    width, depth, qk_norm = LARGE["dim"] / BASE["dim"], LARGE["n_layers"] / BASE["n_layers"], config.qk_norm
    # The textbook's weights, before any multiplier, have the standard parametrization's values, but for the factor.
    standard = drawn(LlamaConfig.model_validate({**LARGE, **more}))
    deeper = math.sqrt(LARGE["n_layers"] / BASE["n_layers"])  # standard inits of branches fall with depth
    plain = {}
    for name, weight in standard.items():
        scale = textbook(name, width, depth, qk_norm)[1]
        plain[name] = weight * scale * (deeper if name.endswith(("wo.weight", "w2.weight")) else 1)
    shape = Shape(config.n_layers, config.n_heads, config.kv_heads, qk_norm=qk_norm, tied=config.tie_embeddings)
    tokens = torch.randint(40, (30,), generator=torch.Generator().manual_seed(1))

    def multiplied(weights: Weights) -> Weights:
        return {name: weight * textbook(name, width, depth, qk_norm)[0] for name, weight in weights.items()}

    own_rates = {name: config.scale_of(name).learning_rate for name in plain}
    found = losses(drawn(config), lambda weights: weights, own_rates, shape, tokens)
    rates = {name: textbook(name, width, depth, qk_norm)[2] for name in plain}
    assert found == pytest.approx(losses(plain, multiplied, rates, shape, tokens), rel=1e-6)
    assert found[-1] < found[0] - 0.5


def losses(
    weights: Weights, multiplied: Callable[[Weights], Weights], rates: dict[str, float], shape: Shape, tokens: Tensor
) -> list[float]:
    """Train a few steps in float64 with AdamW, whose decay of a weight does not depend on its rate."""
    trained = {name: weight.double().requires_grad_() for name, weight in weights.items()}
    groups = [
        {"params": [weight], "lr": 0.01 * rates[name], "weight_decay": 0.1 / rates[name] if weight.dim() > 1 else 0.0}
        for name, weight in trained.items()
    ]
    optimizer, found = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-30), []
    for _ in range(6):
        logits = piece_logits(multiplied(trained), shape, tokens[:-1])
        loss = torch.nn.functional.cross_entropy(logits, tokens[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_mup_needs_a_base_and_the_standard_one_has_none() -> None:
    for wrong in ({"parametrization": "mup"}, {"base": BASE}):
        with pytest.raises(ValueError, match="needs base"):
            LlamaConfig.model_validate({**SMALL, **wrong})
