"""Scores equal those of a plain model that is given one document at a time, and do not depend on the batch size."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from pretrain.engine import Engine, deepspeed_config
from pretrain.evaluate import EvaluationConfig, Score, eval_records, evaluate, load_suite
from pretrain.generate import continue_text
from pretrain.model.transformer import ModelConfig
from pretrain.optim import OptimConfig
from pretrain.topology import ParallelConfig, Topology
from shards import ConfigError, Tokenizer
from tests.reference_model import Shape, piece_logits

SAMPLE = Path(__file__).parents[2] / "shards" / "sample"
TOKENIZER = SAMPLE / "tokenizer-4k.model"
SEQ_LEN = 32
TEXTS = {
    "long": ["word " * 150 + "end", "Ein Satz. " * 9],
    "short": ["a", "", "two words", "漢字とかな \U0001f600", "x" * 31],
}


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    for domain, texts in TEXTS.items():
        folder = tmp_path / "texts" / domain
        folder.mkdir(parents=True)
        folder.joinpath("val.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path / "texts"


@pytest.fixture(scope="module")
def engine(topology: Topology) -> Engine:
    config = ModelConfig(dim=32, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=48, vocab_size=4096, init_std=0.15)
    parallel, optim = ParallelConfig(), OptimConfig()
    return Engine(config, optim, parallel, "fp32", deepspeed_config(parallel, optim, "fp32", 1, 1, 1, {}), topology, 0)


def expected_scores(engine: Engine) -> dict[str, Score]:
    """One document at a time, long ones in windows of SEQ_LEN targets that do not overlap in targets."""
    tokenizer = Tokenizer(TOKENIZER)
    weights = {name: weight.detach() for name, weight in engine.model.named_parameters()}
    scores = {}
    for domain, texts in TEXTS.items():
        nll, tokens, correct = 0.0, 0, 0
        for text in texts:
            ids = torch.tensor([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id])
            for start in range(0, len(ids) - 1, SEQ_LEN):
                window = ids[start : start + SEQ_LEN + 1]
                logits = piece_logits(weights, Shape(2, 2, 1), window[:-1])
                nll -= logits.log_softmax(-1).gather(1, window[1:, None]).double().sum().item()
                correct += int((logits.argmax(-1) == window[1:]).sum())
                tokens += len(window) - 1
        scores[domain] = Score(nll, tokens, correct, sum(len(text.encode()) for text in texts))
    return scores


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_scores_equal_one_document_at_a_time(suite: Path, engine: Engine, topology: Topology, batch_size: int) -> None:
    eval_set = load_suite(EvaluationConfig(suite=suite), Tokenizer(TOKENIZER), SEQ_LEN)
    assert eval_set is not None
    found = evaluate(engine, eval_set, topology, batch_size)
    for domain, expected in expected_scores(engine).items():
        assert found[domain].nll == pytest.approx(expected.nll, rel=1e-5), domain
        assert (found[domain].tokens, found[domain].correct) == (expected.tokens, expected.correct), domain
        assert found[domain].text_bytes == expected.text_bytes, domain


def test_records_hold_each_domain_and_both_averages() -> None:
    scores = {"a": Score(nll=20.0, tokens=10, correct=5, text_bytes=40), "b": Score(6.0, 2, 0, 4)}
    records = {str(record["domain"]): record for record in eval_records(7, "suite", scores)}
    assert list(records) == ["a", "b", "macro", "micro"]
    assert {record["step"] for record in records.values()} == {7}
    assert records["a"]["bits_per_byte"] == pytest.approx(20 / math.log(2) / 40)
    assert records["macro"]["nll_per_token"] == pytest.approx((2.0 + 3.0) / 2)
    assert records["macro"]["perplexity"] == pytest.approx(math.exp(2.5))
    assert records["micro"]["nll_per_token"] == pytest.approx(26 / 12)
    assert records["micro"]["bits_per_byte"] == pytest.approx(26 / math.log(2) / 44)
    assert records["micro"]["accuracy"] == pytest.approx(5 / 12)


def test_an_evaluation_leaves_weights_and_random_state(suite: Path, engine: Engine, topology: Topology) -> None:
    eval_set = load_suite(EvaluationConfig(suite=suite), Tokenizer(TOKENIZER), SEQ_LEN)
    assert eval_set is not None
    before = [parameter.clone() for parameter in engine.model.parameters()]
    state = torch.get_rng_state()
    evaluate(engine, eval_set, topology, 2)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, engine.model.parameters(), strict=True))


def test_a_missing_suite_or_split_is_named(tmp_path: Path, suite: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.suite=.*nowhere is no folder"):
        load_suite(EvaluationConfig(suite=tmp_path / "nowhere"), Tokenizer(TOKENIZER), SEQ_LEN)
    with pytest.raises(ConfigError, match=r"<domain>/test\.json"):
        load_suite(EvaluationConfig(suite=suite, split="test"), Tokenizer(TOKENIZER), SEQ_LEN)


def test_a_continuation_depends_on_its_seed_alone(engine: Engine) -> None:
    tokenizer = Tokenizer(TOKENIZER)

    def run(**options: float) -> str:
        return continue_text(engine, tokenizer, "The word", SEQ_LEN, 12, **options)  # type: ignore[arg-type]

    assert run(seed=1) == run(seed=1) != run(seed=2)
    greedy = run(temperature=0)
    ids = [tokenizer.bos_id, *tokenizer.encode("The word")]
    prompt = len(ids)
    weights = {name: weight.detach() for name, weight in engine.model.named_parameters()}
    while len(ids) < prompt + 12 and ids[-1] != tokenizer.eos_id:
        ids.append(int(piece_logits(weights, Shape(2, 2, 1), torch.tensor(ids))[-1].argmax()))
    assert greedy == tokenizer.decode(ids[prompt:])
