"""Runs of several stages, forks, steps passed over and going back: whole trainings, on real ranks."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain.commands import dispatch
from pretrain.config import load_config
from pretrain.exchange.folder import open_model
from pretrain.feed import chain_hash
from pretrain.run.run_folder import RunFolder
from shards import Loader, merge_states
from tests.distributed.ranks import Rank, run_ranks, start_ranks
from tests.pretrain.run.wandb_server import wandb_server
from tests.tiny_run import write_config

STEPS = 24
STAGES = [
    {
        "step": 8,
        "model": {"rope_theta": 20.0},
        "data": {"sources": [{"name": "dolma", "paths": ["shards/sample/train/dolma-*"], "weight": 2.0}], "lanes": 4},
    },
    {
        "step": 14,
        "model": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}},
        "data": {"seq_len": 128, "weights": {"pile": 0.5}},
        "train": {"global_batch_size": 4},
    },
    {"step": 18, "optim": {"schedule": "linear", "floor": 0.0}},
]


def write_staged(folder: Path, name: str, **changes: object) -> Path:
    return write_config(
        folder,
        name,
        train={"steps": STEPS, "micro_batch_size": 2, "weight_hash_every": 1},
        checkpoint={"every": 4, "keep": 20},
        stages=STAGES,
        model={"qk_norm": True},  # or attention would be even at first, and positions without effect
        **changes,
    )


def metrics(folder: Path) -> list[dict[str, Any]]:
    return list(RunFolder(folder).metrics.read())


def loader_hashes(config_path: Path, steps: int) -> list[str]:
    """Return the chain of batch hashes as two loaders alone make it, without a training."""
    config = load_config(config_path)
    stages = [stage.of_loader for stage in config.all_stages]
    rows = config.train.global_batch_size
    ranks = [Loader(config.data, rows, config.run.seed, rank, 2, stages=stages[1:]) for rank in range(2)]
    found, chain = [], ""
    for _ in range(steps):
        if ranks[0].ends_stage:
            state = merge_states([rank.state_dict() for rank in ranks])
            for rank in ranks:
                rank.load_state_dict(state)
        chain = chain_hash(chain, sum(rank.next_batch().row_hash for rank in ranks) % (1 << 64))
        found.append(chain)
    for rank in ranks:
        rank.close()
    return found


def kill_at(ranks: list[Rank], folder: Path, step: int) -> None:
    """Kill all ranks once a run has done a step."""
    path = folder / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < step:
        assert all(rank.poll() is None for rank in ranks), ranks[0].output
        time.sleep(0.01)
    for rank in ranks:
        rank.kill_group()
    for rank in ranks:
        assert rank.wait() == -signal.SIGKILL


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run of three later stages on one rank, undisturbed; return its config."""
    config = write_staged(tmp_path_factory.mktemp("staged"), "staged")
    run_ranks(1, "pretrain", "train", "--config", str(config))
    return config


@pytest.mark.distributed
def test_a_run_of_stages_trains_what_the_loader_alone_gives(staged: Path) -> None:
    found = metrics(staged.parent / "staged")
    assert [record["batch_hash"] for record in found] == loader_hashes(staged, STEPS)
    assert [record["stage"] for record in found] == [0] * 8 + [1] * 6 + [2] * 4 + [3] * 6
    rates = [record["learning_rate"] for record in found]
    assert rates[:18] == [rates[0]] * 18
    assert rates[-1] == 0.0
    assert rates[18:] == sorted(rates[18:], reverse=True)
    assert "trained_hash" not in found[-1]
    # Losses go on as they should: no stage begins with a jump to that of an untrained model
    assert max(record["loss"] for record in found[8:]) < found[0]["loss"]


