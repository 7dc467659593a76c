"""Checks before a submission are right on both sides of their limits, and their advice works."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pretrain.checkpoint.duration import SaveTime
from pretrain.checkpoint.store import CheckpointConfig
from pretrain.cluster import preflight
from pretrain.model.size import Workload, memory_per_rank
from pretrain.model.transformer import ModelConfig
from pretrain.run.lease import Lease
from pretrain.topology import ParallelConfig
from shards import DataConfig, prepare

LLAMA_7B = ModelConfig(dim=4096, n_layers=32, n_heads=32, vocab_size=32_000)
SAMPLE = Path(__file__).parents[3] / "shards" / "sample"


def workload(parallel: ParallelConfig, rows: int = 4) -> Workload:
    return Workload(LLAMA_7B, parallel, 16, rows, seq_len=2048, bytes_per_weight=2)


def memory(gpu_bytes: int | None, parallel: ParallelConfig, rows: int = 4):
    (finding,) = preflight.memory_findings(workload(parallel, rows), 2, gpu_bytes)
    return finding


def test_memory_is_compared_with_the_gpu() -> None:
    parallel = ParallelConfig()
    need = memory_per_rank(workload(parallel)).total
    levels = [memory(gpu, parallel).level for gpu in (None, 2 * need, int(1.05 * need), need - 1)]
    assert levels == ["note", "ok", "warning", "error"]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_layout_said_to_fit_does_fit(compiled: bool) -> None:
    said = memory(80 * 10**9, ParallelConfig(compile=compiled)).text
    advice = said.partition("this would fit: ")[2].split(", or ")
    assert len(advice) > 1
    for change in advice:
        values = {key: json.loads(value) for key, _, value in (word.partition("=") for word in change.split())}
        rows = values.pop("train.micro_batch_size", 4)
        keys = {key.removeprefix("parallel."): value for key, value in values.items()}
        parallel = ParallelConfig.model_validate({"compile": compiled, **keys})
        assert memory(80 * 10**9, parallel, rows).level == "ok", change
        assert not list(parallel.problems())


@pytest.mark.parametrize(
    ("types", "size"), [({"h100"}, 80), ({"h200", "a100"}, 40), ({"h100", "unheard"}, None), (set(), None)]
)
def test_the_smallest_known_gpu_counts(types: set[str], size: int | None) -> None:
    assert preflight.hardware_of(types).gpu_bytes == (size and size * 10**9)


def test_the_disk_must_have_room_for_the_checkpoints_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 100 * 10**9

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    folders = [tmp_path / "runs" / name for name in ("a", "b")]

    def level(each: int, keep_every: int | None = None, runs: int = 1) -> str:
        config = CheckpointConfig(every=100, keep=2, keep_every=keep_every, reserve_bytes=0)
        (finding,) = preflight.disk_findings(config, 1000, each * 10**9, folders[:runs])
        return finding.level

    assert level(33) == "ok"  # two kept, one being written
    assert level(34) == "error"
    assert level(17, runs=2) == "error"
    assert level(8, keep_every=100) == "warning"  # ten more by the end
    checkpoint = folders[0] / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    with (checkpoint / "file").open("wb") as file:
        file.truncate(2 * 10**9)
    assert level(34) == "ok", "existing ones are removed as new ones come"


@pytest.mark.parametrize(
    ("seconds", "grace", "limit", "levels"),
    [
        (100, 310, 3600, {"ok"}),
        (100, 300, 3600, {"warning"}),  # too little time after a periodic save
        (100, 120, 3600, {"warning"}),
        (100, 90, 3600, {"error"}),
        (100, 3600, 3600, {"error"}),
        (1000, 2100, 3600, {"warning"}),
    ],
)
def test_the_grace_period_is_compared_with_a_save(seconds: float, grace: int, limit: int, levels: set[str]) -> None:
    save = SaveTime(seconds, measured=True)
    assert {f.level for f in preflight.grace_findings(save, grace, limit, "OFF", 0)} == levels
    preempted = [f.text for f in preflight.grace_findings(save, grace, limit, "REQUEUE", 30)]
    assert "preempts (REQUEUE) within 30 s" in preempted[-1]
    own = preflight.grace_for(save)
    assert {f.level for f in preflight.grace_findings(save, own, 10 * own, "REQUEUE", own)} == {"ok"}


def test_shards_without_an_index_are_counted_and_missing_ones_named(tmp_path: Path) -> None:
    sources = [
        {"name": "there", "paths": [str(SAMPLE / "train" / "pile-*")], "weight": 1.0},
        {"name": "gone", "paths": [str(tmp_path / "nowhere-*.jsonl.zst")], "weight": 1.0},
    ]
    settings = {"tokenizer": SAMPLE / "tokenizer-4k.model", "seq_len": 64, "index_dir": tmp_path}
    there, gone = preflight.data_findings(DataConfig.model_validate({**settings, "sources": sources}))
    assert (there.level, gone.level) == ("note", "error")
    assert "there: 2 shards" in there.text
    assert "2 without an index" in there.text
    assert "nowhere-*.jsonl.zst" in gone.text
    config = DataConfig.model_validate({**settings, "sources": sources[:1]})
    prepare(config)
    (there,) = preflight.data_findings(config)
    assert there.level == "ok"
    (refused,) = preflight.data_findings(
        DataConfig.model_validate(
            {**settings, "index_dir": tmp_path / "new", "sources": sources[:1], "max_index_at_start": 9}
        )
    )
    assert refused.level == "error"
    assert "launch/index.py" in refused.text


def test_a_run_folder_in_use_is_reported(tmp_path: Path) -> None:
    assert not list(preflight.lease_findings(tmp_path))
    with Lease(tmp_path / "lease", job_id="4711"):
        (finding,) = preflight.lease_findings(tmp_path)
    assert re.search("job 4711.*--after 4711", finding.text)
