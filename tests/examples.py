"""How many random examples a test tries; the profiles are in conftest.py."""

from __future__ import annotations

from hypothesis import settings


def examples(thorough: int) -> int:
    """Return the number of examples to try in the current profile, of `thorough` in the thorough one."""
    return max(2, thorough * settings().max_examples // 100)
