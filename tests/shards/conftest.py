"""Fixtures that several tests of shards share."""

from __future__ import annotations

import pytest

from shards.index import splice_points


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow entries every 256 KiB, whatever they cost."""
    for name, value in {
        "MIN_GAP_BYTES": 1 << 18,
        "SPACING_BYTES": 1 << 18,
        "HISTORIES_PER_GAP": 0,
        "TRIAL_BYTES": 1 << 17,
        "GATHERED_BYTES": 1 << 16,
        "SHARE": 1e9,
        "SMALL_SHARE": 1e9,
    }.items():
        monkeypatch.setattr(splice_points, name, value)
