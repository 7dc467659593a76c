"""A run may begin with the weights of another, and with the state of its optimizer, whatever the two layouts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from pretrain.exchange.folder import open_exported
from shards import ConfigError
from tests.distributed.ranks import run_ranks, run_starts
from tests.tiny_run import write_config

pytestmark = pytest.mark.distributed

ROWS = 8


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train four steps, all of the same rows, so that another run can continue with what would have been the next."""
    folder = tmp_path_factory.mktemp("parent")
    texts = "".join(json.dumps({"text": f"{i} times " * 60}) + "\n" for i in range(ROWS))
    (folder / "rows.jsonl").write_text(texts)
    run(folder, "parent", folder, "train.steps=4", "checkpoint.every=2")
    return folder / "parent"


@pytest.fixture(scope="module")
def without_optimizer(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Train on for two steps from the weights of the parent's second alone; return the losses."""
    folder = tmp_path_factory.mktemp("plain")
    run(folder, "plain", parent.parent, f"init_from={parent}@2")
    return losses(folder / "plain")


def run(folder: Path, name: str, of: Path, *overrides: str, ranks: int = 1, code: int = 0) -> str:
    """Start a run in a folder on the rows of another one; return its output."""
    data = {
        "packing": "truncate",
        "index_dir": str(of / "index"),
        "sources": [{"name": "rows", "paths": [str(of / "rows.jsonl")]}],
    }
    path = write_config(folder, name, data=data, train={"steps": 2, "global_batch_size": ROWS, "micro_batch_size": 2})
    found, output = run_starts(path, [(ranks, list(overrides), "")])
    assert found == [[code] * ranks], output
    return output


def losses(root: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (root / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, ["precision=bf16"]),
        (2, ["parallel.tp_size=2"]),
        (2, ["parallel.zero_stage=3", "run.seed=9"]),
        (1, ["optim.learning_rate_groups={'*.w2.weight': 1.0001}"]),
    ],
)
def test_a_run_goes_on_with_the_optimizer_of_another(
    parent: Path, tmp_path: Path, ranks: int, layout: list[str]
) -> None:
    run(tmp_path, "child", parent.parent, f"init_from={parent}@2", "init_optimizer=true", *layout, ranks=ranks)
    tolerance = 1e-3 if "precision=bf16" in layout else 1e-5
    assert losses(tmp_path / "child") == pytest.approx(losses(parent)[2:], rel=tolerance)


def test_a_run_begins_with_the_weights_of_the_newest_checkpoint_and_remembers_which(
    parent: Path, without_optimizer: list[float], tmp_path: Path
) -> None:
    shutil.copytree(parent, tmp_path / "parent")
    begin = f"init_from={tmp_path / 'parent'}"
    run(tmp_path, "child", parent.parent, begin, "train.steps=1", "checkpoint.every=1")
    assert without_optimizer[0] == pytest.approx(losses(parent)[2], rel=1e-5)
    assert losses(tmp_path / "child")[0] < losses(parent)[3]
    assert f"init_from: {tmp_path / 'parent@4'}" in (tmp_path / "child" / "config.yaml").read_text()
    shutil.rmtree(tmp_path / "parent")
    run(tmp_path, "child", parent.parent, begin, "train.steps=2")
    assert len(losses(tmp_path / "child")) == 2


def test_the_state_of_an_optimizer_makes_a_difference(parent: Path, without_optimizer: list[float]) -> None:
    assert without_optimizer[1] != pytest.approx(losses(parent)[3], rel=2e-4)


def test_a_grown_model_goes_on_where_the_smaller_one_was(parent: Path, tmp_path: Path) -> None:
    sizes = ["model.dim=48", "model.n_heads=6", "model.n_layers=3", "model.ffn_dim=96"]
    large = [*sizes, f"model.norm_eps={1e-5 * 32 / 48}", "model.tie_embeddings=true"]
    grow = ["grow", "--run", str(parent), "--step", "2", "--config", str(parent / "config.yaml")]
    said = run_ranks(1, "pretrain", *grow, "--to", str(tmp_path / "grown"), *large)
    before, after = re.findall(r"\d+\.\d{6}", said)
    assert before == after
    run(tmp_path, "child", parent.parent, f"init_from={tmp_path / 'grown'}", "train.steps=1", *large)
    assert losses(tmp_path / "child") == pytest.approx(losses(parent)[2:3], rel=1e-5)


def test_a_run_is_no_model_for_commands_that_take_an_exported_one(parent: Path) -> None:
    for path in (parent, parent.with_name("parent@2")):
        with pytest.raises(ConfigError, match="that is a run; name it with --run"):
            open_exported(path)


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (["init_from={parent}@3"], 2, "has no complete checkpoint of step 3; it has [2, 4]"),
        (["init_from={parent}", "model.ffn_dim=96"], 2, "model.ffn_dim=64, but model.ffn_dim=96"),
        (["init_from={parent}", "init_optimizer=true", "optim.name=muon"], 2, "says optim.name=adamw"),
        (["init_optimizer=true"], 2, "init_optimizer: needs the run in init_from"),
    ],
)
def test_what_does_not_fit_is_refused(
    parent: Path, tmp_path: Path, overrides: list[str], code: int, message: str
) -> None:
    output = run(tmp_path, "child", parent.parent, *(o.format(parent=parent) for o in overrides), code=code)
    assert message in output
