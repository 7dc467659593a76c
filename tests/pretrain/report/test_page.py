"""The page about runs shows what they recorded, stands by itself, and works in a real browser if there is one."""

from __future__ import annotations

import base64
import itertools
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pretrain.commands import dispatch
from pretrain.commands.train import write_report
from pretrain.evaluation.compare import compare
from pretrain.evaluation.scores import ScoresOfAverage, record_scores
from pretrain.report import facts, side_by_side
from pretrain.report.chart import Chart, HeatMap
from pretrain.report.curves import POINTS, marks_of
from pretrain.report.differences import difference_tables
from pretrain.report.frame import frame
from pretrain.report.page import all_charts, page
from pretrain.report.png import draw_all
from tests.pretrain.report.made_run import SUITE, add_needles, add_tasks, make_run, read_run, scores_at

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def parsed(text: str) -> ET.Element:
    """Parse a page, which is written so that it is XML, too."""
    return ET.fromstring(text.removeprefix("<!DOCTYPE html>\n"))


def charts(text: str) -> dict[str, dict]:
    """Return the values behind each chart of a page, by its title."""
    return {
        str(figure.findtext("figcaption")): json.loads(str(figure.findtext("script")))
        for figure in parsed(text).iter("figure")
        if figure.find("script") is not None
    }


def test_the_page_of_a_run_shows_its_records(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "one")
    folder.root.joinpath("layers.jsonl").write_text(
        "".join(json.dumps({"step": s, "layers": {"update_ratio": [s, 2 * s]}}) + "\n" for s in (10, 20))
    )
    folder.root.joinpath("events.jsonl").write_text('{"step": 30, "time": "t", "kind": "spike", "text": "a <b> & c"}\n')
    folder.samples.append({"step": 40, "prompt": "Once", "text": " upon </pre><b>"})
    history = read_run(folder)
    text = page([history])
    drawn = charts(text)
    (loss,) = drawn["Training loss"]["series"]
    np.testing.assert_allclose(loss["y"], history.metrics["loss"], rtol=1e-5)
    assert loss["x"] == list(range(1, 41))
    assert [one["y"] for one in drawn["update ratio"]["series"]] == [[10, 20], [20, 40]]
    of_domains = {one["name"]: one["y"] for one in drawn["Held-out text by domain"]["series"]}
    assert set(of_domains) == {"books", "code", "wiki", "macro"}
    books = [history.evals[SUITE]["books"][step]["bits_per_byte"] for step in (0, 20, 40)]
    np.testing.assert_allclose(of_domains["books"], books, rtol=1e-5)
    parts = {one["name"]: one["y"][0] for one in drawn["Where a step's time goes"]["series"]}
    assert parts == pytest.approx(
        {"forward and backward": 0.3, "optimizer": 0.05, "waiting for data": 0.1, "everything else": 0.05}
    )
    spoken = "".join(parsed(text).itertext())
    for what in ("finished after 40 steps", "resumed after step 25", "a <b> & c", "Once upon </pre><b>", f"{40:016x}"):
        assert what in spoken, what
    assert "Missing or damaged" not in spoken


def test_tasks_have_charts_and_a_table_of_their_own(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, learning_rate=rate) for name, rate in (("a", 1e-3), ("b", 2e-3))]
    for folder in folders:
        add_tasks(folder, (0, 20), label="old@1")
        add_tasks(folder)
    histories = [read_run(folder) for folder in folders]
    drawn = charts(page(histories[:1]))
    found = {one["name"]: (one["x"], one["y"]) for one in drawn["Tasks: accuracy"]["series"]}
    assert found == {"choice": ([0, 20, 40], [0.25, 0.5, 0.75]), "words": ([0, 20, 40], [0.25] * 3)}
    assert {one["name"] for one in drawn["Held-out text by domain"]["series"]} == {"books", "code", "wiki", "macro"}
    table = facts.task_table(histories[0])
    assert table is not None
    assert [row[:4] for row in table.rows] == [("choice", "acc_raw", 0.25, 0.75), ("words", "acc_greedy", 0.25, 0.25)]
    assert [row[-2:] for row in table.rows] == [(4, 3), (4, 0)]
    assert "Not shown are the evaluations labelled choice.old@1, words.old@1." in table.note
    beside = charts(page(histories))
    assert [one["y"] for one in beside["Task choice"]["series"]] == [[0.25, 0.5, 0.75]] * 2
    assert facts.task_table(read_run(make_run(tmp_path / "without"))) is None


