"""Comparisons of two evaluations: paired by document, with intervals that a known spread falls into."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pretrain.checkpoint.store import CheckpointConfig, CheckpointStore
from pretrain.commands import dispatch
from pretrain.evaluation.checkpoints import new_checkpoints
from pretrain.evaluation.compare import chosen_suites, compare, draw, only_in_one
from pretrain.evaluation.scores import DocumentScores
from pretrain.run.run_folder import RunFolder
from shards import ConfigError


def scores(
    nll: np.ndarray, text_bytes: np.ndarray, keys: np.ndarray, domains: list[str] | None = None
) -> DocumentScores:
    names = domains or ["a"] * len(nll)
    known = tuple(sorted(set(names)))
    return DocumentScores(
        suite="s",
        domains=known,
        sources=known,
        domain=np.array([known.index(name) for name in names], np.int32),
        key=keys.astype(np.uint64),
        nll=nll.astype(np.float64),
        tokens=np.full(len(nll), 10),
        correct=np.zeros(len(nll), np.int64),
        text_bytes=text_bytes,
    )


def test_documents_are_paired_by_text_in_any_order() -> None:
    generator = np.random.default_rng(1)
    nll, text_bytes, keys = generator.uniform(50, 90, 40), generator.integers(20, 99, 40), np.arange(40) % 37
    order = generator.permutation(40)
    a = scores(nll, text_bytes, keys)
    # Equal texts keep their order, as in any reading of one suite.
    order = order[np.argsort(keys[order] * 100 + order, kind="stable")]
    b = scores(nll[order] + 1.0 * text_bytes[order] * np.log(2), text_bytes[order], keys[order])
    domain, macro, micro = compare(a, b, draws=200)
    assert domain.documents == 40
    for item in (domain, macro, micro):
        assert item.difference == pytest.approx(1.0)
        assert (item.low, item.high) == pytest.approx((1.0, 1.0)), "each document differs by the same amount"


def test_the_interval_is_as_wide_as_repeated_experiments_spread() -> None:
    generator = np.random.default_rng(2)
    count, true, widths, hits = 60, -0.05, [], 0
    for _ in range(200):
        text_bytes = generator.integers(50, 200, count)
        a = generator.uniform(0.5, 1.5, count) * text_bytes
        b = a + (true + generator.normal(0, 0.3, count)) * text_bytes * np.log(2)
        found = compare(scores(a, text_bytes, np.arange(count)), scores(b, text_bytes, np.arange(count)), 400)[-1]
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= true <= found.high
        widths.append(found.high - found.low)
    assert 180 <= hits <= 198, "95 % intervals"
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 0.3 / np.sqrt(count), rel=0.15)


def test_only_common_documents_count_and_the_others_are_named(tmp_path: Path) -> None:
    sizes = np.full(3, 10)
    a = scores(np.array([10.0, 20, 30]), sizes, np.arange(3), ["x", "x", "y"])
    b = scores(np.array([11.0, 99, 30]), sizes, np.array([0, 7, 2]), ["x", "x", "z"])
    found = compare(a, b)
    assert [(item.name, item.documents) for item in found] == [("x", 1), ("macro", 1), ("micro", 1)]
    assert found[0].low is None, "a single document has no spread"
    assert found[0].difference == pytest.approx(1 / 10 / np.log(2))
    assert only_in_one(a, b) == (["y"], ["z"])
    with pytest.raises(ConfigError, match="no document in common"):
        compare(a, scores(np.ones(1), sizes[:1], np.array([9]), ["x"]))
    pytest.importorskip("matplotlib")
    draw(found, ("one", "two"), tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def scored(root: Path, *labels: str, step: int = 3) -> RunFolder:
    folder = RunFolder(root)
    generator = np.random.default_rng(step)
    for label in labels:
        found = scores(generator.uniform(50, 90, 9), np.full(9, 40), np.arange(9))
        replace(found, suite=label).save(folder.document_scores(step, label))
    return folder


def test_each_folder_is_compared_under_its_own_label(tmp_path: Path) -> None:
    plain, other = "s.seq32.bf16@aaaaaaaa", "s.seq32.bf16@bbbbbbbb"
    a, b = scored(tmp_path / "a", plain, "t.seq32.bf16@cccccccc", "old"), scored(tmp_path / "b", other)
    assert chosen_suites([a, a], "s") == [plain, plain]
    assert chosen_suites([a, b], "s") == [plain, other]
    assert chosen_suites([a, b], "s.seq32") == [plain, other]
    assert chosen_suites([a, a], "old") == ["old", "old"]
    assert chosen_suites([b, b], None) == [other, other]
    for folders, wanted in (([a, a], None), ([a, b], "old"), ([a, b], None), ([a, b], "s.seq3"), ([a, b], plain)):
        with pytest.raises(ConfigError, match="name one suite"):
            chosen_suites(folders, wanted)


def test_without_matplotlib_the_table_is_printed_with_a_note(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    labels = ("s.seq32.bf16@aaaaaaaa", "s.seq32.bf16@bbbbbbbb")
    folders = [scored(tmp_path / label[-1], label, step=step).root for step, label in enumerate(labels)]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("pretrain.log.set_up", lambda *arguments: None)  # caplog captures the log instead
    monkeypatch.chdir(tmp_path)
    words = ["--compare", *map(str, folders)]
    assert dispatch.run("evaluate", words) == 0
    assert "micro" in capsys.readouterr().out
    assert "only the table: a picture needs matplotlib" in caplog.text
    assert f"scored as {labels[0]}" in caplog.text
    assert dispatch.run("evaluate", [*words, "--plot", "c.png"]) == 2
    assert "micro" not in capsys.readouterr().out, "refused before anything is computed"


def test_checkpoints_are_yielded_as_they_appear_until_the_last(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", CheckpointConfig())

    def save(step: int) -> None:
        store.prepare(step)
        store.complete(step, [], 0.0)

    save(2)
    save(4)
    coming = [6, 8]
    found = new_checkpoints(store, {2}, lambda: 8, lambda: False, 1.0, lambda _: save(coming.pop(0)))
    assert list(found) == [4, None, 6, None, 8]
    slept: list[float] = []
    abandoned = new_checkpoints(store, {2, 4, 6, 8}, lambda: 9, lambda: True, 600.0, slept.append)
    assert set(abandoned) == {None}
    assert sum(slept) == 3000.0, "an hour after the last sign of activity"
