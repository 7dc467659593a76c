"""lm-evaluation-harness on our model: answers equal those of a plain model, and a local task yields figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the extra: pip install -e '.[eval]'")

from lm_eval.api.instance import Instance

from pretrain.evaluation.harness import HeadraceLM, run_tasks
from pretrain.inference.forward_model import ForwardModel
from pretrain.model.kv_cache import KVCache
from pretrain.parallel_config import ParallelConfig
from pretrain.topology import Topology
from shards import Tokenizer
from tests.distributed.evaluation import SHAPE, TOKENIZER, engine_of
from tests.reference_model import piece_logits

SEQ_LEN = 48


@pytest.fixture(scope="module")
def weights(topology: Topology) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in engine_of(topology, 1).model.named_parameters()}


@pytest.fixture(scope="module")
def lm(topology: Topology, weights: dict[str, torch.Tensor]) -> HeadraceLM:
    class InMemory:
        def read(self, name: str, index: int = 0, count: int = 1) -> torch.Tensor:
            return weights[name]

    model = ForwardModel(engine_of(topology, 1).model.config, ParallelConfig(), "fp32", topology)
    model.set_weights(InMemory())
    return HeadraceLM(model, Tokenizer(TOKENIZER), SEQ_LEN, topology, batch_size=3)


def instances(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=found, idx=i) for i, found in enumerate(arguments)]


def plain(weights: dict[str, torch.Tensor], ids: list[int], targets: int) -> tuple[float, bool]:
    """Return the log-likelihood of the last tokens, and whether each is the most likely one."""
    logits = piece_logits(weights, SHAPE, torch.tensor(ids[:-1])).log_softmax(-1)[-targets:]
    wanted = torch.tensor(ids[-targets:])
    return logits.gather(1, wanted[:, None]).double().sum().item(), bool((logits.argmax(-1) == wanted).all())


def test_continuations_get_the_likelihoods_of_a_plain_model(lm: HeadraceLM, weights: dict[str, torch.Tensor]) -> None:
    tokenizer = Tokenizer(TOKENIZER)
    pairs = [
        ("The cat", " sat"),
        ("", "on the mat"),
        ("long " * 59 + "long", " word and more"),
        ("ab", "漢字"),
        ("x", " y"),
    ]
    found = lm.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    greedy = lm.generate_until(instances("generate_until", ("The cat", {"until": ["\n\n"], "max_gen_toks": 4})))[0]
    for (context, continuation), (value, is_greedy) in zip(pairs, found, strict=True):
        whole = [tokenizer.bos_id, *tokenizer.encode(context + continuation)]
        start = len(tokenizer.encode(context)) + 1 if context else 1
        expected = plain(weights, whole[-(SEQ_LEN + 1) :], len(whole) - start)
        assert value == pytest.approx(expected[0], rel=1e-5), (context, continuation)
        assert is_greedy == expected[1]
    ids = [tokenizer.bos_id, *tokenizer.encode("The cat")]
    start = len(ids)
    for _ in range(4):
        ids.append(int(piece_logits(weights, SHAPE, torch.tensor(ids))[-1].argmax()))
        if ids[-1] == tokenizer.eos_id:
            break
    assert greedy == tokenizer.decode([i for i in ids[start:] if i != tokenizer.eos_id])


def test_a_stop_string_ends_an_answer_before_it(lm: HeadraceLM) -> None:
    whole = lm.generate_until(instances("generate_until", ("A b c", {"until": [], "max_gen_toks": 8})))[0]
    stop = whole[len(whole) // 2]
    cut = lm.generate_until(instances("generate_until", ("A b c", {"until": [stop], "max_gen_toks": 8})))[0]
    assert cut == whole[: whole.index(stop)]


def test_logits_beyond_the_vocabulary_are_never_an_answer(topology: Topology) -> None:
    tokenizer = Tokenizer(TOKENIZER)

    class Padded:
        config = engine_of(topology, 1).model.config

        def next_logits(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
            logits = torch.zeros(1, tokenizer.vocab_size + 64)
            logits[:, tokenizer.encode("word")] = 1.0
            logits[:, tokenizer.vocab_size :] = 2.0
            return logits

    lm = HeadraceLM(Padded(), tokenizer, SEQ_LEN, topology, batch_size=1)  # type: ignore[arg-type]
    asked = instances("generate_until", ("A b c", {"until": [], "max_gen_toks": 2}))
    assert "word" in lm.generate_until(asked)[0]


def test_scoring_a_whole_text_counts_each_token_once(lm: HeadraceLM, weights: dict[str, torch.Tensor]) -> None:
    tokenizer = Tokenizer(TOKENIZER)
    text = "some words that go on " * 12
    ids = tokenizer.encode(text)
    assert 2 * SEQ_LEN > len(ids) > SEQ_LEN
    found = lm.loglikelihood_rolling(instances("loglikelihood_rolling", (text,), ("short",), ("",)))
    first, _ = plain(weights, [tokenizer.bos_id, *ids[:SEQ_LEN]], SEQ_LEN)
    rest, _ = plain(weights, ids[len(ids) - SEQ_LEN - 1 :], len(ids) - SEQ_LEN)
    assert found[0] == pytest.approx(first + rest, rel=1e-5)
    short = tokenizer.encode("short")
    assert found[1] == pytest.approx(plain(weights, [tokenizer.bos_id, *short], len(short))[0], rel=1e-5)
    assert found[2] == 0.0


def test_a_local_task_runs(lm: HeadraceLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    questions = [{"q": f"Question {i}?", "choices": ["yes", "no"], "gold": i % 2} for i in range(6)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (tmp_path / "mine.yaml").write_text(f"""
task: headrace_local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}} Answer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}]
""")
    figures = run_tasks(lm, ["headrace_local"], tmp_path, None)["headrace_local"]
    asked = [(f"Question {i}? Answer:", f" {choice}") for i in range(6) for choice in ("yes", "no")]
    values = [value for value, _ in lm.loglikelihood(instances("loglikelihood", *asked), disable_tqdm=True)]
    right = sum((values[2 * i] < values[2 * i + 1]) == (i % 2 == 1) for i in range(6))
    assert figures["acc,none"] == pytest.approx(right / 6)