def test_what_becomes_of_long_texts_is_drawn(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name) for name in ("a", "b")]
    for folder in folders:
        for step in (0, 40):
            add_needles(folder, step)
            line = {"step": step, "suite": SUITE, "domain": "micro", "nll_per_token": 3.0, "perplexity": 20.0}
            losses = {"1-16": 4.0 - step / 40, "17-32": 3.5 - step / 40}
            folder.evals.append(line | {"by_context": {name: {"nll_per_token": x} for name, x in losses.items()}})
    histories = [read_run(folder) for folder in folders]
    drawn = {chart.name: chart for chart in all_charts(histories[:1])}
    context, heat = drawn["by_context"], drawn["needles"]
    assert isinstance(context, Chart)
    found = {one.label: (one.x.tolist(), one.y.tolist()) for one in context.series}
    assert found == {"step 0": ([16, 32], [4.0, 3.5]), "step 40": ([16, 32], [3.0, 2.5])}
    assert isinstance(heat, HeatMap)
    assert (heat.x_names, heat.y_names) == (("64", "1,024"), ("1", "0")), "depth 0 is at the top"
    np.testing.assert_allclose(heat.values, [[1.0, 0.0], [0.5, 0.5]])
    probability = drawn["needles_probability"]
    assert isinstance(probability, HeatMap)
    np.testing.assert_allclose(probability.values, np.exp(-np.full((2, 2), 0.2)))
    shown, _ = [figure for figure in parsed(page(histories[:1])).iter("figure") if figure.get("class") == "heat"]
    cells = [text.text for text in shown.iter("text") if re.fullmatch(r"\d\.\d\d", str(text.text))]
    assert cells == ["1.00", "0.00", "0.50", "0.50"]
    beside = {chart.name: chart.title for chart in all_charts(histories)}
    assert (beside["needles_0"], beside["needles_1"]) == ("Needles found, a", "Needles found, b")
    assert "runs_by_context" in beside


def test_a_page_shows_the_average_of_the_weights_beside_them(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "one")
    record_scores(folder, 60, ScoresOfAverage(scores_at(60, 1e-3, 1)), scores_at(60, 1e-3, 0))
    history = read_run(folder)
    drawn = {one["name"]: one["y"] for one in charts(page([history]))["Held-out text by domain"]["series"]}
    assert set(drawn) == {"books", "code", "wiki", "macro", "ema:macro"}
    np.testing.assert_allclose(drawn["ema:macro"], history.evals[SUITE]["ema:macro"][60]["bits_per_byte"], rtol=1e-5)
    assert len(drawn["macro"]) == 4


def test_a_page_stands_by_itself(tmp_path: Path) -> None:
    histories = [read_run(make_run(tmp_path / name)) for name in ("a", "b<i>&")]
    for text in (page(histories), page(histories[:1])):
        for element in parsed(text).iter():
            for name in ("src", "href"):
                assert element.get(name, "data:,") == "data:,"
        assert "http" not in text
        assert "url(" not in text


def test_a_long_run_is_thinned_and_the_page_says_so(tmp_path: Path) -> None:
    history = read_run(make_run(tmp_path / "long", learning_rate=1e-5, steps=1000, evals=()))
    text = page([history])
    (loss,) = charts(text)["Training loss"]["series"]
    assert len(loss["x"]) == 250 <= POINTS
    recorded = history.metrics["loss"]
    np.testing.assert_allclose([min(loss["low"]), max(loss["high"])], [recorded.min(), recorded.max()], rtol=1e-5)
    assert "Each point is the mean of 4 steps; the band reaches from the least to the greatest." in text


def test_what_is_damaged_stands_on_the_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "odd")
    with folder.metrics.path.open("a") as file:
        file.write('{"step": 45, "loss": null, "nonfinite": true}\nnonsense\n')
    folder.config.unlink()
    history = read_run(folder)
    spoken = "".join(parsed(page([history])).itertext())
    for what in (
        "the config cannot be read",
        "no record of 4 steps (41 to 44)",
        "1 of its lines cannot be read",
        "stopped at step 45",
    ):
        assert what in spoken, what
    assert "1 steps have no finite value." in spoken
    assert [(mark.x, mark.kind) for mark in marks_of(history)] == [(25, "restart"), (45, "spike")]
    folder.root.joinpath("events.jsonl").write_text('{"step": 45, "kind": "nonfinite", "text": "told"}\n')
    history.refresh()
    assert [mark.text for mark in marks_of(history)][1:] == ["step 45, nonfinite: told"], "and not a second time"
    (tmp_path / "empty").mkdir()
    assert dispatch.run("report", [str(tmp_path / "empty")]) == 2


