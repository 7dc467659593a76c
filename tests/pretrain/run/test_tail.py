"""A tail yields what the file holds, in whatever pieces it grows, and starts over when the file was cut back."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from pretrain.run.step_log import StepLog
from pretrain.run.tail import Tail


@given(
    cuts=st.lists(st.integers(0, 200), max_size=6),
    odd=st.sets(st.integers(0, 7), max_size=3),
)
def test_however_the_file_grows_each_record_comes_once(tmp_path_factory, cuts: list[int], odd: set[int]) -> None:
    lines = ["{broken" if i in odd else json.dumps({"step": i, "loss": i / 3}) for i in range(8)]
    content = "".join(f"{line}\n" for line in lines).encode()
    path = tmp_path_factory.mktemp("tail") / "metrics.jsonl"
    tail, found = Tail(path), []
    for end in [*sorted(cuts), len(content)]:
        path.write_bytes(content[:end])
        found += [record["step"] for record in tail.read()]
        assert tail.is_torn == (0 < end < len(content) and content[end - 1 : end] != b"\n")
    assert found == [i for i in range(8) if i not in odd]
    assert [damage.line for damage in tail.damaged] == [i + 1 for i in sorted(odd)]
    assert tail.cuts == 0


def test_after_a_cut_everything_comes_again(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        log.append({"step": step, "start": 1})
    tail = Tail(log.path)
    assert [record["step"] for record in tail.read()] == [1, 2, 3, 4, 5]
    log.cut_back(2, tmp_path / "aside.jsonl", "test")
    for step in range(3, 9):  # longer than before, so that the size alone tells nothing
        log.append({"step": step, "start": 2})
    assert [(record["step"], record["start"]) for record in tail.read()][1:4] == [(2, 1), (3, 2), (4, 2)]
    assert tail.cuts == 1
    log.path.unlink()
    assert list(tail.read()) == []
    assert tail.cuts == 2


def test_a_line_without_a_step_and_one_that_is_no_text_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "evals.jsonl"
    path.write_bytes(b'{"loss": 1}\n{"step": "2"}\n\xff\xfe\n[1]\n{"step": 3}\n')
    tail = Tail(path)
    assert [record["step"] for record in tail.read()] == [3]
    assert [damage.line for damage in tail.damaged] == [1, 2, 3, 4]
