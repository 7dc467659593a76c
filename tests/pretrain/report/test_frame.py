"""`headrace watch` shows what a run's files hold, as they grow, without torch."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pretrain.commands import dispatch
from pretrain.report.braille import plot
from pretrain.report.frame import frame
from pretrain.run.history import History
from tests.pretrain.report.made_run import add_tasks, make_run


def shown(history: History, width: int = 100) -> str:
    """Return a frame as the terminal would show it."""
    history.refresh()
    console = Console(width=width, height=50, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    console.print(frame(history, width, 50, now=history.folder.metrics.path.stat().st_mtime + 7))
    return console.export_text()


def test_the_frame_follows_a_growing_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "x", steps=60, evals=(0, 20))
    folder.cut_back(30, "test")
    history = History(folder.root)
    text = shown(history)
    for what in ("x: stopped at step 30 of 60", "ETA 0:00:15", "1 restart,", "last step 7.0 s ago", "step 20", "macro"):
        assert what in text, text
    assert "30 steps trained again" in text
    folder.metrics.append({"step": 31, "loss": 1.25, "step_seconds": 0.5})
    folder.evals.append({"step": 31, "suite": next(iter(history.evals)), "domain": "macro", "bits_per_byte": 1.5})
    with folder.root.joinpath("events.jsonl").open("w") as file:
        file.write('{"step": 31, "kind": "spike", "text": "loss 1.25"}\n{torn')
    text = shown(history)
    for what in (
        "stopped at step 31",
        "loss 1.2500",
        "Held-out text, step 31",
        "1.5000",
        "spike: loss 1.25",
        "incomplete",
    ):
        assert what in text, text


def test_every_line_fits_the_terminal(tmp_path: Path) -> None:
    history = History(make_run(tmp_path / "x").root)
    for width in (40, 80, 200):
        assert max(map(len, shown(history, width).splitlines())) <= width


@given(
    values=st.lists(st.floats(-1e3, 1e3) | st.just(math.nan), min_size=1, max_size=150).filter(
        lambda values: any(map(math.isfinite, values))
    ),
    width=st.integers(20, 60),
    height=st.integers(3, 8),
)
def test_a_picture_shows_the_extremes(values: list[float], width: int, height: int) -> None:
    lines = plot(np.arange(1.0, len(values) + 1), np.array(values), width, height)
    assert len(lines) == height
    assert {len(line) for line in lines} == {width}
    finite = [value for value in values if math.isfinite(value)]
    if max(finite) - min(finite) > 1e-3:
        for line in (lines[0], lines[-2]):  # the highest and the lowest value have a dot
            assert any(0x2800 < ord(letter) <= 0x28FF for letter in line)


def test_a_spike_of_one_step_among_many_is_drawn() -> None:
    values = np.full(10_000, 2.0)
    values[5_000] = 9.0
    top = plot(np.arange(1.0, 10_001), values, 60, 6)[0]
    assert top.lstrip().startswith("9 ")
    assert sum(ord(letter) > 0x2800 for letter in top) == 1


def test_what_has_no_value_is_blank() -> None:
    values = np.array([math.nan] * 50 + [1.0, 2.0, 3.0] * 16 + [math.nan, math.nan])
    lines = plot(np.arange(1.0, 101), values, 61, 5)[:-1]
    drawn = [any(line[i] not in " \u2800" for line in lines) for i in range(11, 61)]
    assert not any(drawn[:24])
    assert all(drawn[26:48])


def test_watching_needs_no_torch(tmp_path: Path) -> None:
    root = make_run(tmp_path / "x", steps=5, evals=()).root
    code = (
        "import sys; from pretrain.commands import dispatch;"
        f" code = dispatch.run('watch', [{str(root)!r}, '--once']); sys.exit(code or 7 * ('torch' in sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "finished after 5 steps" in ran.stdout


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch.run("watch", [str(tmp_path), "--once"]) == 2
    assert "no run there" in capsys.readouterr().err
    assert dispatch.run("watch", [str(tmp_path), "--every", "0"]) == 2
    assert "--every 0: give seconds above 0" in capsys.readouterr().err


def test_the_frame_shows_tasks_and_how_they_have_changed(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "x")
    add_tasks(folder)
    lines = shown(History(folder.root)).splitlines()
    (choice,) = (line.split() for line in lines if line.split()[:1] == ["choice"])
    assert choice[1:3] == ["0.7500", "+0.2500"]
    assert any("Tasks, step 40" in line for line in lines)
    assert any("Held-out text, step 40" in line for line in lines)