def test_tokens_are_compared_with_the_mix_of_each_stretch_of_steps(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "mix")
    config = folder.config.read_text()
    changes = "  weight_changes: [{step: 10, weights: {pile: 0.0}}]\n"
    stages = "stages: [{step: 30, data: {weights: {pile: 9.0}}}]\n"
    folder.config.write_text(config.replace("  seq_len: 64\n", f"  seq_len: 64\n{changes}") + stages)
    table = facts.source_table(read_run(folder))
    assert table is not None
    wished = {row[0]: row[3] for row in table.rows}
    # 10 steps at 1 to 3, then 20 without the pile, then 10 at 9 to 3
    pile = (10 * 1 / 4 + 20 * 0 + 10 * 9 / 12) / 40
    assert wished == pytest.approx({"pile": pile, "dolma": 1 - pile})
    assert {row[0]: row[2] for row in table.rows} == pytest.approx({"pile": 112 / 512, "dolma": 400 / 512})


def grid(folder: Path) -> list:
    """Make runs of three learning rates and two seeds."""
    return [
        read_run(make_run(folder / f"lr{rate}-{seed}", learning_rate=rate, seed=seed))
        for rate in (1e-4, 1e-3, 1e-2)
        for seed in (0, 1)
    ]


def test_runs_are_grouped_by_what_differs_and_repeated_by_seed(tmp_path: Path) -> None:
    histories = grid(tmp_path)
    assert set(side_by_side.settings_of(histories).differing) == {"run.seed", "optim.learning_rate"}
    drawn = charts(page(histories))
    loss = drawn["Training loss"]["series"]
    assert [one["name"] for one in loss] == ["learning_rate 0.0001", "learning_rate 0.001", "learning_rate 0.01"]
    both = np.stack([history.metrics["loss"] for history in histories[:2]])
    for name, values in (("y", both.mean(axis=0)), ("low", both.min(axis=0)), ("high", both.max(axis=0))):
        np.testing.assert_allclose(loss[0][name], values, rtol=1e-5)
    panel = drawn["By optim.learning_rate"]
    ends = [history.evals[SUITE]["macro"][40]["bits_per_byte"] for history in histories]
    assert panel["log"]
    assert panel["series"][0]["x"] == [1e-4, 1e-3, 1e-2]
    np.testing.assert_allclose(panel["series"][0]["y"], np.reshape(ends, (3, 2)).mean(axis=1), rtol=1e-5)


def test_more_runs_than_can_be_told_apart_are_averaged_by_each_key(tmp_path: Path) -> None:
    histories = []
    for rate, layers in itertools.product(np.geomspace(1e-4, 1e-2, 17), (2, 4)):
        folder = make_run(tmp_path / f"lr{rate}-{layers}", learning_rate=float(rate))
        folder.config.write_text(folder.config.read_text().replace("n_layers: 2", f"n_layers: {layers}"))
        histories.append(read_run(folder))
    drawn = charts(page(histories))
    assert "Training loss" not in drawn, "34 curves"
    losses = np.stack([history.metrics["loss"] for history in histories]).reshape(17, 2, -1)
    ends = np.array([history.evals[SUITE]["macro"][40]["bits_per_byte"] for history in histories]).reshape(17, 2)
    loss, held_out = (drawn[f"{title} by model.n_layers"]["series"] for title in ("Training loss", "Held-out text"))
    (panel,) = drawn["By model.n_layers"]["series"]
    in_reverse = charts(page(histories[::-1]))["Training loss by model.n_layers"]["series"]
    assert [one["name"] for one in in_reverse] == [one["name"] for one in loss] == ["n_layers 2", "n_layers 4"]
    for name, measure in (("y", np.mean), ("low", np.min), ("high", np.max)):
        np.testing.assert_allclose([one[name] for one in loss], measure(losses, axis=0), rtol=1e-5)
        np.testing.assert_allclose([one[name][-1] for one in held_out], measure(ends, axis=0), rtol=1e-5)
        np.testing.assert_allclose(panel[name], measure(ends, axis=0), rtol=1e-5)
    assert len(drawn["By optim.learning_rate"]["series"]) == 2, "few enough to be shown apart"
    (one_key,) = (chart for chart in all_charts(histories[::2]) if chart.title == "Training loss")
    assert "Only the first 16 of 17 are drawn." in one_key.note
    (unbalanced,) = (chart for chart in all_charts(histories[:-1]) if chart.title == "By model.n_layers")
    assert "of the 16 choices of the other keys that each value was tried with" in unbalanced.note


