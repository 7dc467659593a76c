"""Checks before a submission are right on both sides of their limits, and their advice works."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from pretrain.checkpoint.duration import SaveTime
from pretrain.checkpoint.store import CheckpointConfig
from pretrain.cluster import preflight
from pretrain.cluster.preflight import Finding
from pretrain.devices import device_of_slurm
from pretrain.model.recurrent import RecurrentConfig
from pretrain.model.size import Workload, memory_per_rank
from pretrain.model.transformer import LlamaConfig
from pretrain.parallel_config import ParallelConfig
from pretrain.run.lease import Lease
from shards import DataConfig, prepare

LLAMA_7B = LlamaConfig(dim=4096, n_layers=32, n_heads=32, vocab_size=32_000)
SAMPLE = Path(__file__).parents[3] / "shards" / "sample"


def workload(parallel: ParallelConfig, rows: int = 4) -> Workload:
    return Workload(LLAMA_7B, parallel, 16, rows, seq_len=2048, bytes_per_weight=2)


def memory(gpu_bytes: float | None, parallel: ParallelConfig, rows: int = 4) -> Finding:
    """Return the finding about the memory of a rank that has 8 rows a step."""
    (finding,) = preflight.memory_findings(workload(parallel, rows), 8 // rows, gpu_bytes)
    return finding


def applied(change: str, parallel: ParallelConfig, rows: int) -> tuple[ParallelConfig, int]:
    """Apply the overrides of a proposal."""
    values = dict(word.split("=") for word in change.split())
    rows = int(values.pop("train.micro_batch_size", rows))
    keys = {key.removeprefix("parallel."): json.loads(v) if v.isdigit() else v for key, v in values.items()}
    return ParallelConfig.model_validate(parallel.model_dump() | keys), rows


def test_memory_is_compared_with_the_gpu() -> None:
    parallel = ParallelConfig()
    need = memory_per_rank(workload(parallel)).total
    levels = [memory(gpu, parallel).level for gpu in (None, 2 * need, int(1.05 * need), need - 1)]
    assert levels == ["note", "ok", "warning", "error"]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_proposed_layout_fits_and_a_larger_micro_batch_would_not(compiled: bool) -> None:
    own = ParallelConfig(compile=compiled)
    said = memory(80 * 10**9, own, rows=8)
    assert said.level == "error"
    advice = said.text.partition("this would fit: ")[2].split(", or ")
    assert len(advice) > 1
    for change in advice:
        parallel, rows = applied(change, own, 8)
        assert memory(80 * 10**9, parallel, rows).level == "ok", change
        assert rows == 8 or memory(80 * 10**9, parallel, 2 * rows).level != "ok", change
        assert not list(parallel.problems())


def test_the_cheapest_way_to_fit_comes_first() -> None:
    tight = ParallelConfig(zero_stage=2)
    order = ["none", "selective", "full"]
    said = memory(48 * 10**9, tight, rows=8).text.partition("this would fit: ")[2].split(", or ")
    found = [applied(change, tight, 8)[0] for change in said]
    ranks = [(layout.zero_stage, order.index(layout.activation_checkpointing)) for layout in found]
    assert len(ranks) > 1
    assert ranks == sorted(ranks)


def test_a_gpu_more_than_half_free_is_told_a_larger_micro_batch() -> None:
    small, own = 1, ParallelConfig(activation_checkpointing="full")
    need = memory_per_rank(workload(own, small)).total
    said = memory(2.2 * need, own, small)
    assert said.level == "ok"
    change = said.text.partition("more than half is free, and ")[2].removesuffix(" would fit too")
    parallel, rows = applied(change, own, small)
    assert rows > small
    assert memory(2.2 * need, parallel, rows).level == "ok"
    assert "would fit" not in memory(1.9 * need, own, small).text
    roomy = memory(100 * need, ParallelConfig(), 8).text
    assert "would fit" not in roomy, "there is nothing cheaper, and all rows are in one micro-batch"


def test_speed_is_estimated_with_what_is_known() -> None:
    def speed(**known: object) -> Finding:
        hardware = preflight.hardware_of(["h100"])
        hardware = dataclasses.replace(hardware, **known)  # type: ignore[arg-type]
        (finding,) = preflight.speed_findings(workload(ParallelConfig()), 2, 1000, 2, 8, hardware)
        return finding

    assert "--gpu TYPE" in speed(device=None).text
    text = speed().text
    for words in ("estimated, not measured", "s a step on H100", "MFU", "for 1,000 steps", "bound by matrix products"):
        assert words in text
    assert "with 3,200 Gbit/s a node (as in the maker's servers; set --network GBIT)" in text
    assert "with 10 Gbit/s a node (as --network says)" in speed(network_bandwidth=1.25e9).text
    assert "bound by links of dp ranks" in speed(network_bandwidth=1.25e9).text
    assert "(assumed; set --network GBIT)" in speed(device=device_of_slurm("l40s")).text
    assert speed(device=device_of_slurm("v100")).text == "there is no estimate for V100, which has no bf16"


class Unmeasured(RecurrentConfig):
    """An architecture of which nobody has said what its blocks keep."""

    def block_costs(self, parallel: ParallelConfig, seq_len: int, bytes_per_weight: int) -> None:
        return None


@pytest.mark.parametrize(("kind", "unknown"), [(RecurrentConfig, ["speed"]), (Unmeasured, ["memory", "speed"])])
def test_what_is_not_known_of_an_architecture_is_said(kind: type[RecurrentConfig], unknown: list[str]) -> None:
    work = Workload(kind(dim=64, n_layers=2, vocab_size=512), ParallelConfig(), 2, 4, seq_len=64, bytes_per_weight=2)
    hardware = preflight.hardware_of(["h100"])
    said = [
        *preflight.memory_findings(work, 1, hardware.gpu_bytes),
        *preflight.speed_findings(work, 1, 100, 1, 2, hardware),
    ]
    assert [finding.about for finding in said] == ["memory", "speed"]
    none = [finding for finding in said if "there is no estimate for model.architecture=recurrent" in finding.text]
    assert [finding.about for finding in none] == unknown
    assert all(finding.level == "note" for finding in none)


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
