"""Submits a run to Slurm, once it is known that it can work:

    python launch/submit.py --config configs/llama-1b-dolma.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00

The job restarts itself until the run is finished. With --dry-run nothing is submitted: the checks go to stderr, the
script to stdout. With --array a sweep: one run for each combination of a YAML file's lists, such as

    optim.learning_rate: [1e-3, 3e-3]
    run.seed: [0, 1]

Exit codes: 0 submitted (or, with --dry-run, all is well), 2 something would not work, 1 anything else.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    sys.path[0] = str(ROOT)

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # a login node has no GPU, about which DeepSpeed would say so

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pretrain import preflight, slurm
from pretrain.config import RunConfig, load_config
from pretrain.model.size import checkpoint_bytes, parameter_count
from pretrain.preflight import Finding
from pretrain.run_folder import RunFolder
from pretrain.start import check_same_run, checked_inputs
from pretrain.topology import dp_size_of
from shards import ConfigError, HeadraceError
from shards.durable import write_atomically

_COLORS = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "bold red"}
_MOST_NODES = 256  # up to which numbers of nodes that would work are named


@dataclass(frozen=True)
class Run:
    """One run of a submission: the words that `launch/pretrain.py` is given, and what they come to."""

    overrides: tuple[str, ...]
    config: RunConfig

    @property
    def folder(self) -> Path:
        return self.config.run.dir / self.config.run.name


def at_least(least: int) -> Callable[[str], int]:
    """A type of arguments: whole numbers from `least` on."""

    def whole_number(text: str) -> int:
        if int(text) < least:
            raise ValueError
        return int(text)

    return whole_number


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="e.g. optim.learning_rate=1e-3")
    parser.add_argument("--nodes", type=at_least(1), required=True)
    parser.add_argument(
        "--gpus-per-node", type=at_least(0), required=True, help="also the ranks; 0: one CPU rank a node"
    )
    parser.add_argument("--time", required=True, help="limit of one start, as sbatch takes it, e.g. 24:00:00")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--qos")
    parser.add_argument(
        "--array", type=Path, metavar="SWEEP.YAML", help="lists of values by key: a run for each of all"
    )
    parser.add_argument("--after", metavar="JOB", help="start when this job has succeeded; if it fails, do not")
    parser.add_argument("--cpus-per-task", type=at_least(1), help="cores of one rank; default: data.num_workers + 2")
    parser.add_argument(
        "--grace", type=at_least(1), metavar="SECONDS", help="before the time limit; default: from the save's time"
    )
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="of one GPU, where the partition does not tell")
    parser.add_argument("--no-node-check", action="store_true", help="begin without trying the nodes first")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="any other of sbatch's, e.g. --sbatch=--mem=0"
    )
    parser.add_argument(
        "--evaluate", action="store_true", help="a job beside the training that scores its checkpoints as they appear"
    )
    parser.add_argument("--dry-run", action="store_true", help="check, print the script, and stop")
    return parser.parse_intermixed_args()


def runs_of(arguments: argparse.Namespace) -> list[Run]:
    """The runs that are asked for, one or a sweep's; each is checked by itself."""
    typed = tuple(arguments.overrides)
    base = Run(typed, load_config(arguments.config, typed))
    if arguments.array is None:
        return [base]
    runs, problems = [], []
    for task in slurm.read_sweep(arguments.array):
        name = base.config.run.name
        named = (f"run.name={name}-{task.suffix}", f"wandb.group={base.config.wandb.group or name}")
        try:
            config = load_config(arguments.config, (*typed, *task.overrides, *named))
            runs.append(Run((*task.overrides, *named), config))
        except ConfigError as error:
            problems.append(f"{arguments.array}, {' '.join(task.overrides)}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    return runs


def request_of(
    arguments: argparse.Namespace, runs: list[Run], base: RunConfig, save: preflight.SaveTime
) -> slurm.JobRequest:
    """What is asked of Slurm for these runs."""
    is_array = arguments.array is not None
    workers = max(run.config.data.num_workers for run in runs)
    return slurm.JobRequest(
        name=base.run.name,
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        cpus_per_task=arguments.cpus_per_task or workers + 2,
        time=arguments.time,
        grace_seconds=arguments.grace or preflight.grace_for(save),
        output=str(base.run.dir / base.run.name / "logs" / ("%A_%a.log" if is_array else "%j.log")),
        chdir=Path.cwd(),
        partition=arguments.partition,
        account=arguments.account,
        qos=arguments.qos,
        after=arguments.after,
        tasks=len(runs) if is_array else None,
        options=tuple(arguments.sbatch),
    )


def script_of(arguments: argparse.Namespace, request: slurm.JobRequest, runs: list[Run]) -> str:
    """The job script. A sweep's tasks stand in it one by one, so that it says itself what task 7 is."""
    words = slurm.shell_words(["--config", str(arguments.config), *arguments.overrides])
    lines = [f"({words})"]
    if request.tasks:
        lines.append("case $SLURM_ARRAY_TASK_ID in")
        for i, run in enumerate(runs):
            folder, added = slurm.shell_words([str(run.folder)]), slurm.shell_words(run.overrides)
            lines.append(f"  {i}) run={folder} arguments+=({added}) ;;")
        lines.append("esac")
    settings = {
        "run": slurm.shell_words([str(runs[0].folder)]),
        "checkout": slurm.shell_words([str(ROOT)]),
        "python": slurm.shell_words([sys.executable]),
        "node_check": "no" if arguments.no_node_check else "yes",
        "arguments": "\n".join(lines),
    }
    template = (ROOT / "slurm" / "pretrain.sbatch").read_text()
    return slurm.job_script(template, request.directives(), settings)


def submit_evaluation(arguments: argparse.Namespace, console: Console, base: RunConfig) -> None:
    """Submits launch/evaluate.py --follow for the run of a config. Raises: HeadraceError if there is nothing to do."""
    if base.evaluation.suite is None:
        raise ConfigError("--evaluate: the config has no evaluation.suite; set evaluation.suite=DIR")
    checked_inputs(base)
    folder = base.run.dir / base.run.name
    request = slurm.JobRequest(
        name=f"{base.run.name}-eval",
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        cpus_per_task=arguments.cpus_per_task or 2,
        time=arguments.time,
        grace_seconds=0,
        output=str(folder / "logs" / "eval-%j.log"),
        chdir=Path.cwd(),
        partition=arguments.partition,
        account=arguments.account,
        qos=arguments.qos,
        after=arguments.after,
        options=tuple(arguments.sbatch),
    )
    settings = {
        "run": slurm.shell_words([str(folder)]),
        "checkout": slurm.shell_words([str(ROOT)]),
        "python": slurm.shell_words([sys.executable]),
        # The run's own config says the rest
        "arguments": f"({slurm.shell_words([word for word in arguments.overrides if word.startswith('evaluation.')])})",
    }
    template = (ROOT / "slurm" / "evaluate.sbatch").read_text()
    # Nothing is to be saved before the end, and a script without a trap would be ended by the signal
    script = slurm.job_script(template, request.directives() | {"signal": None}, settings)
    print(script, end="", flush=True)
    if arguments.dry_run:
        return
    if not slurm.has_slurm():
        raise ConfigError("there is no sbatch on this machine, so nothing can be submitted from here; try --dry-run")
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    job = slurm.submit(script)
    console.print(f"\nSubmitted as job {job}; it says what it does in {folder}/logs/eval-{job}.log.", style="bold")


def layout_problem(config: RunConfig, ranks: int) -> str:
    """Why a config cannot be trained on so many ranks; empty if it can."""
    try:
        config.check(dp_size_of(ranks, config.parallel))
    except ConfigError as error:
        return str(error)
    return ""


def layout_findings(config: RunConfig, request: slurm.JobRequest) -> Iterator[Finding]:
    """Whether lanes and batch can be dealt to the ranks, now and after a restart on another number of nodes."""
    nodes, each, parallel = request.nodes, request.ranks_per_node, config.parallel
    devices = f"{nodes} nodes, each of {each} {'GPUs' if request.gpus_per_node else 'CPU ranks'}"
    working = [str(n) for n in range(1, _MOST_NODES + 1) if not layout_problem(config, n * each)]
    others = f"; numbers of such nodes that work: {', '.join(working)}" if working else ""
    if problem := layout_problem(config, request.ranks):
        yield Finding("error", "layout", f"{devices}: {problem}{others}")
        return
    dp_size = dp_size_of(request.ranks, parallel)
    rows = config.micro_batch_size(dp_size)
    yield Finding(
        "ok", "layout",
        f"{devices}: {request.ranks} ranks, tp {parallel.tp_size} x dp {dp_size}, ZeRO-{parallel.applied_zero_stage};"
        f" {config.micro_steps(dp_size)} micro-steps of {rows} rows{others}",
    )  # fmt: skip
    if each % parallel.tp_size:
        text = f"parallel.tp_size={parallel.tp_size} reaches across nodes of {each}: every layer waits for the network"
        yield Finding("warning", "layout", text)


def findings_of(run: Run, request: slurm.JobRequest, gpu_bytes: int | None) -> Iterator[Finding]:
    """What the checks of one run have to say."""
    config = run.config
    model, train, seq_len = config.model, config.train, config.data.seq_len
    yield Finding(
        "ok", "config",
        f"{config.run.name}: {parameter_count(model):,} parameters,"
        f" {train.steps:,} steps of {train.global_batch_size:,} rows of {seq_len:,} tokens",
    )  # fmt: skip
    try:
        checked_inputs(config)
        folder = RunFolder(run.folder)
        if folder.has_begun():
            check_same_run(load_config(folder.config), config, folder)
    except HeadraceError as error:
        yield Finding("error", "config", str(error))
    yield from preflight.lease_findings(run.folder)
    yield from layout_findings(config, request)
    yield from preflight.data_findings(config.data)
    if request.gpus_per_node and not layout_problem(config, request.ranks):
        dp_size = dp_size_of(request.ranks, config.parallel)
        sizes = (dp_size, config.micro_batch_size(dp_size), seq_len, weight_bytes(config))
        yield from preflight.memory_findings(model, config.parallel, *sizes, gpu_bytes)


def weight_bytes(config: RunConfig) -> int:
    return 2 if config.precision == "bf16" else 4


def partition_of(arguments: argparse.Namespace) -> tuple[slurm.Partition | None, str]:
    """The partition that was asked for, or why no cluster can say. Raises ConfigError if it says that there is none."""
    if not slurm.has_slurm():
        return None, "there is no sbatch on this machine"
    try:
        return slurm.partition(arguments.partition), ""
    except slurm.SlurmError as error:
        return None, str(error)


def cluster_findings(
    arguments: argparse.Namespace,
    request: slurm.JobRequest,
    save: preflight.SaveTime,
    partition: slurm.Partition | None,
    silent: str,
) -> Iterator[Finding]:
    """What the checks of the job have to say, whatever the runs in it are."""
    limit = slurm.seconds_of(arguments.time)
    preemption = (partition.preemption, partition.preemption_grace_seconds) if partition else ("OFF", 0)
    if limit is None:
        text = f"--time={arguments.time} is no time; write minutes, hours:minutes:seconds or days-hours"
        yield Finding("error", "time", text)
    else:
        yield from preflight.grace_findings(save, request.grace_seconds, limit, *preemption)
    if partition is None:
        text = f"{silent}: no cluster was asked, and none can be given a job from here"
        yield Finding("note" if arguments.dry_run else "error", "slurm", text)


def tried_out(script: str) -> Finding:
    """What sbatch itself thinks of the job."""
    try:
        return Finding("ok", "slurm", slurm.try_out(script))
    except ConfigError as error:
        return Finding("error", "slurm", str(error))


def show(console: Console, findings: list[Finding]) -> None:
    """The findings, each once, one under the other."""
    table = Table.grid(padding=(0, 2))
    for finding in dict.fromkeys(findings):
        level = f"[{_COLORS[finding.level]}]{finding.level}[/]"
        table.add_row(level, finding.about, escape(finding.text))
    console.print(table)


def explain(console: Console, job: str, request: slurm.JobRequest, runs: list[Run], base: RunConfig) -> None:
    """How to watch a job that was submitted."""
    logs = runs[0].folder / "logs"
    own_log = base.run.dir / base.run.name / "logs" / (f"{job}_0.log" if request.tasks else f"{job}.log")
    ways = [
        (f"squeue --jobs={job}", "where it stands in the queue"),
        (f"tail -F {own_log}", "starts, restarts, and why"),
        (f"tail -F {logs}/latest.log", "what the ranks say, from their first line on"),
        (f"scancel {job}", "stops it for good; the same submission goes on"),
    ]
    if base.wandb.mode == "offline":
        ways.append((f"wandb sync {runs[0].folder}/wandb/offline-run-*", "uploads the figures so far"))
    elif base.wandb.mode == "online":
        ways.append((f"wandb: project {base.wandb.project}", "the figures, as they come"))
    table = Table.grid(padding=(0, 3))
    for way in ways:
        table.add_row(*way)
    tasks = f", {request.tasks} tasks" if request.tasks else ""
    console.print(f"\nSubmitted as job {job}{tasks}.", style="bold", highlight=False)
    console.print(table)


def main() -> int:
    arguments = parse_arguments()
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console.width = 120  # of a log file
    try:
        base = load_config(arguments.config, arguments.overrides)
        if arguments.evaluate:
            submit_evaluation(arguments, console, base)
            return 0
        runs = runs_of(arguments)
        partition, silent = partition_of(arguments)
        bytes_each = max(checkpoint_bytes(run.config.model, weight_bytes(run.config)) for run in runs)
        save = preflight.save_time(runs[0].folder, base.checkpoint, bytes_each, arguments.nodes)
        request = request_of(arguments, runs, base, save)
        gpu_bytes = preflight.gpu_bytes_of(partition.gpu_types) if partition else None
        if arguments.gpu_memory:
            gpu_bytes = int(arguments.gpu_memory * 1e9)
        script = script_of(arguments, request, runs)
        findings = [finding for run in runs for finding in findings_of(run, request, gpu_bytes)]
        steps, folders = max(run.config.train.steps for run in runs), [run.folder for run in runs]
        findings += preflight.disk_findings(base.checkpoint, steps, bytes_each, folders)
        findings += cluster_findings(arguments, request, save, partition, silent)
        if partition:
            findings.append(tried_out(script))
        show(console, findings)
        wrong = any(finding.level == "error" for finding in findings)
        if arguments.dry_run or not wrong:
            print(script, end="", flush=True)
        if wrong:
            console.print("Not submitted: see the errors above.", style="bold red")
            return ConfigError.exit_code
        if arguments.dry_run:
            return 0
        logs = base.run.dir / base.run.name / "logs"
        logs.mkdir(parents=True, exist_ok=True)  # or Slurm could not open the job's own log there
        job = slurm.submit(script)
        write_atomically(logs / f"{job}.sbatch", script)
        explain(console, job, request, runs, base)
    except HeadraceError as error:
        console.print(f"error: {error}", style="bold red", markup=False)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