def test_a_mean_ends_where_the_first_of_its_runs_does(tmp_path: Path) -> None:
    whole = read_run(make_run(tmp_path / "whole"))
    cut = read_run(make_run(tmp_path / "cut", seed=1, steps=20, evals=(0, 20), length=40))
    drawn = charts(page([whole, cut]))
    (loss,), (held_out,) = drawn["Training loss"]["series"], drawn["Held-out text"]["series"]
    assert [value is None for value in loss["y"]] == [step > 20 for step in loss["x"]]
    assert [value is None for value in held_out["y"]] == [False, False, True]
    table = np.array([[1.0, np.inf, 3.0], [3.0, 1.0, np.nan]])
    np.testing.assert_array_equal(side_by_side._spread("", np.arange(3.0), table).y, [2, np.nan, np.nan])


def test_runs_that_were_ended_early_are_judged_at_the_last_common_step(tmp_path: Path) -> None:
    cut = read_run(make_run(tmp_path / "cut", learning_rate=1e-4, steps=20, evals=(0, 20), length=40))
    whole = read_run(make_run(tmp_path / "whole"))
    (panel,) = side_by_side.by_key([cut, whole])
    expected = [history.evals[SUITE]["macro"][20]["bits_per_byte"] for history in (cut, whole)]
    np.testing.assert_allclose(panel.series[0].y, expected, rtol=1e-12)
    assert "1 of the 2 runs did not finish, so all are shown at step 20" in panel.note
    early = read_run(make_run(tmp_path / "early", learning_rate=1e-4, steps=10, evals=(0,), length=40))
    (panel,) = side_by_side.by_key([early, whole])
    assert np.isnan(panel.series[0].y[0]), "step 0 says nothing of a setting"
    assert panel.series[0].y[1] == whole.evals[SUITE]["macro"][40]["bits_per_byte"]
    assert "1 of the 2 runs did not finish and are not shown" in panel.note
    assert charts(page([early, whole]))["By optim.learning_rate"]["series"][0]["y"][0] is None
    unscored = [read_run(make_run(tmp_path / f"u{n}", 1e-4 * n, steps=20 * n, evals=(), length=40)) for n in (1, 2)]
    (panel,) = side_by_side.by_key(unscored)
    assert panel.y_label == "training loss, last 5 %"
    assert "they ended at steps 20 to 40" in panel.note


def test_a_key_that_an_older_program_did_not_write_is_no_setting(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name) for name in ("old", "new", "more")]
    for folder in folders[1:]:
        folder.config.write_text(folder.config.read_text() + "later: {key: 5}\n")
    more = folders[2].config.read_text()
    folders[2].config.write_text(
        more.replace("  sources:\n", "  sources:\n  - {name: wiki, paths: [w], weight: 1.0}\n")
    )
    found = side_by_side.settings_of([read_run(folder) for folder in folders])
    assert found.unknown == {"later.key": 5}
    assert found.differing["data.sources.2.name"] == [None, None, "dolma"]
    assert "without a value for later.key (5)" in side_by_side.run_table([read_run(folder) for folder in folders]).note


def test_differences_are_those_of_the_comparison(tmp_path: Path) -> None:
    histories = [read_run(make_run(tmp_path / name, learning_rate=rate)) for name, rate in (("a", 1e-3), ("b", 2e-3))]
    histories.append(read_run(make_run(tmp_path / "unscored", evals=())))
    torn = make_run(tmp_path / "torn")
    path = torn.document_scores(40, SUITE)
    path.write_bytes(path.read_bytes()[:-100])
    histories.append(read_run(torn))
    averages, *rest = difference_tables(histories)
    assert rest == [], "domain by domain only for two runs"
    macro, micro = compare(scores_at(40, 1e-3, 0), scores_at(40, 2e-3, 0))[-2:]
    ((name, step, figure, found_macro, found_micro, _, documents),) = averages.rows
    assert (name, step, figure, documents) == ("b", 40, macro.b, 30)
    assert (found_macro, found_micro) == (macro, micro)
    assert "unscored: it has no evaluation" in averages.note
    assert f"torn: {path}: cannot be read as sums of documents" in averages.note
    assert len(difference_tables(histories[:2])[1].rows) == 5


