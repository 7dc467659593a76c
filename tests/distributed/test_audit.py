"""An audit passes an honest run, on its own layout and on others, and names the place of a single flipped bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint.store import CheckpointConfig, CheckpointFile, CheckpointStore, write_complete
from pretrain.checkpoint.zero_files import read_partitions
from shards.storage.content_hash import hash_file
from tests.distributed.ranks import run_starts, start_ranks
from tests.tiny_run import write_config

STEPS, SAVED_AFTER = 8, 4
FLIPPED_BEFORE = 6  # the step before which the memory of a run is damaged

# Flips the lowest bit of one weight in memory, of the optimizer's copy and of the model's, as a faulty cell would.
FAULT = f"""
import torch
from pretrain.engine import Engine
train_step = Engine.train_step

def faulty(engine, tokens, segment_ids, n_targets, step, *others):
    if step + 1 == {FLIPPED_BEFORE}:
        flat = engine.deepspeed.optimizer.optimizer.param_groups[0]["params"][0]
        weight = engine.model.blocks[0].feed_forward.w1.weight
        start = weight._hp_mapping.get_hp_fragment_address().start
        for values in (flat.data[start:], weight.data.view(-1)):
            values.view(torch.int32)[7] ^= 1 << 12
    return train_step(engine, tokens, segment_ids, n_targets, step, *others)

Engine.train_step = faulty
"""


def train(folder: Path, code: str = "", **sections: Any) -> Path:
    """Train a tiny run on one rank in two starts, with a hash after every step; return its folder."""
    folder.mkdir(exist_ok=True)
    train = {"steps": STEPS, "weight_hash_every": 1}
    checkpoint = {"every": SAVED_AFTER, "keep": 9}
    config = write_config(folder, "run", train=train, checkpoint=checkpoint, **sections)
    codes, output = run_starts(config, [(1, [f"train.steps={SAVED_AFTER}"], code), (1, [], code)])
    assert codes == [[0], [0]], output
    return folder / "run"


def audit(run: Path, *arguments: str, ranks: int = 1, from_step: int = SAVED_AFTER) -> tuple[int, str]:
    """Audit on some ranks; return their common exit code and rank 0's output."""
    before = content(run)
    wanted = ["--run", str(run), "--from-step", str(from_step), "--steps", str(STEPS - from_step), *arguments]
    processes = start_ranks(ranks, "pretrain", "audit", *wanted)
    codes = {process.wait() for process in processes}
    assert len(codes) == 1, [process.output for process in processes]
    assert content(run) == before, "an audit changes nothing in the run's folder"
    return codes.pop(), processes[0].output


def content(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def words(output: str) -> str:
    """Return what was printed without the breaks of lines."""
    return " ".join(output.split())


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("honest"))


