"""Sessions of a training with the real wandb client, each in a process of its own that any session may kill.

The processes are forked from a server that has imported wandb, and what `wandb.init` imports: that would otherwise take
longer than all the rest.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from pretrain.run.events import Event
from pretrain.run.run_folder import RunFolder
from pretrain.run.wandb_tracker import Tracker, WandbConfig

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["wandb.cli.cli", "wandb.sdk.launch.inputs.internal", __name__])


def session(
    root: Path,
    resumed_at: int,
    last: int,
    end: str,
    rate: float = 1.0,
    mode: str = "offline",
    rewound: bool = False,
    **environment: str,
) -> str:
    """Run a session and return what it logged.

    Args:
        root: the run's folder.
        resumed_at: the step whose checkpoint the session resumes from.
        last: the step up to which it trains.
        end: "killed", "service stopped", "left before the evaluation", or anything else for an ordinary end.
        rate: the learning rate of its steps.
        mode: `wandb.mode`.
        rewound: whether the run goes back to `resumed_at` on purpose.
        environment: variables to set.
    """
    code, said = _run(_train, root, resumed_at, last, end, rate, mode, rewound, environment)
    assert code == (-9 if end == "killed" else 0), said
    return said


def records(root: Path, run_id: str = "an-id") -> list[dict[str, object]]:
    """Read all records of all sessions of a wandb run with wandb's own reader."""
    found: list[dict[str, object]] = []
    for file in sorted((root / "wandb").glob(f"*run-*/run-{run_id}.wandb")):
        _, lines = _run(_inspect, file)
        found += [json.loads(line) for line in lines.splitlines()]
    return found


def _run(action: Callable[..., None], root: Path, *arguments: object) -> tuple[int | None, str]:
    """Run an action in a process; return its exit code and its output."""
    output = root.with_name(f"{root.name}.output")
    process = _FORKS.Process(target=_with_output, args=(output, action, root, *arguments))
    process.start()
    process.join()
    return process.exitcode, output.read_text()


def _with_output(output: Path, action: Callable[..., None], *arguments: object) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    action(*arguments)
    sys.stdout.flush()


def _inspect(file: Path) -> None:
    from wandb.cli.cli import cli

    cli(["leet", "inspect", "--json", str(file)])


def _train(
    root: Path, resumed_at: int, last: int, end: str, rate: float, mode: str, rewound: bool, environment: dict[str, str]
) -> None:
    os.environ["WANDB_X_SAVE_REQUIREMENTS"] = "false"  # the list of installed packages, as long in the making
    os.environ.update(environment)
    folder = RunFolder(root)
    folder.create()
    folder.wandb.mkdir(exist_ok=True)
    if not (folder.wandb / "run_id").exists():
        (folder.wandb / "run_id").write_text("an-id")
    folder.cut_back(resumed_at, "resumed")
    config = WandbConfig.model_validate({"system_metrics": False, "mode": mode})
    described = {"model": {"dim": 8}, "commit": "c0ffee"}
    rewound_to = resumed_at if rewound else None
    with Tracker(config, folder, "name", folder.run_id(), described, rewound_to=rewound_to) as tracker:
        if resumed_at and resumed_at % 4 == 0 and all(record["step"] != resumed_at for record in folder.evals.read()):
            _evaluate(folder, tracker, resumed_at)
        for step in range(resumed_at + 1, last + 1):
            if step == last and end == "service stopped":
                _stop_service()
            record = {"step": step, "loss": 1 / step, "learning_rate": rate, "tokens_per_source": {"pile": step}}
            record["step_seconds"] = time.monotonic()  # never the same again, and no reason to rewind wandb
            folder.metrics.append(record)
            tracker.log_step(record, more=step % 4 == 0)
            if step % 4 == 0 and not (step == last and end == "left before the evaluation"):
                _evaluate(folder, tracker, step)
        if end == "finished":
            _evaluate(folder, tracker, last)  # as at the data's end, which the step before could not foresee
            for kind in ("finished", "disk", "finished"):
                tracker.alert(Event(last, kind, f"about {kind}", {}))
        if end == "killed":
            time.sleep(0.1)  # some of it is flushed to the file by now, some is not
            for process in [*psutil.Process().children(), psutil.Process()]:
                process.kill()
    if mode != "disabled":
        import wandb

        wandb.teardown()  # as at an interpreter's end, which a forked process does not reach


def _evaluate(folder: RunFolder, tracker: Tracker, step: int) -> None:
    evals = {"step": step, "suite": "val", "domain": "wiki", "perplexity": 2.0 * step}
    folder.evals.append(evals)
    tracker.log_evals([evals])


def _stop_service() -> None:
    """Stop wandb's own process, as a launcher does that signals every process of a run."""
    for process in psutil.Process().children():
        process.terminate()
        process.wait()
