"""A run that was killed resumes as if it never had been: same losses, same norms, same batches, bit for bit."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pytest

from pretrain.run.run_folder import RunFolder
from pretrain.run.starts import read_starts
from pretrain.topology import free_port
from shards import read_documents
from tests.distributed.ranks import ROOT, Rank, start_ranks
from tests.pretrain.checkpoint.disk import KILLED
from tests.tiny_run import write_config

STEPS = 30


class Run:
    """One run folder, and commands that work on it."""

    def __init__(
        self,
        folder: Path,
        world_size: int,
        tp_size: int = 1,
        zero_stage: int = 1,
        precision: str = "fp32",
        averaged: bool = False,
        sp_size: int = 1,
    ) -> None:
        self.folder, self.world_size = folder, world_size
        suite = folder / "suite"
        for domain in ("wiki", "code"):
            suite.joinpath(domain).mkdir(parents=True)
            documents = islice(read_documents(str(ROOT / "shards/sample/eval" / domain / "val.jsonl.zst")), 3)
            lines = [json.dumps({"text": document.text[:1000]}) + "\n" for document in documents]
            suite.joinpath(domain, "val.jsonl").write_text("".join(lines))
        # Few rows per window, so that lanes meet bad records all along.
        lines = ["{broken" * 300 if i % 25 else json.dumps({"text": f"{i} line " * 30}) for i in range(1000)]
        folder.joinpath("odd.jsonl").write_text("\n".join(lines))
        sources = [
            {"name": "pile", "paths": ["shards/sample/train/pile-*"], "weight": 0.6},
            {"name": "dolma", "paths": ["shards/sample/train/dolma-*"], "weight": 0.3},
            {"name": "odd", "paths": [f"{folder}/odd.jsonl"], "weight": 0.1},
        ]
        self.config = write_config(
            folder,
            "resumed",
            model={"dropout": 0.1},
            data={"num_workers": 1, "on_bad_record": "skip", "sources": sources},
            train={"steps": STEPS, "ema": {"half_life_tokens": 2000} if averaged else None},
            optim={
                "learning_rate": 1e-3,
                "schedule": "cosine",
                "warmup_steps": 5,
                "z_loss": 1e-4,
                "moments": precision,
            },
            parallel={"tp_size": tp_size, "sp_size": sp_size, "zero_stage": zero_stage},
            checkpoint={"every": 6},
            metrics={"layers_every": 4},
            precision=precision,
            evaluation={"every": 15, "suite": str(suite), "batch_size": 4},
        )

    def start(self, *overrides: str, faults: Sequence[tuple[int, str, object]] = ()) -> list[Rank]:
        code = f"from tests.distributed import faulty; faulty.install(rank, {str(self.folder)!r}, {faults!r})"
        arguments = ("train", "--config", str(self.config), *overrides)
        return start_ranks(self.world_size, "pretrain", *arguments, code=code if faults else "")

    def finish(self, *overrides: str) -> str:
        """Run to the end and return rank 0's output."""
        return wait(self.start(*overrides), [0])

    def metrics(self) -> list[dict]:
        lines = (self.folder / "resumed" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def layers(self) -> list[dict]:
        lines = (self.folder / "resumed" / "layers.jsonl").read_text().splitlines()
        return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]

    def evals(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "resumed" / "evals.jsonl").read_text().splitlines()]

    def skipped(self) -> list[tuple[int, int]]:
        """Read the (step, line) of each bad record that was skipped."""
        lines = (self.folder / "resumed" / "bad_records.jsonl").read_text().splitlines()
        return [(record["step"], record["line"]) for record in map(json.loads, lines)]

    def steps_done(self) -> int:
        path = self.folder / "resumed" / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def wait_for_step(self, step: int, processes: Sequence[Rank | subprocess.Popen[bytes]]) -> None:
        while self.steps_done() < step:
            assert all(process.poll() is None for process in processes), "ended too early"
            time.sleep(0.01)

    def figures(self) -> list[tuple]:
        return [(m["step"], m["loss"], m["grad_norm"], m["batch_hash"], m["learning_rate"]) for m in self.metrics()]


