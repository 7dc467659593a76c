"""Thinned windows: zeros may be replaced by anything without changing what follows, and all the rest is needed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from shards.formats import Chunk, Start
from shards.index import splice_points
from shards.index.thinning import Follower, thinned
from tests.shards.index.spliced import TEXT, compressed, indexed, shard

pytestmark = pytest.mark.usefixtures("near")

Call = tuple[str, Start, Sequence[Chunk]]


def decodes(compression: str, start: Start, window: bytes, chunks: Sequence[Chunk]) -> bool:
    """Return whether the chunks' raw bytes come out with this window before them."""
    return Follower(compression, start._replace(history=window)).holds(chunks)


@pytest.mark.parametrize(
    "make",
    [
        lambda: shard("gzip"),
        lambda: compressed(TEXT, 3, window_log=19),
        lambda: compressed(TEXT, 9, window_log=18),
        lambda: compressed(TEXT, 3, window_log=20, enable_ldm=True),
    ],
    ids=["gzip", "512 KiB", "256 KiB", "1 MiB, long mode"],
)
def test_thinning_drops_exactly_what_is_not_referred_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], bytes]
) -> None:
    calls: list[Call] = []
    monkeypatch.setattr(splice_points, "thinned", lambda *call: calls.append(call) or thinned(*call))
    indexed(tmp_path, make())
    held = [call for call in calls if decodes(call[0], call[1], bytes(call[1].history), call[2])]
    assert len(held) >= 2
    draw = random.Random(0)
    for compression, start, chunks in held[:4]:
        window = np.frombuffer(start.history, np.uint8)
        kept = np.frombuffer(thinned(compression, start, chunks), np.uint8)
        assert ((kept == window) | (kept == 0)).all()
        noise = np.frombuffer(draw.randbytes(len(window)), np.uint8)
        assert decodes(compression, start, np.where(kept > 0, kept, noise).tobytes(), chunks)
        grain_bytes = -(-len(window) // 65_535)
        bounds = range(0, len(window), grain_bytes)
        grains = [at for at in bounds if kept[at : at + grain_bytes].any()]
        assert 0 < len(grains) < len(bounds)
        for at in draw.sample(grains, min(25, len(grains))):
            other = window.copy()
            other[at : at + grain_bytes] ^= 1
            assert not decodes(compression, start, other.tobytes(), chunks)
