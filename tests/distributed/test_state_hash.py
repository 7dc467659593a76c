"""The hash of a run's state is that of its whole weights, average and moments, however they lie on the ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint.store import CheckpointConfig, CheckpointStore
from pretrain.checkpoint.weights import CheckpointWeights
from pretrain.checkpoint.zero_files import read_partitions, whole
from pretrain.config import load_config
from pretrain.model.weights import weight_specs
from pretrain.run.run_folder import RunFolder
from tests.distributed.ranks import run_ranks, run_starts
from tests.pretrain.checkpoint.test_state_hash import reference
from tests.tiny_run import write_config

STEPS = 3


def hashes_of_files(run: RunFolder) -> list[str]:
    """Hash whole weights and moments, which are read from a checkpoint's files, with numpy."""
    checkpoint = CheckpointStore(run.checkpoints, CheckpointConfig()).open(STEPS)
    config = load_config(run.config, begun=True)
    specs = weight_specs(config.model)
    weights = CheckpointWeights(checkpoint, specs)
    tp_ranks, _ = read_partitions(checkpoint.folder / "engine")
    sums = [0, 0]
    for name, spec in specs.items():
        sums[0] += reference(weights.read(name).numpy(), name)
        is_under_muon = config.optim.name == "muon" and name.startswith("blocks.") and len(spec.shape) == 2
        for key in ("exp_avg", "ema") if is_under_muon else ("exp_avg", "exp_avg_sq", "ema"):
            slices = [whole(ranks, name, key) for ranks in tp_ranks]
            moments = slices[0] if spec.shard_dim is None else torch.cat(slices, spec.shard_dim)
            sums[1] += reference(moments.float().numpy(), f"{name}/{key}")
    return [f"{total % 2**64:016x}" for total in sums]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("precision", "tp_size", "zero_stage", "optimizer", "moments"),
    [("fp32", 2, 1, "muon", "fp32"), ("bf16", 1, 1, "adamw", "bf16"), ("bf16", 1, 3, "muon", "bf16")],
)
def test_every_layout_has_the_hash_of_the_whole_weights(
    precision: str, tp_size: int, zero_stage: int, optimizer: str, moments: str, tmp_path: Path
) -> None:
    parallel = {"tp_size": tp_size, "zero_stage": zero_stage}
    config = write_config(
        tmp_path,
        "run",
        model={"qk_norm": True, "tie_embeddings": False},
        train={"ema": {"decay": 0.9}},
        optim={"name": optimizer, "moments": moments},
        precision=precision,
        parallel=parallel,
    )
    codes, output = run_starts(config, [(2, [f"train.steps={STEPS}"], "")])
    assert codes == [[0, 0]], output
    run = RunFolder(tmp_path / "run")
    recorded = run.metrics.last()
    assert recorded is not None
    wanted = hashes_of_files(run)
    assert [recorded["weight_hash"], recorded["optimizer_hash"]] == wanted
    for ranks, other in ((1, 1), (2, 1), (2, 2)):
        scratch = tmp_path / f"{ranks}-{other}"
        scratch.mkdir()
        said = run_ranks(ranks, "tests.distributed.state_hash", str(run.root), str(STEPS), str(other), str(scratch))
        found = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
        assert found == dict.fromkeys(found, wanted)
