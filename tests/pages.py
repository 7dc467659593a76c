"""What tests need of the pages in docs/: their code blocks, and whether a page shows what was printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).parents[1] / "docs"
ELLIPSIS = "…"  # stands for whatever a page leaves out of a line


class Block(NamedTuple):
    """A fenced code block of a page."""

    language: str
    line: int  # of its first line in the page, counted from 1
    text: str


def blocks(page: str) -> list[Block]:
    """Reads the code blocks of a page in docs/, in their order."""
    text = (DOCS / page).read_text()
    return [
        Block(match[1], text.count("\n", 0, match.start(2)) + 1, match[2])
        for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def unprinted(shown: str, printed: str) -> list[str]:
    """Finds the lines of an excerpt that were not printed, whatever the numbers and the width of the white space.

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
