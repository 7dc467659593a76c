"""Needles have the lengths and places that are asked for, and the figures of a plain model that sees one text each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pretrain.evaluation.eval_set import EvaluationConfig, load_parts
from pretrain.evaluation.needles import NeedlesConfig, NeedleSet, load_needles
from pretrain.evaluation.scores import Totals
from pretrain.evaluation.scoring import evaluate
from pretrain.model.loss import Scores
from pretrain.topology import Topology
from shards import ConfigError, Tokenizer
from shards.suites.needles import Haystacks, needle_of
from tests.distributed.evaluation import NEEDLES, SEQ_LEN, SHAPE, TOKENIZER, engine_of
from tests.reference_model import piece_logits

LENGTHS = (49, 50, 63, 128, 700)
DEPTHS = (0.0, 0.3, 1.0)


def loaded(config: NeedlesConfig = NEEDLES, own: tuple[int, int] = (0, 1), seq_len: int = SEQ_LEN) -> list[NeedleSet]:
    return load_needles(config, Tokenizer(TOKENIZER), seq_len, "fp32", *own)


def test_a_text_has_its_length_and_its_needle_where_it_belongs() -> None:
    tokenizer = Tokenizer(TOKENIZER)
    haystacks = Haystacks(tokenizer)
    for length in LENGTHS:
        for depth in DEPTHS:
            text = haystacks.text(length, depth, "some", length)
            ids = np.concatenate((text.context, text.answer))
            assert (len(ids), ids[0]) == (length, tokenizer.bos_id)
            spelled = tokenizer.decode(ids)
            needle = needle_of("some", length)
            assert spelled.count(str(needle.number)) == 2
            assert spelled.endswith(needle.question + needle.answer)
            before, _, after = spelled.removesuffix(needle.question + needle.answer).partition(needle.statement)
            sentence = 60  # characters of the longest one, and more
            assert abs(len(before) - depth * len(before + after)) <= sentence
            again = haystacks.text(length, depth, "some", length)
            assert np.array_equal(again.context, text.context)
    other = haystacks.text(128, 0.3, "other", 128)
    assert not np.array_equal(other.context, haystacks.text(128, 0.3, "some", 128).context)


def test_a_length_without_room_for_the_question_is_refused() -> None:
    with pytest.raises(ConfigError, match="is 4[0-9] tokens of the tokenizer .*, so none of 40 tokens can be made"):
        loaded(NeedlesConfig(lengths=(40, 80)))
    with pytest.raises(ConfigError, match="lengths: .* must rise"):
        NeedlesConfig.parse({"lengths": [80, 60]}, "evaluation.needles")
    config = {"tasks": [{"name": "needles_60", "requests": "x"}], "needles": {"lengths": [60]}}
    with pytest.raises(ConfigError, match="needles_60 is the name of figures of needles"):
        EvaluationConfig.parse(config, "evaluation")


def test_needles_have_the_figures_of_a_plain_model(topology: Topology) -> None:
    engine, tokenizer = engine_of(topology, zero_stage=1), Tokenizer(TOKENIZER)
    weights = {name: weight.detach() for name, weight in engine.model.named_parameters()}
    config = NeedlesConfig(lengths=(60, 128), depths=3, count=2, seed=5)
    parts = load_parts(None, EvaluationConfig(needles=config), tokenizer, SEQ_LEN, "fp32", 0, 1)
    assert [part.label.partition("@")[0] for part in parts] == [
        f"needles_{length}.d3.n2.seed5.seq{length}.fp32" for length in (60, 128)
    ]
    for part, length in zip(parts, (60, 128), strict=True):
        shapes: set[tuple[int, ...]] = set()

        def score(tokens: torch.Tensor, *others: Any, shapes: set[tuple[int, ...]] = shapes) -> Scores:
            shapes.add(tuple(tokens.shape))
            return engine.score(tokens, *others)

        (line,) = evaluate(score, part, topology, 8).records(7)
        assert shapes == {(8 // part.times, part.seq_len)}, "no more tokens at once where rows are longer"
        nll, right = [], []
        for depth in ("0", "0.5", "1"):
            for number in range(2):
                text = Haystacks(tokenizer).text(length, float(depth), "needles", 5, depth, number)
                ids = torch.from_numpy(np.concatenate((text.context, text.answer)).astype(np.int64))
                logits = piece_logits(weights, SHAPE, ids[:-1])[-len(text.answer) :]
                answer = ids[-len(text.answer) :]
                nll.append(-logits.log_softmax(-1).gather(1, answer[:, None]).double().mean().item())
                right.append(bool((logits.argmax(-1) == answer).all()))
        assert (line["domain"], line["length"], line["instances"]) == (f"needles_{length}", length, 6)
        assert line["nll_per_token"] == pytest.approx(np.mean(nll), rel=1e-5)
        by_depth = line["by_depth"]
        assert isinstance(by_depth, dict)
        assert [one["nll_per_token"] for one in by_depth.values()] == [
            pytest.approx(np.mean(pair), rel=1e-5) for pair in np.reshape(nll, (3, 2))
        ]
        assert [one["accuracy"] for one in by_depth.values()] == np.reshape(right, (3, 2)).mean(axis=1).tolist()
        assert line["accuracy"] == np.mean(right)


def test_a_text_is_found_only_if_every_token_of_the_answer_is_the_most_likely() -> None:
    (part, _) = loaded()
    totals = np.zeros((6, 3))
    totals[:, 1] = part.targets
    totals[:, 2] = part.targets - [0, 1, 0, 0, 1, 2]
    (line,) = part.scores_of(Totals(totals, np.zeros((0, 2, 2)))).records(0)
    assert line["accuracy"] == line["acc_greedy"] == 0.5
    assert [one["accuracy"] for one in line["by_depth"].values()] == [0.5, 1.0, 0.0]  # type: ignore[attr-defined]


def test_rows_are_as_long_as_texts_need() -> None:
    short, long = loaded(NeedlesConfig(lengths=(60, 128), count=4), seq_len=64)
    assert (short.seq_len, short.times, long.seq_len, long.times) == (64, 1, 128, 2)
    own = loaded(NeedlesConfig(lengths=(60, 128), count=4), (1, 2), seq_len=64)[1]
    assert [row.tokens.tolist() for row in own.rows] == [row.tokens.tolist() for row in long.rows[1::2]]
    assert own.label == loaded(NeedlesConfig(lengths=(60, 128), count=4), seq_len=99)[1].label, "of the texts alone"
