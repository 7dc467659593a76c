"""Small corpora for the tests of shards: records of known text, in every compression."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import zstandard

from shards import DataConfig, Loader, Stage, Tokenizer, merge_states
from shards.preparation import prepare, prepared_filter
from shards.windows.recipe import Tools

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "shards/sample/tokenizer-4k.model"
SAMPLE = ROOT / "shards/sample/train"


def record(text: str, **others: object) -> bytes:
    """Return one record with its line feed."""
    return json.dumps({"text": text, **others}).encode() + b"\n"


def compress(raw: bytes, suffix: str, frames: int = 1) -> bytes:
    """Compress `raw` as a shard of this suffix, in frames or members of about equal raw size, cut anywhere."""
    cuts = [len(raw) * i // frames for i in range(frames + 1)]
    parts = [raw[a:b] for a, b in itertools.pairwise(cuts)]
    if suffix.endswith(".zst"):
        return b"".join(zstandard.ZstdCompressor(write_content_size=False).compress(part) for part in parts)
    if suffix.endswith(".gz"):
        return b"".join(gzip.compress(part) for part in parts)
    return raw


def write_shard(path: Path, raw: bytes, frames: int = 1) -> Path:
    """Write `raw`, compressed as the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(compress(raw, path.name, frames))
    return path


def words(seed: int, count: int) -> str:
    """Return a text of `count` words that differs for every seed."""
    return " ".join(f"w{(seed * 7919 + i * i) % 9973}" for i in range(count))


def tools_of(data: DataConfig) -> Tools:
    """Open the tools with which a loader of this config makes windows."""
    return Tools(Tokenizer.of(data), (prepared_filter(data, None),))


def config(sources: Sequence[dict[str, object]], **changes: object) -> DataConfig:
    """Make a config for tests: short rows, small windows, windows made in this process."""
    values: dict[str, object] = {
        "seq_len": 32,
        "tokenizer": TOKENIZER,
        "num_workers": 0,
        "window_bytes": 2048,
        "sources": sources,
    }
    return DataConfig.model_validate(values | changes)


def write_three_sources(folder: Path, suffixes: Sequence[str], max_frames: int) -> Path:
    """Write the shards of three sources, a to c, into a folder: many short, few long, one with blank lines.

    Args:
        suffixes: of the shards, in turn.
        max_frames: frames of a shard, from 1 up to this in turn.
    """
    for shard in range(6):
        lines = [record(f"s{shard} d{i} " + words(i, 5 + (i * i) % (400 if shard > 3 else 60))) for i in range(60)]
        lines[3:3] = [b"\n", b" \r\n"] if shard % 2 else []
        path = folder / f"{'abc'[shard // 2]}-{shard}{suffixes[shard % len(suffixes)]}"
        write_shard(path, b"".join(lines), frames=1 + shard % max_frames)
    return folder


def ranks_of(data: DataConfig, rows: int, seed: int, dp_size: int, stages: Sequence[Stage] = ()) -> list[Loader]:
    """Open the loaders of all ranks as a start does: the shards are examined once for all, not by each rank.

    Args:
        rows: rows of a global batch.
        stages: the stages after the first.
    """
    prepared, tokenizer = prepare(data, stages=stages), Tokenizer.of(data)
    return [Loader(data, rows, seed, rank, dp_size, prepared, stages, tokenizer) for rank in range(dp_size)]


def restarted_hashes(data: DataConfig) -> list[int]:
    """Return the hashes of 30 global batches of 8 rows, drawn by 2, 8, 1 and 4 ranks in turn."""
    state: dict[str, object] = {}
    found = []
    for dp_size, count in ((2, 7), (8, 6), (1, 9), (4, 8)):
        ranks = ranks_of(data, 8, 3, dp_size)
        for rank in ranks:
            if state:
                rank.load_state_dict(state)
        found += [sum(next(rank).row_hash for rank in ranks) % 2**64 for _ in range(count)]
        state = merge_states([rank.state_dict() for rank in ranks])
        for rank in ranks:
            rank.close()
    return found
