"""An event reaches the log, events.jsonl and the user's command, whatever fails on the way."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path

import pytest

from pretrain.config import load_config
from pretrain.run.events import KINDS, Event, Events, Hook, check_command
from pretrain.run.run_folder import RunFolder
from shards import ConfigError
from tests.tiny_run import write_config

TEXT = 'it\'s full: $HOME `id` "%s" ; échec\nsecond line'


def hook_to(path: Path, code: str = "") -> str:
    """Return a command that appends its standard input to a file; the path has a blank, as a user's may."""
    script = path.with_suffix(".py")
    script.write_text(f"import sys; {code}\nopen(sys.argv[1], 'a').write(sys.stdin.read())")
    return f"{sys.executable} '{script}' '{path}'"


def test_an_event_is_told_everywhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told, alerts = tmp_path / "what was told", []
    log = RunFolder(tmp_path).events
    with Hook(hook_to(told), "a") as hook:
        events = Events(log, alerts.append, hook)
        events.tell(Event(3, "disk", TEXT, {"free": 1.5}))
        events.tell(Event(4, "finished", "done", {}))
    recorded = list(log.read())
    assert [(r["step"], r["kind"], r["text"], r["figures"]) for r in recorded] == [
        (3, "disk", TEXT, {"free": 1.5}), (4, "finished", "done", {}),
    ]  # fmt: skip
    assert [json.loads(line) for line in told.read_text().splitlines()] == [{"run": "a", **r} for r in recorded]
    by_level = {r.levelno: r.getMessage() for r in caplog.records if r.levelno > logging.INFO}
    assert by_level == {logging.WARNING: TEXT}
    assert [event.kind for event in alerts] == ["disk", "finished"]


def test_a_command_neither_delays_nor_stops(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.run.events._LAST_HOOKS_SECONDS", 0.1)
    log = RunFolder(tmp_path).events
    for command in (
        f"{sys.executable} -c 'print(3); exit(7)'",
        str(tmp_path),
        f"{sys.executable} -c 'import time; time.sleep(9)'",
    ):
        with Hook(command, "a") as hook:
            begun = time.monotonic()
            Events(log, lambda event: None, hook).tell(Event(1, "disk", "full", {}))
            assert time.monotonic() - begun < 5
            for _ in range(500 if "sleep" not in command else 0):
                time.sleep(0.01)
                if "on_event: " in caplog.text:
                    break
        said = {"print": "exited with 7: 3", "sleep": "has not ended"}
        expected = next((text for part, text in said.items() if part in command), "failed: ")
        assert expected in caplog.text
        caplog.clear()
    assert len(list(log.read())) == 3


def test_an_event_that_cannot_be_written_is_still_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = RunFolder(tmp_path / "missing").events
    Events(log, lambda event: None, Hook(None, "a")).tell(Event(1, "disk", "the disk is full", {}))
    assert "lacks an event" in caplog.text
    assert "the disk is full" in caplog.text


def test_a_command_that_cannot_be_run_is_refused(tmp_path: Path) -> None:
    for command, problem in (("mail 'x", "closing quotation"), (" ", "names no program")):
        path = write_config(tmp_path, "a", metrics={"on_event": command})
        with pytest.raises(ConfigError, match=problem):
            load_config(path)
    # Only where the run starts, since its folder is read on other machines too
    path = write_config(tmp_path, "a", metrics={"on_event": "no-such-program -x"})
    with pytest.raises(ConfigError, match="no program 'no-such-program'"):
        check_command(load_config(path).metrics.on_event)
    check_command(f"{sys.executable} -x")


def test_the_page_names_every_kind() -> None:
    page = (Path(__file__).parents[3] / "docs" / "health.md").read_text()
    assert [kind for kind in KINDS if f"`{kind}`" not in page] == []


def test_events_are_cut_back_with_the_other_records(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    events = Events(folder.events, lambda event: None, Hook(None, "a"))
    for step in (2, 5):
        events.tell(Event(step, "disk", f"at {step}", {}))
    folder.cut_back(4, "resumed")
    assert [record["step"] for record in folder.events.read()] == [2]
    assert "resumed after step 4" in (folder.superseded / "events.jsonl").read_text()
