"""Every example of docs/loader-api.md runs, in order, and prints what the page shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards import DataConfig
from tests.pages import blocks, unprinted
from tests.shards.corpora import ROOT

pytestmark = pytest.mark.distributed


def test_the_examples_of_the_loader_page_run_and_print_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shards").symlink_to(ROOT / "shards")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "loader_api"}
    printed, ran = "", 0
    for block in blocks("loader-api.md"):
        if block.language == "python":
            # Empty lines before the code, so that a traceback names the line of the page
            exec(compile("\n" * (block.line - 1) + block.text, "docs/loader-api.md", "exec"), names)
            printed, ran = capsys.readouterr().out, ran + 1
            # Only the first loader starts a worker: they change no batch, and each takes half a second to start.
            config = names["config"]
            assert isinstance(config, DataConfig)
            names["config"] = config.model_copy(update={"num_workers": 0})
        elif block.language == "text":
            assert not unprinted(block.text, printed), f"docs/loader-api.md, line {block.line}; printed: {printed}"
    assert ran == 10
