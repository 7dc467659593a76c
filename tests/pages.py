"""Tools for testing the pages in docs/: find their code blocks, compare an excerpt with what was printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).parents[1] / "docs"
ELLIPSIS = "…"  # stands for whatever a page omits from a line


class Block(NamedTuple):
    """A fenced code block of a page."""

    language: str
    line: int  # number of its first line in the page, counted from 1
    text: str


def blocks(page: str) -> list[Block]:
    """Return the code blocks of a page in docs/, in order."""
    text = (DOCS / page).read_text()
    return [
        Block(match[1], text.count("\n", 0, match.start(2)) + 1, match[2])
        for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def unprinted(shown: str, printed: str) -> list[str]:
    """Find the lines of an excerpt that were not printed, ignoring numbers and the width of white space.

    A line may be a part of a printed one, and the ellipsis stands for any text.
    """
    plain = [_plain(line) for line in printed.splitlines()]
    return [
        line
        for line in shown.splitlines()
        if not any(re.search(".*".join(map(re.escape, _plain(line).split(ELLIPSIS))), candidate) for candidate in plain)
    ]


def _plain(line: str) -> str:
    numbers = re.sub(r"\d[\d.,:]*(e[-+]?\d+)?", "#", line)
    return " ".join(numbers.split())