@pytest.mark.distributed
def test_an_honest_run_agrees_bit_for_bit_on_its_own_layout(honest: Path, tmp_path: Path) -> None:
    path = tmp_path / "certificate.json"
    code, output = audit(honest, "--certificate", str(path))
    assert code == 0, output
    assert f"The run agrees bit for bit in steps {SAVED_AFTER + 1} to {STEPS}" in words(output)
    assert f"The checkpoint of step {SAVED_AFTER} holds the weights and moments that the run had then" in words(output)
    certificate = json.loads(path.read_text())
    assert (certificate["agrees"], certificate["compared"], certificate["obstacles"]) == (True, "bit for bit", [])
    metrics = [json.loads(line) for line in (honest / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "loss", "grad_norm", "batch_hash", "weight_hash", "optimizer_hash")
    for figures in ("recorded", "found"):
        steps = [[step[key] for key in keys] for step in certificate[figures][1:]]
        assert steps == [[step[key] for key in keys] for step in metrics[SAVED_AFTER:]]


@pytest.mark.distributed
def test_a_run_of_several_starts_agrees_from_its_first_weights_on(honest: Path) -> None:
    code, output = audit(honest, from_step=0)
    assert code == 0, output
    assert f"The run agrees bit for bit in steps 1 to {STEPS}" in words(output)
    assert "It was trained from its first weights on." in words(output)
    starts = [json.loads(line) for line in (honest / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, SAVED_AFTER]
    assert len({start["config_hash"] for start in starts}) == 2, "their train.steps differ"
    assert {path.stem for path in (honest / "configs").iterdir()} == {start["config_hash"] for start in starts}


@pytest.mark.distributed
@pytest.mark.parametrize("overrides", [["parallel.zero_stage=3"], ["parallel.tp_size=2"], ["parallel.sp_size=2"]])
def test_an_honest_run_agrees_on_two_ranks(honest: Path, tmp_path: Path, overrides: list[str]) -> None:
    path = tmp_path / "certificate.json"
    code, output = audit(honest, "--certificate", str(path), f"--scratch={tmp_path}", *overrides, ranks=2)
    assert code == 0, output
    certificate = json.loads(path.read_text())
    assert certificate["compared"] == "within tolerances"
    assert certificate["obstacles"][0].startswith("layout: the run had tp 1 x dp 1, ZeRO-1, the audit tp ")
    keys = ("batch_hash", "weight_hash", "optimizer_hash")  # of the checkpoint, before any step
    before = [[certificate[figures][0][key] for key in keys] for figures in ("recorded", "found")]
    assert before[0] == before[1]
    assert None not in before[0]
    assert [step["batch_hash"] for step in certificate["recorded"]] == [
        step["batch_hash"] for step in certificate["found"]
    ]
    assert list(tmp_path.iterdir()) == [path], "the conversion is removed"


def flip(run: Path, key: str) -> None:
    """Flip one bit of one element of a checkpoint and sign it again, as someone who alters it would.

    Args:
        key: of the state: fp32, exp_avg or exp_avg_sq.
    """
    checkpoint = CheckpointStore(run / "checkpoints", CheckpointConfig()).open(SAVED_AFTER)
    folder = checkpoint.folder
    fragment = read_partitions(folder / "engine")[0][0][0]["blocks.1.attention.wo.weight"]
    neighbours = fragment.states[key].narrow(0, fragment.start + 5, 4).numpy().tobytes()
    path = next((folder / "engine").glob("*optim_states.pt"))
    content = bytearray(path.read_bytes())
    assert content.count(neighbours) == 1
    content[content.find(neighbours)] ^= 1
    path.write_bytes(content)
    files = [CheckpointFile(file.name, file.size, hash_file(folder / file.name)) for file in checkpoint.files]
    write_complete(folder, files, checkpoint.seconds)


@pytest.mark.distributed
@pytest.mark.parametrize(("key", "what", "ranks"), [("fp32", "weights", 1), ("exp_avg_sq", "moments", 2)])
def test_a_bit_that_was_flipped_in_a_checkpoint_is_found(
    honest: Path, tmp_path: Path, key: str, what: str, ranks: int
) -> None:
    run = tmp_path / "run"
    shutil.copytree(honest, run)
    flip(run, key)
    code, output = audit(run, ranks=ranks)
    assert code == 1, output
    said = f"The checkpoint of step {SAVED_AFTER} does not hold the {what} that the run hashed after that step"
    assert said in words(output)


@pytest.mark.distributed
def test_a_bit_that_flipped_in_the_memory_of_a_run_is_found_and_its_step_named(tmp_path: Path) -> None:
    run = train(tmp_path, FAULT)
    code, output = audit(run)
    assert code == 1, output
    assert f"of step {FLIPPED_BEFORE} differs" in words(output)
    assert f"so were the weights after step {FLIPPED_BEFORE - 1}, bit for bit" in words(output)


@pytest.mark.distributed
def test_an_interval_that_cannot_be_audited_is_refused(honest: Path, tmp_path: Path) -> None:
    elsewhere = "lies in the run's folder, in which an audit changes nothing"
    for from_step, arguments, message in (
        (3, [], f"has no complete checkpoint of step 3; it has [{SAVED_AFTER}, {STEPS}]"),
        (SAVED_AFTER, ["optim.grad_clip=0"], "optim.grad_clip=0: an audit trains what the run trained"),
        (SAVED_AFTER, [f"--certificate={honest}/a.json"], elsewhere),
        (SAVED_AFTER, ["data.sources.0.paths=[shards/sample/train/dolma-*]"], "its content changed since the run"),
    ):
        code, output = audit(honest, *arguments, from_step=from_step)
        assert code == 2, output
        assert message in words(output)


@pytest.mark.distributed
def test_dropout_is_audited_on_the_ranks_that_drew_it(tmp_path: Path) -> None:
    run = train(tmp_path, model={"dropout": 0.1})
    code, output = audit(run)
    assert code == 0, output
    code, output = audit(run, ranks=2)
    assert code == 2, output
    assert "model.dropout=0.1: masks are drawn for each data-parallel rank" in words(output)
    assert "on 1 ranks with parallel.tp_size=1, train.micro_batch_size=2" in words(output)
    code, output = audit(run, "parallel.sp_size=2", ranks=2)
    assert code == 2, output
    assert "on 1 ranks with parallel.tp_size=1, parallel.sp_size=1, train.micro_batch_size=2" in words(output)
    (run / "starts.jsonl").unlink()  # as if an older version had trained it
    code, output = audit(run)
    assert code == 2, output
    assert "the run did not record how many there were" in words(output)
