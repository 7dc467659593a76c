"""Impossible evaluations are warned of; the loss of initialized weights is predicted for models of many shapes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from torch import Tensor

from pretrain.evaluation.eval_set import EvalSet, EvaluationConfig, find_suite, load_suite
from pretrain.evaluation.plausibility import doubts, drawn_loss, warn_of_doubts
from pretrain.evaluation.scoring import evaluate
from pretrain.model.loss import Scores, Targets, target_scores
from pretrain.model.transformer import LlamaConfig, Transformer
from pretrain.topology import Topology
from shards import Tokenizer, read_documents
from tests.distributed.evaluation import TOKENIZER

CONFIG = LlamaConfig(dim=64, n_layers=2, n_heads=2, vocab_size=4096)


@pytest.fixture(scope="module")
def eval_set(tmp_path_factory: pytest.TempPathFactory) -> EvalSet:
    """Load the beginning of a document of each bundled domain."""
    folder = tmp_path_factory.mktemp("suite")
    for shard in Path("shards/sample/eval").glob("*/val.jsonl.zst"):
        text = next(read_documents(shard)).text[:300]
        (folder / f"{shard.parent.name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    config = EvaluationConfig(suite=folder)
    found = find_suite(config)
    assert found is not None
    return load_suite(found, config, Tokenizer(TOKENIZER), 64, "fp32")


def records(**losses: float) -> list[dict[str, object]]:
    return [{"step": 3, "suite": "s", "domain": name, "nll_per_token": loss} for name, loss in losses.items()]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dim", "n_layers", "init_std"), [(64, 2, 0.02), (256, 2, 0.06), (128, 1, 0.1), (64, 2, 0.3)])
def test_random_weights_raise_no_doubt_but_wrongly_scaled_logits_do(
    dim: int,
    n_layers: int,
    init_std: float,
    tied: bool,
    eval_set: EvalSet,
    topology: Topology,
) -> None:
    shape = {"dim": dim, "n_layers": n_layers, "n_heads": dim // 32, "ffn_dim": dim, "init_std": init_std}
    config = LlamaConfig.model_validate({**shape, "vocab_size": 4096, "tie_embeddings": tied})
    model = Transformer(config).eval()
    model.initialize(seed=1)

    def said(times: float) -> list[str]:
        def score(tokens: Tensor, segment_ids: Tensor, targets: Targets) -> Scores:
            return model(tokens, segment_ids, lambda hidden, weight: target_scores(times * hidden, weight, targets))

        scores = evaluate(score, eval_set, topology, 8)
        return list(doubts(scores.records(0), config, drawn=True))

    assert said(1.0) == []
    (doubt,) = said(30.0)
    assert f"should give about {drawn_loss(config):.2f}" in doubt


def test_a_perplexity_above_the_vocabulary_size_is_reported_by_domain(caplog: pytest.LogCaptureFixture) -> None:
    uniform = math.log(CONFIG.vocab_size)
    warn_of_doubts(records(wiki=uniform, code=1.0, macro=uniform - 1, micro=2.0), CONFIG)
    assert caplog.text == ""
    warn_of_doubts(records(wiki=uniform + 0.01, code=43.0, books=math.nan, macro=2.0, micro=2.0), CONFIG)
    assert "step 3, s: the perplexity of wiki, code, books is above 4096" in caplog.text


def test_a_first_loss_that_random_weights_cannot_have_is_reported() -> None:
    assert list(doubts(records(micro=math.log(4096)), CONFIG, drawn=True)) == []
    for loss in (6.0, 43.0, math.nan, math.inf):
        (doubt,) = doubts(records(micro=loss), CONFIG, drawn=True)
        assert f"the loss is {loss:.2f} nats per token" in doubt


def test_an_evaluation_far_below_training_is_reported() -> None:
    assert list(doubts(records(micro=2.0), CONFIG, training_loss=3.0)) == []
    assert list(doubts(records(micro=2.0), CONFIG)) == []
    (said,) = doubts(records(micro=1.0), CONFIG, training_loss=3.0)
    assert "far below that of training, 3.00" in said


def test_a_domain_that_never_moves_is_reported_once() -> None:
    def course(count: int, moved: float) -> list[dict[str, object]]:
        return [
            {**record, "step": step}
            for step in range(count)
            for record in records(wiki=5.0 - moved * step, code=4.0, micro=4.5 - moved * step / 2)
        ]

    last = records(wiki=3.0, code=4.0, micro=3.5)
    assert [len(list(doubts(last, CONFIG, before=course(count, 0.3)))) for count in range(8)] == [
        0,
        0,
        0,
        0,
        1,
        0,
        0,
        0,
    ]
    (said,) = doubts(last, CONFIG, before=course(4, 0.3))
    assert "the loss of code has not moved in 5 evaluations" in said
    still = records(wiki=5.0, code=4.0, micro=4.5)
    assert list(doubts(still, CONFIG, before=course(4, 0.0))) == [], "where nothing moves, no domain is the exception"