def wait(ranks: list[Rank], codes: list[int]) -> str:
    """Wait for all ranks to end with one of these exit codes; return rank 0's output."""
    for rank in ranks:
        assert rank.wait() in codes, rank.output
    return ranks[0].output


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("undisturbed"), world_size=1, averaged=True)
    run.finish()
    return run


@pytest.mark.distributed
def test_killed_and_resumed_equals_undisturbed(undisturbed: Run, tmp_path: Path) -> None:
    run = Run(tmp_path, world_size=1, averaged=True)
    step = random.randint(1, STEPS - 1)
    processes = run.start()
    run.wait_for_step(step, processes)
    processes[0].kill_group()
    wait(processes, [-signal.SIGKILL])
    run.finish()
    assert [m["step"] for m in run.metrics()] == list(range(1, STEPS + 1)), f"killed after step {step}"
    assert run.figures() == undisturbed.figures(), f"killed after step {step}"
    assert run.skipped() == undisturbed.skipped(), f"killed after step {step}"
    assert run.layers() == undisturbed.layers(), f"killed after step {step}"
    assert run.evals() == undisturbed.evals(), f"killed after step {step}"
    assert "ema:macro" in {record["domain"] for record in run.evals()}
    assert [record["step"] for record in run.layers()] == [1, *range(4, STEPS + 1, 4)]
    assert len({step for step, _ in run.skipped()}) > 5
    assert [m["skipped_records"] for m in run.metrics()] == [
        sum(at <= m["step"] for at, _ in run.skipped()) for m in run.metrics()
    ]


@pytest.mark.distributed
def test_a_terminated_run_saves_and_later_continues(undisturbed: Run, tmp_path: Path) -> None:
    run = Run(tmp_path, world_size=1)
    processes = run.start()
    run.wait_for_step(9, processes)
    processes[0].send_signal(signal.SIGTERM)
    wait(processes, [75])
    stopped_at = run.steps_done()
    assert 9 <= stopped_at < STEPS
    assert (tmp_path / "resumed" / "checkpoints" / f"step_{stopped_at:08d}" / "COMPLETE").exists()
    run.finish()
    assert run.figures() == undisturbed.figures()


@pytest.mark.distributed
@pytest.mark.parametrize("ctrl_c", [False, True])
def test_a_stopped_launcher_leaves_a_checkpoint_and_no_processes(ctrl_c: bool, tmp_path: Path) -> None:
    run = Run(tmp_path, world_size=1)
    command = [str(Path(sys.executable).with_name("deepspeed")), "--master_port", str(free_port())]
    command += ["launch/pretrain.py", "--config", str(run.config), "train.steps=100000"]
    # Steps take a second or more, since the launcher's own signals arrive within one.
    command += ["train.global_batch_size=64", "data.seq_len=256", "evaluation.suite=null"]
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    run.wait_for_step(2, [launcher])
    if ctrl_c:  # the terminal sends it to every process of its group, and the launcher again to its children
        os.killpg(launcher.pid, signal.SIGINT)
    else:
        launcher.terminate()
    launcher.wait()
    for _ in range(600):
        if not (tmp_path / "resumed" / "lease").exists():
            break
        time.sleep(0.1)
    said = (tmp_path / "log").read_text()
    assert not (tmp_path / "resumed" / "lease").exists(), said
    assert "exiting at once" not in said
    stopped_at = run.steps_done()
    assert (tmp_path / "resumed" / "checkpoints" / f"step_{stopped_at:08d}" / "COMPLETE").exists(), said


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("tp_size", "sp_size", "zero_stage", "precision"), [(2, 1, 1, "bf16"), (1, 1, 3, "fp32"), (1, 2, 2, "fp32")]
)
def test_ranks_killed_together_resume_exactly(
    tp_size: int, sp_size: int, zero_stage: int, precision: str, tmp_path: Path
) -> None:
    runs = []
    for name, kill_after in (("straight", None), ("killed", 8)):
        tmp_path.joinpath(name).mkdir()
        run = Run(tmp_path / name, 2, tp_size, zero_stage, precision, sp_size=sp_size)
        if kill_after:
            processes = run.start("train.steps=12")
            run.wait_for_step(kill_after, processes)
            for process in processes:
                process.kill_group()
            wait(processes, [-signal.SIGKILL])
        run.finish("train.steps=12")
        runs.append(run)
    assert runs[0].figures() == runs[1].figures()
    assert len(runs[1].figures()) == 12


