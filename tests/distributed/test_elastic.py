"""A run continues with other numbers of ranks and other ZeRO stages as if nothing had changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.ranks import run_starts
from tests.tiny_run import write_config

STEPS = 2  # in each start
# (tp_size, sp_size, dp_size, ZeRO stage) of each start; the files of the last two in bf16 are laid out alike
LAYOUTS = {
    "bf16": [(1, 1, 4, 1), (1, 1, 1, 1), (2, 2, 1, 2), (2, 1, 1, 1), (1, 2, 1, 2), (1, 1, 2, 2)],
    "fp32": [(2, 1, 1, 1), (1, 2, 1, 3), (2, 1, 1, 3), (1, 1, 1, 2)],
}
# Groups of weights by their learning rates and optimizers, where a standard model under AdamW has two
MODEL = {"fp32": {"parametrization": "mup", "base": {"dim": 16, "n_layers": 1, "head_dim": 4}}, "bf16": {}}
OPTIM = {"fp32": {"name": "muon"}, "bf16": {}}
TOLERANCE = {"bf16": {"loss": 1e-2, "grad_norm": 0.1}, "fp32": {"loss": 1e-5, "grad_norm": 1e-3}}  # relative


def train(folder: Path, precision: str, starts: list[tuple[int, list[str]]]) -> list[dict]:
    """Start a run several times, each with its number of ranks and overrides; return its metrics."""
    folder.mkdir()
    model = {"qk_norm": True} | MODEL[precision]
    config = write_config(folder, "elastic", model=model, optim=OPTIM[precision], precision=precision)
    codes, output = run_starts(config, [(world_size, overrides, "") for world_size, overrides in starts])
    assert codes == [[0] * world_size for world_size, _ in starts], output
    return [json.loads(line) for line in (folder / "elastic" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.distributed
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_every_change_of_layout_keeps_batches_and_losses(precision: str, tmp_path: Path) -> None:
    layouts = LAYOUTS[precision]
    starts = [
        (
            tp * sp * dp,
            [
                f"train.steps={STEPS * (i + 1)}",
                f"parallel.tp_size={tp}",
                f"parallel.sp_size={sp}",
                f"parallel.zero_stage={stage}",
            ],
        )
        for i, (tp, sp, dp, stage) in enumerate(layouts)
    ]
    changed = train(tmp_path / "changed", precision, starts)
    straight = train(tmp_path / "straight", precision, [(1, [f"train.steps={STEPS * len(layouts)}"])])
    assert [m["step"] for m in changed] == list(range(1, STEPS * len(layouts) + 1))
    assert [m["batch_hash"] for m in changed] == [m["batch_hash"] for m in straight]
    for key, tolerance in TOLERANCE[precision].items():
        wanted = pytest.approx([m[key] for m in straight], rel=tolerance)
        assert [m[key] for m in changed] == wanted, key
    left = {path.name for path in (tmp_path / "changed" / "elastic" / "checkpoints").iterdir()}
    newest = STEPS * len(layouts)
    assert left == {f"step_{step:08d}" for step in (newest, newest - STEPS)}  # a conversion is removed at the next save
