"""Scores equal those of a plain model that sees one document at a time, however the work is split."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.engine import Engine
from pretrain.evaluation.eval_set import EvalSet, EvaluationConfig, find_suite, load_suite
from pretrain.evaluation.needles import load_needles
from pretrain.evaluation.scores import DocumentScores, Score, ScoresOfAverage, line_names, record_scores
from pretrain.evaluation.scoring import evaluate
from pretrain.evaluation.tasks import TaskConfig, load_tasks
from pretrain.run.run_folder import RunFolder
from pretrain.topology import Topology
from shards import ConfigError, ShardError, Tokenizer
from tests.distributed.evaluation import (
    NEEDLES,
    SEQ_LEN,
    SHAPE,
    TEXTS,
    TOKENIZER,
    engine_of,
    nearly,
    write_suite,
    write_tasks,
)  # fmt: skip
from tests.distributed.ranks import run_ranks
from tests.reference_model import piece_logits

BATCH_SIZES = [1, 2, 7]


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_suite(tmp_path_factory.mktemp("suite") / "texts")


@pytest.fixture(scope="module")
def engine(topology: Topology) -> Engine:
    return engine_of(topology, zero_stage=1)


@pytest.fixture(scope="module")
def windows(engine: Engine) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Score one document at a time, long ones in windows of SEQ_LEN targets whose targets do not overlap.

    Returns: the domain of each window, its targets' losses in nats, and whether they were the most likely tokens.
    """
    tokenizer = Tokenizer(TOKENIZER)
    weights = {name: weight.detach() for name, weight in engine.model.named_parameters()}
    found = []
    for domain, text in ((domain, text) for domain, texts in TEXTS.items() for text in texts):
        ids = torch.tensor([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id])
        for start in range(0, len(ids) - 1, SEQ_LEN):
            window = ids[start : start + SEQ_LEN + 1]
            logits = piece_logits(weights, SHAPE, window[:-1])
            nll = -logits.log_softmax(-1).gather(1, window[1:, None])[:, 0].double()
            found.append((domain, nll, logits.argmax(-1) == window[1:]))
    return found


@pytest.fixture(scope="module")
def expected(windows: list[tuple[str, torch.Tensor, torch.Tensor]]) -> dict[str, Score]:
    scores = {}
    for domain, texts in TEXTS.items():
        parts = [(nll, correct) for of, nll, correct in windows if of == domain]
        nll, correct = (torch.cat(columns) for columns in zip(*parts, strict=True))
        scores[domain] = Score(nll.sum().item(), len(nll), int(correct.sum()), sum(len(t.encode()) for t in texts))
    return scores


@pytest.fixture(scope="module")
def by_context(windows: list[tuple[str, torch.Tensor, torch.Tensor]]) -> dict[tuple[str, str], list[float]]:
    """Return the losses of each domain's targets after up to 16 tokens of context, and after more."""
    found: dict[tuple[str, str], list[float]] = {}
    for domain, nll, _ in windows:
        for context, loss in enumerate(nll.tolist(), start=1):
            found.setdefault((domain, "1-16" if context <= 16 else "17-32"), []).append(loss)
    return found


def assert_contexts(scores: DocumentScores, by_context: dict[tuple[str, str], list[float]]) -> None:
    lines = {str(line["domain"]): line["by_context"] for line in scores.records(0)}
    assert {(domain, name) for domain in TEXTS for name in lines[domain]} == set(by_context)
    for (domain, name), losses in by_context.items():
        assert lines[domain][name] == {
            "nll_per_token": pytest.approx(np.mean(losses), rel=1e-5),
            "perplexity": pytest.approx(np.exp(np.mean(losses)), rel=1e-4),
            "tokens": len(losses),
        }
    for name in ("1-16", "17-32"):
        of_domains = [losses for (_, other), losses in by_context.items() if other == name]
        every = [loss for losses in of_domains for loss in losses]
        assert lines["micro"][name]["nll_per_token"] == pytest.approx(np.mean(every), rel=1e-5)
        mean = np.mean([np.mean(losses) for losses in of_domains])
        assert lines["macro"][name]["nll_per_token"] == pytest.approx(mean, rel=1e-5)
        assert lines["macro"][name]["domains"] == len(of_domains)
        assert lines["macro"][name]["tokens"] == lines["micro"][name]["tokens"] == len(every)