@pytest.mark.distributed
def test_a_rank_whose_disk_fails_costs_one_save_and_delays_no_other(undisturbed: Run, tmp_path: Path) -> None:
    run = Run(tmp_path, world_size=2)
    checkpoints = tmp_path / "resumed" / "checkpoints"

    def complete() -> list[int]:
        return sorted(int(path.parent.name.removeprefix("step_")) for path in checkpoints.glob("*/COMPLETE"))

    # One save fails on rank 1, which dies in the middle of the third.
    faults = [(1, "step_00000006/engine", errno.ENOSPC), (1, "step_00000018", "kill")]
    processes = run.start("evaluation.suite=null", faults=faults)
    run.wait_for_step(18, processes[:1])
    assert processes[1].wait() == KILLED
    processes[0].send_signal(signal.SIGKILL)
    output = wait(processes[:1], [1, -signal.SIGKILL])  # it may have noticed itself
    assert "step 6 is not saved: rank 1: " in output
    assert re.search(r"rank 1: \S*/step_00000006/engine/\S+optim_states.pt cannot be written: No space left", output)
    assert complete() == [12]
    # The last save fails on rank 0.
    output = wait(run.start("evaluation.suite=null", "train.steps=20", faults=[(0, "step_00000020", errno.EIO)]), [1])
    assert "resumed after step 12" in output
    assert "the run's latest state is not saved: rank 0: " in output
    assert complete() == [12, 18]
    # A request to stop comes during a save, while training continues.
    overrides = ("evaluation.suite=null", "train.steps=400", "checkpoint.every=24")
    processes = run.start(*overrides, faults=[(1, "step_00000024", "wait")])
    run.wait_for_step(26, processes)
    assert complete() == [12, 18]
    processes[0].send_signal(signal.SIGTERM)
    (tmp_path / "go-on").touch()
    wait(processes, [75])
    assert complete() == [24, run.steps_done()]
    found, expected = run.metrics(), undisturbed.metrics()
    assert [m["batch_hash"] for m in found][: len(expected)] == [m["batch_hash"] for m in expected][: len(found)]
    assert {m["failed_saves"] for m in found if "failed_saves" in m} == {1}  # that of step 6
    # For each step, the record of the last process that made it, which resumed after steps 12 and 18.
    assert [m["step"] for m in found if "checkpoint_seconds" in m] == [7, 25]


