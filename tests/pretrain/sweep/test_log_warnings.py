"""A sweep tells what the logs of its runs warn of, each once."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from pretrain import log as process_log
from pretrain.sweep.log_warnings import LogWarnings


def test_each_warning_is_told_once_whatever_its_numbers_and_none_of_earlier_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = {name: tmp_path / f"{name}.log" for name in "ab"}
    logs["a"].write_text("2026-12-01 10:00:00,000 rank 0 WARNING pretrain.start: of an earlier start\n")
    warnings = LogWarnings(logs)
    assert list(warnings.new()) == []
    before = logging.getLogger().handlers[:]
    try:
        process_log.set_up(rank=0)
        logging.getLogger("pretrain.start").warning("slow: %d times", 3)
        logging.getLogger("pretrain.start").info("nothing to worry about")
        logging.getLogger("another").warning("not ours")
        logging.getLogger("shards.loader").warning("few rows")
    finally:
        logging.getLogger().handlers[:] = before
    said = capsys.readouterr().err
    assert said.count("\n") == 4
    for name in "ab":
        with logs[name].open("a") as file:
            file.write(said.replace("3 times", "4 times") if name == "b" else said)
    assert list(warnings.new()) == [("a", "slow: 3 times"), ("a", "few rows")]
    with logs["b"].open("a") as file:
        file.write("2026-12-01 10:00:00,000 rank 1 WARNING pretrain.start: half of a ")
        file.flush()
        assert list(warnings.new()) == []
        file.write("line\n")
    assert list(warnings.new()) == [("b", "half of a line")]
    for name in ("run-a", "run-b"):
        logs[name] = tmp_path / f"{name}.log"
    warnings = LogWarnings(logs)
    for name in ("run-a", "run-b"):
        logs[name].write_text(f"2026-12-01 10:00:00,000 rank 0 WARNING pretrain.start: see runs/{name}/log\n")
    assert list(warnings.new()) == [("run-a", "see runs/run-a/log")]