@pytest.mark.distributed
def test_a_run_of_stages_is_the_same_however_it_is_killed(
    staged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worlds = (2, 1, 2)  # ranks of each start, fewer and more than before
    config = write_staged(tmp_path, "staged", wandb={"mode": "online", "system_metrics": False})
    # The first resume is from step 8, where sources and positions change
    kills = [random.randrange(9, 12), random.randrange(12, STEPS - 1)]
    with wandb_server(rewinds=True) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        for world, step in zip(worlds, kills, strict=False):
            kill_at(start_ranks(world, "pretrain", "train", "--config", str(config)), tmp_path / "staged", step)
        run_ranks(worlds[-1], "pretrain", "train", "--config", str(config))
        (rows,) = server.history.values()
    shown = [(row["step"], row["loss"], row["stage"], row["batch_hash"]) for row in rows]
    assert shown == [(r["step"], r["loss"], r["stage"], r["batch_hash"]) for r in metrics(tmp_path / "staged")], kills
    found, undisturbed = metrics(tmp_path / "staged"), metrics(staged.parent / "staged")
    same = ("step", "batch_hash", "learning_rate", "tokens", "stage", "tokens_per_source")
    assert [[record[key] for key in same] for record in found] == [
        [record[key] for key in same] for record in undisturbed
    ], kills
    assert [record["loss"] for record in found] == pytest.approx([record["loss"] for record in undisturbed], rel=1e-3)
    epochs = [record["epoch_per_source"]["pile"] for record in found]
    assert epochs == sorted(epochs)


@pytest.mark.distributed
def test_a_stage_in_the_future_may_be_edited_and_one_in_the_past_may_not(staged: Path, tmp_path: Path) -> None:
    shutil.copytree(staged.parent / "staged", tmp_path / "staged")
    shutil.rmtree(tmp_path / "staged" / "checkpoints" / "step_00000020")
    shutil.rmtree(tmp_path / "staged" / "checkpoints" / "step_00000024")
    command = ("train", "--config", str(staged), f"run.dir={tmp_path}")
    (rank,) = start_ranks(1, "pretrain", *command, "stages.1.data.seq_len=96")
    assert rank.wait() == 2
    assert "stages.1.data.seq_len: 128 -> 96" in rank.output
    # The newest checkpoint is that of step 16, and the third stage begins at 18
    before = metrics(tmp_path / "staged")
    run_ranks(1, "pretrain", *command, "stages.2.step=20", "stages.2.data.seq_len=64")
    after = metrics(tmp_path / "staged")
    assert [record["batch_hash"] for record in after[:20]] == [record["batch_hash"] for record in before[:20]]
    assert after[20]["batch_hash"] != before[20]["batch_hash"]
    assert after[20]["stage"] == 3


@pytest.mark.distributed
def test_a_checkpoint_has_the_positions_of_its_step_wherever_it_is_read(
    staged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, suite = tmp_path / "staged", tmp_path / "suite" / "text" / "val.jsonl"
    suite.parent.mkdir(parents=True)
    texts = [" ".join(f"word {i * i}" for i in range(n, n + 25)) for n in range(4)]
    suite.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    shutil.copytree(staged.parent / "staged", run)
    for step in range(12, STEPS + 1, 4):
        shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")
    # The start goes on where the second stage begins, and scores what the first has left before it does
    command = ("train", "--config", str(staged), f"run.dir={tmp_path}", "evaluation.every=4")
    output = run_ranks(1, "pretrain", *command, f"evaluation.suite={tmp_path / 'suite'}")
    assert "stage 2 begins after step 14: 4 rows of 128 tokens a step" in output
    assert "from now on {'rope_theta': 20.0, 'rope_scaling': {'rope_type': 'yarn'" in output
    figures = ("batch_hash", "loss", "weight_hash", "optimizer_hash")
    assert [[r[key] for key in figures] for r in metrics(run)] == [
        [r[key] for key in figures] for r in metrics(staged.parent / "staged")
    ]

    def scored() -> dict[tuple[int, str], float]:
        lines = map(json.loads, (run / "evals.jsonl").read_text().splitlines())
        return {(line["step"], line["domain"]): line["nll_per_token"] for line in lines if line["step"]}

    in_loop = scored()
    shutil.move(run / "evals.jsonl", run / "in-loop.jsonl")
    assert dispatch.run("evaluate", ["--run", str(run), "--steps", "8,12,16"]) == 0
    afterwards = scored()
    assert {step for step, _ in afterwards} == {8, 12, 16}
    assert afterwards == pytest.approx({key: in_loop[key] for key in afterwards}, rel=1e-5)
    capsys.readouterr()
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    for step, theta, scaling, length in ((8, 1e4, None, 64), (12, 20.0, None, 64), (16, 20.0, yarn, 128)):
        model = tmp_path / f"model-{step}"
        assert dispatch.run("export", ["--run", str(run), "--step", str(step), "--to", str(model)]) == 0
        written = json.loads((model / "config.json").read_text())
        assert (written["rope_theta"], written["max_position_embeddings"]) == (theta, length)
        assert (written["rope_scaling"] or {}).items() >= (scaling or {}).items()
        expected = load_config(run / "config.yaml").stage_of(step).model
        for described in (open_model(model, expected), open_model(tmp_path / f"staged@{step}", expected)):
            assert described.description.context == length
    capsys.readouterr()
    assert dispatch.run("average", ["--run", str(run), "--steps", "8", "12", "--to", str(tmp_path / "mean")]) == 2
    assert "--steps: a stage between steps 8 and 12 changes how positions are computed" in capsys.readouterr().err
    assert dispatch.run("average", ["--run", str(run), "--steps", "4", "8", "--to", str(tmp_path / "mean")]) == 0


def fork(capsys: pytest.CaptureFixture[str], run: Path, step: int, name: str, *overrides: str) -> tuple[int, str]:
    code = dispatch.run("fork", ["--run", str(run), "--step", str(step), "--name", name, *overrides])
    said = capsys.readouterr()
    return code, said.out + said.err


@pytest.mark.distributed
def test_a_fork_shares_its_parents_past_and_outlives_it(
    staged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = tmp_path / "staged"
    shutil.copytree(staged.parent / "staged", parent)
    where = f"run.dir={tmp_path}"
    code, said = fork(capsys, parent, 12, "b", where, "stage.data.seq_len=32", "stage.optim.learning_rate=1e-4")
    assert code == 0, said
    assert f"--config {tmp_path}/b/config.yaml" in said
    child = RunFolder(tmp_path / "b")
    shared = parent / "checkpoints" / "step_00000012"
    files = [path for path in shared.rglob("*") if path.is_file()]
    assert all(path.samefile(child.checkpoints / shared.name / path.relative_to(shared)) for path in files)
    assert len(files) > 4
    (ancestor,) = child.ancestors()
    assert (ancestor.name, ancestor.step) == ("staged", 12)
    assert child.run_id() != ancestor.run_id
    shutil.rmtree(parent)  # as if the parent had removed what it no longer keeps
    run_ranks(1, "pretrain", "train", "--config", str(child.config))
    found, parents = metrics(child.root), metrics(staged.parent / "staged")
    figures = ("batch_hash", "loss", "grad_norm", "weight_hash")
    assert [[r[key] for key in figures] for r in found[:12]] == [[r[key] for key in figures] for r in parents[:12]]
    assert len(found) == STEPS
    assert found[12]["learning_rate"] == 1e-4
    assert found[12]["batch_hash"] != parents[12]["batch_hash"]
    for step in (3, 12, 13, STEPS):  # each is rebuilt, and proved by its hash
        assert dispatch.run("provenance", ["--run", str(child.root), "--step", str(step)]) == 0
    # A fork of a fork knows both
    code, said = fork(capsys, child.root, 16, "c", "train.steps=20")
    assert code == 0, said
    assert [(one.name, one.step) for one in RunFolder(tmp_path / "c").ancestors()] == [("staged", 12), ("b", 16)]
    assert metrics(tmp_path / "c") == found[:16]


@pytest.mark.distributed
def test_a_fork_that_cannot_be_is_refused_and_nothing_is_written(
    staged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = staged.parent / "staged"
    for step, overrides, message in (
        (13, (), "has no complete checkpoint of step 13; it has [4, 8, 12, 16, 20, 24]"),
        (12, ("data.seq_len=32",), "data.seq_len: 64 -> 32"),
        (12, ("stage.data.seq_lne=32",), "seq_lne: unknown key; did you mean"),
        (12, ("stages.0.data.lanes=8",), "stages.0.data.lanes: 4 -> 8"),
        (16, ("data.skip_steps=[[15, 17]]",), "step 15 was trained already, since the run has done 16"),
        (16, ("data.skip_steps=[[20, 30]]",), "[20, 30] lies beyond the run's end at train.steps=24"),
        (16, ("data.forget=list.jsonl",), "data.forget: None -> 'list.jsonl'"),
        (16, ("stage.data.forget=/nowhere",), "data.forget=/nowhere: cannot be read"),
    ):
        code, said = fork(capsys, run, step, "b", f"run.dir={tmp_path}", *overrides)
        assert code != 0
        assert message in said
        assert not list(tmp_path.iterdir())


@pytest.mark.distributed
def test_steps_that_are_passed_over_move_the_data_on_and_change_nothing(staged: Path, tmp_path: Path) -> None:
    shutil.copytree(staged.parent / "staged", tmp_path / "staged")
    command = ("train", "--config", str(staged), f"run.dir={tmp_path}", "data.skip_steps=[[10, 11], [15, 15]]")
    (rank,) = start_ranks(1, "pretrain", *command)
    assert rank.wait() == 2
    assert "step 10 was trained already" in rank.output
    output = run_ranks(1, "pretrain", *command, "--from-step", "8")
    assert "the checkpoint of step 12 is retracted" in output
    found, before = metrics(tmp_path / "staged"), metrics(staged.parent / "staged")
    assert [record["batch_hash"] for record in found] == [record["batch_hash"] for record in before]
    assert [record["step"] for record in found if record.get("passed_over")] == [10, 11, 15]
    assert all(record["loss"] is None for record in found if record.get("passed_over"))
    assert found[9]["weight_hash"] == found[8]["weight_hash"] == found[10]["weight_hash"]
    assert found[9]["tokens"] == found[8]["tokens"]
    assert "trained_hash" not in found[8]
    assert len({record["trained_hash"] for record in found[9:]}) == STEPS - 9
    archive = RunFolder(tmp_path / "staged").superseded / "metrics.jsonl"
    retracted = [json.loads(line) for line in archive.read_text().splitlines()]
    assert [record["step"] for record in retracted] == list(range(9, STEPS + 1))
    assert all(record["retracted"].startswith("went back after step 8, ") for record in retracted)
    # What was set aside is still there, and is not resumed from
    names = {path.name for path in (tmp_path / "staged" / "checkpoints").iterdir()}
    assert "step_00000012.retracted" in names
    assert "step_00000012" in names


@pytest.mark.distributed
def test_poisoned_documents_are_found_and_forgotten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A spike is seen, its documents are named, and a fork that forgets them goes on as if they had never counted."""
    lines = [json.dumps({"text": f"line {i} of a plain corpus, number {i * i}. " * 6}) for i in range(300)]
    for i in (100, 101, 102):
        lines[i] = json.dumps({"text": "".join(chr(0x4E00 + (i * 7919 + j * j) % 3000) for j in range(60))})
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(lines) + "\n")
    settings: dict[str, Any] = {
        "data": {"sources": [{"name": "plain", "paths": [str(corpus)], "max_epochs": 1}], "lanes": 1, "seq_len": 128},
        "train": {"steps": 20, "global_batch_size": 4, "micro_batch_size": 4, "weight_hash_every": 1},
        "checkpoint": {"every": 1, "keep": 40},
    }
    config = write_config(tmp_path, "a", **settings)
    run_ranks(1, "pretrain", "train", "--config", str(config))
    found = metrics(tmp_path / "a")
    # The loss of a plain corpus falls; the step that stands out holds a poisoned document, the worst of its batch
    poisoned = {}
    for record in found[1:]:
        dispatch.run("provenance", ["--run", str(tmp_path / "a"), "--step", str(record["step"]), "--by-loss"])
        table = [line.split("\t") for line in capsys.readouterr().out.splitlines()[1:]]
        assert sum(float(row[0]) * int(row[1]) for row in table) / sum(int(row[1]) for row in table) == pytest.approx(
            record["loss"], rel=1e-4
        )
        if {int(row[4]) for row in table} & {101, 102, 103}:
            poisoned[record["step"]] = int(table[0][4])
    spike = max(found[1:], key=lambda record: record["loss"] - found[record["step"] - 2]["loss"])["step"]
    assert spike in poisoned
    assert set(poisoned.values()) <= {101, 102, 103}
    first = min(poisoned)
    listed = tmp_path / "forget.jsonl"
    listed.write_text("".join(json.dumps({"shard": corpus.name, "line": line}) + "\n" for line in (101, 102, 103)))
    code, said = fork(capsys, tmp_path / "a", first - 1, "b", f"stage.data.forget={listed}")
    assert code == 0, said
    run_ranks(1, "pretrain", "train", "--config", str(tmp_path / "b" / "config.yaml"))
    forgetful = metrics(tmp_path / "b")
    # A run that never counted them
    clean = write_config(tmp_path, "c", **(settings | {"data": settings["data"] | {"forget": str(listed)}}))
    run_ranks(1, "pretrain", "train", "--config", str(clean))
    for b, c, a in itertools.islice(zip(forgetful, metrics(tmp_path / "c"), found, strict=True), first - 1, None):
        assert (b["loss"], b["grad_norm"], b["weight_hash"]) == (c["loss"], c["grad_norm"], c["weight_hash"])
        assert b["batch_hash"] == a["batch_hash"], "nothing else of any row has changed"
        assert b["trained_hash"] != b["batch_hash"]
    assert sum(record.get("forgotten_tokens", 0) for record in forgetful) > 0