@pytest.mark.distributed
def test_a_damaged_checkpoint_is_skipped(undisturbed: Run, tmp_path: Path) -> None:
    run = Run(tmp_path, world_size=1)
    run.finish("train.steps=13")
    newest = tmp_path / "resumed" / "checkpoints" / "step_00000013"
    victim = max(newest.joinpath("engine").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    output = run.finish()
    assert "step 13 is damaged" in output
    assert victim.name in output
    assert (newest.parent / "step_00000013.damaged").exists()
    assert "resumed after step 12" in output
    assert [m["batch_hash"] for m in run.metrics()] == [m["batch_hash"] for m in undisturbed.metrics()]


@pytest.mark.distributed
def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(tmp_path: Path) -> None:
    run = Run(tmp_path, world_size=1)
    run.finish("train.steps=3", "evaluation.suite=null")
    checkpoint = tmp_path / "resumed" / "checkpoints" / "step_00000003"
    checkpoint.joinpath("state.json").write_text("{}")
    for _ in range(2):  # nor does the second start, which finds what the first left
        output = wait(run.start("train.steps=3", "evaluation.suite=null"), [1])
        assert "every checkpoint in" in output
        assert "state.json" in output
        assert run.steps_done() == 3
    assert checkpoint.joinpath("COMPLETE").exists()


@pytest.mark.distributed
def test_the_run_ends_when_the_data_ends(tmp_path: Path) -> None:
    run = Run(tmp_path, world_size=2)
    lines = [
        json.dumps({"text": f"{kind} {i} " * 40, "meta": {"pile_set_name": kind}})
        for i in range(30)
        for kind in ("a", "b")
    ]
    tmp_path.joinpath("tiny.jsonl").write_text("\n".join(lines))
    source = f"{{name: tiny, paths: ['{tmp_path}/tiny.jsonl'], max_epochs: 1, source_from: meta.pile_set_name}}"
    # Three lanes on two ranks: both read all of them, and the shortest runs dry long before the others.
    run.finish(f"data.sources=[{source}]", "data.lanes=3", "data.window_bytes=4096", "train.steps=100000")
    metrics = run.metrics()
    assert metrics[-1]["epoch_per_source"] == {"tiny": 1.0}
    assert max(m["epoch_per_source"]["tiny"] for m in metrics[:-1]) < 1
    assert metrics[-1]["tokens"] == sum(m["tokens_per_source"]["tiny"] for m in metrics)
    for m in metrics:
        counts = m["tokens_per_source"]
        assert counts["tiny"] == counts.get("tiny/a", 0) + counts.get("tiny/b", 0)
        assert m["padding_share"] == pytest.approx(1 - counts["tiny"] / (8 * 65))
    last = metrics[-1]["step"]
    assert (tmp_path / "resumed" / "checkpoints" / f"step_{last:08d}" / "COMPLETE").exists()
    evals = [json.loads(line) for line in (tmp_path / "resumed" / "evals.jsonl").read_text().splitlines()]
    assert evals[-1]["step"] == last
    assert (tmp_path / "resumed" / "data_end").read_text() == str(last)


@pytest.mark.distributed
def test_a_run_given_in_epochs_ends_after_them_and_with_its_schedule(tmp_path: Path) -> None:
    run = Run(tmp_path, world_size=2)
    lines = [json.dumps({"text": f"{i} " * (20 + i % 30)}) for i in range(100)]
    tmp_path.joinpath("tiny.jsonl").write_text("\n".join(lines))
    overrides = [f"data.sources=[{{name: tiny, paths: ['{tmp_path}/tiny.jsonl']}}]", "data.lanes=null"]
    run.finish(*overrides, "train.steps=null", "train.epochs=2", "optim.schedule=linear", "optim.floor=0")
    metrics = run.metrics()
    assert metrics[-1]["epoch_per_source"] == {"tiny": 2.0}
    (start,) = read_starts(RunFolder(tmp_path / "resumed"))
    assert start.last_step == metrics[-1]["step"], "it was foreseen"
    assert [m["learning_rate"] for m in metrics[-2:]][-1] == 0 < metrics[-2]["learning_rate"]


@pytest.mark.distributed
def test_data_that_one_rank_cannot_read_stops_all_of_them(tmp_path: Path) -> None:
    run = Run(tmp_path, world_size=2)
    lines = [json.dumps({"text": "word " * 60}) for _ in range(200)]
    lines[120] = "{broken"
    tmp_path.joinpath("bad.jsonl").write_text("\n".join(lines))
    processes = run.start(
        f"data.sources=[{{name: bad, paths: ['{tmp_path}/bad.jsonl']}}]",
        "data.window_bytes=2048",
        "data.lanes=2",
        "data.on_bad_record=fail",
    )
    assert [process.wait() for process in processes] == [2, 2], [process.output for process in processes]
    outputs = [process.output for process in processes]
    assert sum("bad.jsonl" in output and "line 121" in output for output in outputs) == 1, outputs
    assert sum("another rank could not read its data" in output for output in outputs) == 1


@pytest.mark.distributed
def test_batches_do_not_depend_on_the_ranks(undisturbed: Run, tmp_path: Path) -> None:
    run = Run(tmp_path, world_size=4, tp_size=2)
    run.finish("train.steps=5", "data.num_workers=0", "model.dropout=0")
    assert [m["batch_hash"] for m in run.metrics()] == [m["batch_hash"] for m in undisturbed.metrics()[:5]]