def test_runs_scored_on_token_ids_alone_are_shown_in_nats(tmp_path: Path) -> None:
    histories = []
    for rate in (1e-4, 1e-3):
        folder = make_run(tmp_path / f"lr{rate}", learning_rate=rate)
        folder.evals.path.unlink()
        for step in (0, 20, 40):
            record_scores(folder, step, replace(scores_at(step, rate, 0), text_bytes=np.full(30, -1)))
        histories.append(read_run(folder))
    ends = [history.evals[SUITE]["macro"][40]["nll_per_token"] for history in histories]
    alone, together = page(histories[:1]), page(histories)
    assert dict(facts.headlines(histories[0]))["nats per token, held out, step 40"] == f"{ends[0]:.4f}"
    assert "Held-out text by domain" not in charts(alone), "which has no bits per byte"
    assert {one["name"] for one in charts(alone)["Perplexity by domain"]["series"]} == {
        "books",
        "code",
        "wiki",
        "macro",
    }
    for text in (alone, together):
        assert not re.search(r"\bnan\b", "".join(parsed(text).itertext()))
    drawn = charts(together)
    assert [one["y"][-1] for one in drawn["Held-out text"]["series"]] == pytest.approx(ends, rel=1e-5)
    assert drawn["By optim.learning_rate"]["series"][0]["y"] == pytest.approx(ends, rel=1e-5)
    (table, *_) = difference_tables(histories)
    assert table.head[2] == "nats per token, macro"
    assert table.rows[0][2] == pytest.approx(ends[1])
    frames = Console(width=100, record=True)
    frames.print(frame(histories[0], 100, 60, now=0))
    assert "nats per token" in (shown := frames.export_text())
    assert f"{ends[0]:.4f}" in shown


def test_a_report_that_fails_leaves_a_finished_run_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_run(tmp_path / "x")
    assert write_report(folder) == folder.root / "report.html"
    monkeypatch.setattr("pretrain.commands.train.write_page", lambda *arguments: 1 / 0)
    assert write_report(folder) is None
    assert "no report was written: ZeroDivisionError" in caplog.text


def test_charts_are_drawn_as_pictures_of_their_own_names(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = make_run(tmp_path / "one", steps=8, evals=(0, 8))
    add_needles(folder, 8)
    folder.root.joinpath("layers.jsonl").write_text('{"step": 1, "layers": {"rms": [1, 2, 3]}}\n')
    charts_of_page = all_charts([read_run(folder)])
    names = [chart.name for chart in charts_of_page]
    assert len(set(names)) == len(names)
    chosen = [
        chart for chart in charts_of_page if chart.name in ("step_parts", "layers_rms", "bits_per_byte", "needles")
    ]
    for path in draw_all(chosen, tmp_path / "png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "png").iterdir())) == 4


# Works the page as a reader would, and leaves what it finds in the document.
PROBE = """
const figure = document.querySelector('figure'), svg = figure.querySelector('svg'), box = svg.getBoundingClientRect();
svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + box.width * 0.9, clientY: box.top + 50}));
const table = document.querySelector('table.sortable'), column = table.tHead.rows[0].cells.length - 1;
const seen = () => [...table.tBodies[0].rows].map(row => Number(row.cells[column].dataset.value));
table.tHead.rows[0].cells[column].click(); const up = seen();
table.tHead.rows[0].cells[column].click(); const down = seen();
const found = {tip: figure.querySelector('.tip').textContent, up, down, wide: document.documentElement.scrollWidth,
  view: innerWidth, errors: window.errors};
document.body.insertAdjacentHTML('beforeend', '<output>' + btoa(JSON.stringify(found)) + '</output>');
"""


@pytest.mark.skipif(BROWSER is None, reason="there is no browser on this machine")
def test_a_browser_shows_values_sorts_and_reports_no_error(tmp_path: Path) -> None:
    histories = [
        read_run(make_run(tmp_path / name, learning_rate=rate, steps=steps))
        for name, rate, steps in (("a", 1e-3, 40), ("b", 2e-3, 44), ("c", 3e-3, 42))
    ]
    text = page(histories)
    catch = "<script>window.errors = []; onerror = message => window.errors.push(message);</script></head>"
    path = tmp_path / "page.html"
    path.write_text(text.replace("</head>", catch, 1).replace("</body>", f"<script>{PROBE}</script></body>", 1))
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900", "--dump-dom"]
    ran = subprocess.run(
        [*command, f"--user-data-dir={tmp_path}/profile", path.as_uri()], capture_output=True, text=True, timeout=240
    )
    outputs = re.findall(r"<output>([^']*?)</output>", ran.stdout)
    assert outputs, ran.stderr
    found = json.loads(base64.b64decode(outputs[-1]))
    assert found["errors"] == []
    assert "optim.learning_rate" in found["tip"]
    assert found["up"] == sorted(found["up"])
    assert found["down"] == found["up"][::-1]
    assert found["wide"] <= found["view"], "nothing but tables scrolls sideways on a phone"