def loaded(suite: Path, *, tokenizer: Tokenizer | None = None, **changes: object) -> EvalSet:
    config = EvaluationConfig.model_validate({"suite": suite, **changes})
    found = find_suite(config)
    assert found is not None
    return load_suite(found, config, tokenizer or Tokenizer(TOKENIZER), SEQ_LEN, "fp32")


def assert_equal(found: dict[str, Score], expected: dict[str, Score], case: str) -> None:
    assert list(found) == sorted(expected), case
    for domain, score in expected.items():
        assert found[domain].nll == pytest.approx(score.nll, rel=1e-5), f"{case}, {domain}"
        assert found[domain].tokens == score.tokens, f"{case}, {domain}"
        assert found[domain].correct == score.correct, f"{case}, {domain}"
        assert found[domain].text_bytes == score.text_bytes, f"{case}, {domain}"


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_scores_equal_those_of_one_document_at_a_time(
    suite: Path,
    engine: Engine,
    topology: Topology,
    expected: dict[str, Score],
    by_context: dict[tuple[str, str], list[float]],
    batch_size: int,
) -> None:
    scores = evaluate(engine.score, loaded(suite), topology, batch_size)
    assert_equal(scores.by_domain(), expected, f"rows {batch_size}")
    assert_contexts(scores, by_context)


@pytest.mark.distributed
@pytest.mark.parametrize(("tp_size", "sp_size", "dp_size"), [(2, 1, 1), (1, 1, 2), (2, 1, 2), (1, 2, 2)])
def test_scores_do_not_depend_on_the_ranks(
    suite: Path,
    tmp_path: Path,
    engine: Engine,
    topology: Topology,
    expected: dict[str, Score],
    by_context: dict[tuple[str, str], list[float]],
    tp_size: int,
    sp_size: int,
    dp_size: int,
) -> None:
    tasks = [TaskConfig(requests=path) for path in write_tasks(tmp_path / "tasks")]
    how = (Tokenizer(TOKENIZER), SEQ_LEN, "fp32")
    alone = [
        line
        for task in [*load_tasks(tasks, 0, *how), *load_needles(NEEDLES, *how)]
        for line in evaluate(engine.score, task, topology, 2).records(0)
    ]
    folders = (str(suite), str(tmp_path / "tasks"), str(tmp_path))
    run_ranks(tp_size * sp_size * dp_size, "tests.distributed.evaluation", str(tp_size), str(sp_size), *folders)
    for path in sorted(tmp_path.glob("*.json")):
        for line, wanted in zip(json.loads(path.read_text()), alone, strict=True):
            assert line == nearly(wanted), path.stem
    results = sorted(tmp_path.glob("*.npz"))
    assert len(results) == 3
    for path in results:
        assert_equal(DocumentScores.load(path).by_domain(), expected, path.stem)
        assert_contexts(DocumentScores.load(path), by_context)


