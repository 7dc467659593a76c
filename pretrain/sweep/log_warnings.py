"""Find what the logs of a sweep's runs warn of. local -> log_warnings -> the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

_WARNING = re.compile(rb"^\S+ \S+ rank \d+ WARNING (?:pretrain|shards)[\w.]*: (.+)$", re.MULTILINE)  # of pretrain.log
_NUMBER = re.compile(r"\d[\d.,]*")


class LogWarnings:
    """The warnings in the logs of several runs, each once: however many runs give it, with whatever numbers.

    Args:
        logs: of the runs, by name. They are read from where they end now, since they may hold earlier starts.
    """

    def __init__(self, logs: Mapping[str, Path]) -> None:
        self._logs = logs
        self._read = {name: _size(log) for name, log in logs.items()}  # bytes
        self._told: set[str] = set()

    def new(self) -> Iterator[tuple[str, str]]:
        """Yield the name of a run and a warning of it that no run has given before."""
        for name, log in self._logs.items():
            if _size(log) == self._read[name]:
                continue
            with log.open("rb") as file:
                file.seek(self._read[name])
                content = file.read()
            content = content[: content.rfind(b"\n") + 1]  # the rest of a line may follow
            self._read[name] += len(content)
            for found in _WARNING.findall(content):
                text = found.decode(errors="replace")
                if (kind := _NUMBER.sub("", text.replace(name, ""))) not in self._told:
                    self._told.add(kind)
                    yield name, text


def _size(log: Path) -> int:
    try:
        return log.stat().st_size
    except OSError:  # the run has not begun
        return 0
