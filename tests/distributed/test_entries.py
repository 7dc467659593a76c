"""Entries change how soon a segment opens, but not what a training reads: losses and batches do not depend on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.ranks import run_starts
from tests.tiny_run import write_config

SOURCES = [
    {"name": "pile", "paths": ["shards/sample/train/pile-*"]},
    {"name": "dolma", "paths": ["shards/sample/train/dolma-*.json.gz"]},
]
NEAR = """
from shards.index import splice_points
splice_points.MIN_GAP_BYTES, splice_points.HISTORIES_PER_GAP, splice_points.TRIAL_BYTES = 1 << 18, 0, 1 << 17
splice_points.SHARE = splice_points.SMALL_SHARE = 1.0
"""
NONE = "from shards.index import splice_points\nsplice_points.MIN_GAP_BYTES = 1 << 60\n"


@pytest.mark.distributed
def test_training_reads_the_same_data_with_and_without_entries(tmp_path: Path) -> None:
    data = {"seq_len": 128, "prefetch_bytes": 1 << 24, "num_workers": 1, "sources": SOURCES}
    config = write_config(tmp_path, "unnamed", data=data, train={"steps": 8}, checkpoint={"every": 4})
    starts = []
    for name, code in (("with", NEAR), ("without", NONE)):
        overrides = [f"run.name={name}", f"data.index_dir={tmp_path / name}-indexes"]
        # The second start resumes from cursors. Segments lie all over the shards, so both starts use entries.
        starts += [(1, [*overrides, "train.steps=4"], code), (1, overrides, code)]
    codes, output = run_starts(config, starts)
    assert codes == [[0]] * 4, output
    found = {
        name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("with", "without")
    }
    steps = [(line["loss"], line["grad_norm"], line["batch_hash"]) for line in found["with"]]
    assert len(steps) == 8
    assert steps == [(line["loss"], line["grad_norm"], line["batch_hash"]) for line in found["without"]]
    assert not any(line["replayed_entries"] for line in found["with"])
    assert len(list(tmp_path.glob("with-indexes/*.windows"))) >= 3
    assert not list(tmp_path.glob("without-indexes/*.windows"))