def test_all_ranks_together_have_the_rows_of_a_single_one(suite: Path) -> None:
    tokenizer, config = Tokenizer(TOKENIZER), EvaluationConfig(suite=suite)
    alone, found = loaded(suite), find_suite(config)
    assert found is not None
    shares = [load_suite(found, config, tokenizer, SEQ_LEN, "fp32", rank, 3) for rank in range(3)]
    dealt = [row for i in range(len(alone.rows)) for row in shares[i % 3].rows[i // 3 : i // 3 + 1]]
    assert [row.tokens.tolist() for row in dealt] == [row.tokens.tolist() for row in alone.rows]
    assert sum(len(share.rows) for share in shares) == alone.num_rows


TASKS = [("name it", "it is so"), ("a b c d e f g h i j " * 20, "short"), ("say nothing", ""), ("1", "one\ntwo " * 4)]
TALKS = [[("user", "hi"), ("assistant", "you"), ("user", "what then"), ("assistant", "nothing much")]]


def write_prompts(folder: Path, **changes: object) -> Path:
    """Write a suite of tasks, of talks and of plain texts."""
    tasks = [{"task": task, "done": done} for task, done in TASKS]
    talks = [{"messages": [{"role": role, "content": said} for role, said in talk]} for talk in TALKS]
    for name, records in (("tasks", tasks), ("talks", talks), ("texts", [{"text": "plain text"}] * 3)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    sources = [
        {"name": "tasks", "path": "tasks.jsonl", "template": "Q: {task}\nA: {done}", **changes},
        {"name": "talks", "path": "talks.jsonl", "messages_key": "messages", "chat_format": "chatml", **changes},
        {"name": "texts", "path": "texts.jsonl"},
    ]
    (folder / "suite.yaml").write_text(json.dumps({"sources": sources}))
    return folder / "suite.yaml"


def test_only_responses_are_scored_with_what_fits_of_their_prompts(
    tmp_path: Path, engine: Engine, topology: Topology
) -> None:
    tokenizer = Tokenizer(TOKENIZER)
    weights = {name: weight.detach() for name, weight in engine.model.named_parameters()}
    documents = []  # texts, prompts and responses in turn; response bytes; domain
    for task, done in TASKS:
        prompt, end = (f"Q: {task}\nA:", f" {done}") if done else (f"Q: {task}\nA: ", "")
        documents.append(([prompt, end], len(end.encode()), "tasks"))
    start, stop = "<|im_start|>", "<|im_end|>"
    for (_, asked), (_, said), (_, again), (_, answer) in TALKS:
        turns = [f"{start}user\n{asked}{stop}\n{start}assistant\n", said + stop]
        turns += [f"\n{start}user\n{again}{stop}\n{start}assistant\n", answer + stop]
        documents.append((turns, len((turns[1] + turns[3]).encode()), "talks"))
    found = evaluate(engine.score, loaded(write_prompts(tmp_path)), topology, 3)
    for i, (parts, size, domain) in enumerate(documents):
        pieces = [tokenizer.encode_beginnings(parts[:1])[0].tolist()]
        pieces += [ids.tolist() for ids in tokenizer.encode_following(parts[1:])]
        pieces[-1].append(tokenizer.eos_id)
        flat = [(token, number % 2 == 1) for number, piece in enumerate(pieces) for token in piece]
        first = next(place for place, (_, learned) in enumerate(flat) if learned)
        fits = len(flat) - first <= SEQ_LEN
        nll, correct, counted = 0.0, 0, 0
        for begin in [max(0, len(flat) - SEQ_LEN - 1)] if fits else range(0, len(flat) - 1, SEQ_LEN):
            window = flat[begin : begin + SEQ_LEN + 1]
            ids, mask = torch.tensor([token for token, _ in window]), torch.tensor([said for _, said in window])[1:]
            logits = piece_logits(weights, SHAPE, ids[:-1])
            nll -= logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0][mask].double().sum().item()
            correct += int((logits.argmax(-1) == ids[1:])[mask].sum())
            counted += int(mask.sum())
        assert found.nll[i] == pytest.approx(nll, rel=1e-5)
        assert (found.tokens[i], found.correct[i], found.text_bytes[i]) == (counted, correct, size)
        assert counted == sum(learned for _, learned in flat)
        assert found.domains[found.domain[i]] == domain


def test_what_is_scored_of_prompts_is_in_the_label(tmp_path: Path) -> None:
    suites = [loaded(write_prompts(tmp_path)), loaded(write_prompts(tmp_path, loss_on="all"))]
    assert suites[0].label != suites[1].label
    assert [suite.targets[-3:].tolist() for suite in suites] == [suites[0].targets[-3:].tolist()] * 2
    assert (suites[0].targets[:-3] < suites[1].targets[:-3]).all()
    bounded = loaded(write_prompts(tmp_path), max_documents=1)
    assert len(bounded.targets) == 3


def test_a_form_that_does_not_work_in_a_suite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="source 'tasks': template and messages_key both say what a document is"):
        loaded(write_prompts(tmp_path, messages_key="x", chat_format="chatml"))
    write_prompts(tmp_path)
    (tmp_path / "tasks.jsonl").write_text('{"task": "x"}')
    with pytest.raises(ShardError, match="tasks.jsonl, line 1: has no key 'done'; its keys are 'task'; fix it"):
        loaded(tmp_path / "suite.yaml")


def test_a_document_with_nothing_to_predict_counts_only_its_bytes(
    tmp_path: Path, engine: Engine, topology: Topology
) -> None:
    tmp_path.joinpath("d.jsonl").write_text('{"text": ""}\n{"text": "a"}\n{"text": "more than that"}\n')
    bare = Tokenizer(TOKENIZER, bos=False, eos=False)
    assert len(bare.encode("a")) == 1
    scores = evaluate(engine.score, loaded(tmp_path, tokenizer=bare), topology, 2)
    assert scores.tokens.tolist() == [0, 0, len(bare.encode("more than that")) - 1]
    assert scores.text_bytes.tolist() == [0, 1, 14]
    assert np.isfinite(scores.nll).all()


def test_a_domain_with_nothing_to_predict_is_named(tmp_path: Path) -> None:
    tmp_path.joinpath("full.jsonl").write_text('{"text": "two words"}\n')
    tmp_path.joinpath("empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="nothing to predict in empty"):
        loaded(tmp_path)
    tmp_path.joinpath("empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ConfigError, match="nothing to predict in empty"):
        loaded(tmp_path, tokenizer=Tokenizer(TOKENIZER, bos=False, eos=False))


@pytest.fixture
def many(tmp_path: Path) -> Path:
    texts = [f"document {i} " + "word " * (i * 37 % 60) for i in range(60)]
    tmp_path.joinpath("one.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tmp_path.joinpath("two.jsonl").write_text("".join(json.dumps({"text": text + "2"}) + "\n" for text in texts))
    return tmp_path


def test_a_bounded_suite_is_a_fixed_part_of_every_larger_one(many: Path) -> None:
    whole, few, more = loaded(many), loaded(many, max_documents=5), loaded(many, max_documents=20)
    assert np.bincount(few.document_domain).tolist() == [5, 5]
    assert set(few.document_key) < set(more.document_key) < set(whole.document_key)
    assert set(loaded(many, max_documents=5, subset_seed=1).document_key) != set(few.document_key)
    lines = many.joinpath("one.jsonl").read_text().splitlines(keepends=True)
    many.joinpath("one.jsonl").write_text("".join(reversed(lines)))
    assert set(loaded(many, max_documents=5).document_key) == set(few.document_key), "in whatever order they come"


@pytest.mark.parametrize("max_tokens", [1, 100, 700])
def test_a_limit_in_tokens_is_met_by_whole_documents(many: Path, max_tokens: int) -> None:
    whole, part = loaded(many), loaded(many, max_tokens=max_tokens)
    for domain in (0, 1):
        kept = part.targets[part.document_domain == domain]
        assert len(kept) == 1 or (kept + 1).sum() <= max_tokens
    assert set(part.document_key) <= set(whole.document_key)
    assert set(part.document_key) <= set(loaded(many, max_tokens=max_tokens + 300).document_key)


def test_a_label_names_what_is_scored(many: Path) -> None:
    def label(seq_len: int = SEQ_LEN, precision: str = "fp32", bos: bool = True, **changes: object) -> str:
        config = EvaluationConfig.model_validate({"suite": many, **changes})
        found = find_suite(config)
        assert found is not None
        return load_suite(found, config, Tokenizer(TOKENIZER, bos=bos), seq_len, precision).label

    named = label()
    name, _, digits = named.partition("@")
    assert name == f"{many.name}.seq{SEQ_LEN}.fp32"
    assert len(digits) == 8
    assert label(max_documents=5).startswith(f"{many.name}.docs5.seq{SEQ_LEN}.fp32@")
    one = many / "one.jsonl"
    lines = one.read_text().splitlines(keepends=True)
    one.write_text("".join(reversed(lines)))
    assert label() == named, "in whatever order they come"
    found = [label(seq_len=2 * SEQ_LEN), label(precision="bf16"), label(bos=False), label(max_tokens=99)]
    for changed in (lines[1:], [*lines, lines[0]], [lines[0].replace("document", "other"), *lines[1:]]):
        one.write_text("".join(changed))
        found.append(label())
    one.write_text("".join(lines))
    one.rename(many / "three.jsonl")  # the same texts as another domain
    found.append(label())
    assert len({named, *found}) == 1 + len(found)


def test_records_hold_each_domain_and_all_averages(tmp_path: Path) -> None:
    scores = DocumentScores(
        suite="suite",
        domains=("a", "s/x", "s/y"),
        sources=("a", "s", "s"),
        domain=np.array([0, 1, 2, 0], np.int32),
        key=np.arange(4, dtype=np.uint64),
        nll=np.array([15.0, 6.0, 12.0, 5.0]),
        tokens=np.array([7, 2, 3, 3]),
        correct=np.array([4, 0, 3, 1]),
        text_bytes=np.array([30, 4, 6, 10]),
    )
    records = {str(record["domain"]): record for record in scores.records(7)}
    assert list(records) == ["a", "s/x", "s/y", "source:s", "macro", "micro"]
    assert {(record["step"], record["suite"]) for record in records.values()} == {(7, "suite")}
    assert {tuple(sorted(record)) for record in records.values()} == {
        ("accuracy", "bits_per_byte", "bytes", "domain", "nll_per_token", "perplexity", "step", "suite", "tokens")
    }
    assert records["a"]["bits_per_byte"] == pytest.approx(20 / math.log(2) / 40)
    assert records["source:s"]["nll_per_token"] == pytest.approx(18 / 5)
    assert records["macro"]["nll_per_token"] == pytest.approx((2.0 + 3.0 + 4.0) / 3)
    assert records["macro"]["perplexity"] == pytest.approx(math.exp(3.0))
    assert records["micro"]["nll_per_token"] == pytest.approx(38 / 15)
    assert records["micro"]["bits_per_byte"] == pytest.approx(38 / math.log(2) / 50)
    assert records["micro"]["accuracy"] == pytest.approx(8 / 15)
    lines = record_scores(RunFolder(tmp_path), 7, ScoresOfAverage(scores), scores)
    assert lines[len(records) :] == list(records.values()), "the last line is the sign of a whole evaluation"
    of_average = [line | {"domain": str(line["domain"]).removeprefix("ema:")} for line in lines[: len(records)]]
    assert of_average == list(records.values())
    assert [line["domain"] for line in lines] == line_names(scores.domains, scores.sources, averaged=True)
    scores.save(tmp_path / "evals" / "s.npz")
    assert DocumentScores.load(tmp_path / "evals" / "s.npz").by_domain() == scores.by_domain()
    older = {name: values for name, values in np.load(tmp_path / "evals" / "s.npz").items() if "context" not in name}
    np.savez(tmp_path / "older.npz", **older)
    assert DocumentScores.load(tmp_path / "older.npz").records(7) == scores.records(7)


def test_an_evaluation_changes_neither_weights_nor_random_state(
    suite: Path, engine: Engine, topology: Topology
) -> None:
    before = [parameter.clone() for parameter in engine.model.parameters()]
    state = torch.get_rng_state()
    evaluate(engine.score, loaded(suite), topology, 2)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, engine.model.parameters(), strict=True))
