"""Submit a run to Slurm, after checking that it can work.

    headrace submit --config configs/llama-1b-dolma.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00

The job restarts itself until the run is finished. With --dry-run nothing is submitted: the checks go to stderr, the
script to stdout. With --array a sweep: one run for each combination of a YAML file's lists, such as

    optim.learning_rate: [1e-3, 3e-3]
    run.seed: [0, 1]

Exit codes: 0 submitted (or, with --dry-run, all is well), 2 a check failed, 1 anything else.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pretrain.checkpoint.duration import save_time
from pretrain.checkpoint.store import CheckpointStore
from pretrain.cluster import preflight, slurm
from pretrain.cluster.preflight import Finding
from pretrain.cluster.submission import (
    Run,
    evaluation_script,
    job_findings,
    partition_of,
    run_findings,
    runs_of,
    sbatch_finding,
    training_script,
)
from pretrain.commands.arguments import at_least
from pretrain.config import RunConfig
from pretrain.devices import slurm_names
from shards import ConfigError
from shards.storage.atomic import write_atomically

_COLORS = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "bold red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="a YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="e.g. optim.learning_rate=1e-3")
    parser.add_argument("--nodes", type=at_least(1), required=True)
    parser.add_argument(
        "--gpus-per-node", type=at_least(0), required=True, help="also the ranks per node; 0: one CPU rank per node"
    )
    parser.add_argument("--time", required=True, help="limit of one start, in sbatch's format, e.g. 24:00:00")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--qos")
    parser.add_argument(
        "--array", type=Path, metavar="SWEEP.YAML", help="lists of values by key: a run for each combination"
    )
    parser.add_argument("--after", metavar="JOB", help="start only once this job has succeeded")
    parser.add_argument("--cpus-per-task", type=at_least(1), help="cores of one rank; default: data.num_workers + 2")
    parser.add_argument(
        "--grace",
        type=at_least(1),
        metavar="SECONDS",
        help="save this long before the limit; default: from a save's duration",
    )
    parser.add_argument("--gpu", metavar="TYPE", help="type of the GPUs, such as h100, if the partition does not say")
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="memory of one GPU, if it is not the type's")
    parser.add_argument(
        "--network", type=float, metavar="GBIT", help="Gbit/s of one node; default: that of the GPU maker's own servers"
    )
    parser.add_argument("--no-node-check", action="store_true", help="start without testing the nodes first")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="any other sbatch option, e.g. --sbatch=--mem=0"
    )
    parser.add_argument(
        "--evaluate",
        action="store_true",
        help="submit a job beside the training that scores its checkpoints as they appear",
    )
    parser.add_argument("--dry-run", action="store_true", help="check, print the script, and stop")


def show(console: Console, findings: list[Finding]) -> None:
    """Print the findings, each once, one below another."""
    table = Table.grid(padding=(0, 2))
    for finding in dict.fromkeys(findings):
        level = f"[{_COLORS[finding.level]}]{finding.level}[/]"
        table.add_row(level, finding.about, escape(finding.text))
    console.print(table)


def explain(console: Console, job: str, request: slurm.JobRequest, runs: list[Run], base: RunConfig) -> None:
    """Print how to watch a submitted job."""
    logs = runs[0].config.folder.logs
    own_log = base.folder.logs / (f"{job}_0.log" if request.tasks else f"{job}.log")
    ways = [
        (f"squeue --jobs={job}", "its place in the queue"),
        (f"tail -F {own_log}", "starts, restarts, and why"),
        (f"tail -F {logs}/latest.log", "the ranks' log, from its first line on"),
        (f"scancel {job}", "stops it for good; submitting it again continues the run"),
    ]
    if base.wandb.mode == "offline":
        ways.append((f"wandb sync {runs[0].folder}/wandb/offline-run-*", "uploads the figures so far"))
    elif base.wandb.mode == "online":
        ways.append((f"wandb: project {base.wandb.project}", "the figures, live"))
    table = Table.grid(padding=(0, 3))
    for way in ways:
        table.add_row(*way)
    tasks = f", {request.tasks} tasks" if request.tasks else ""
    console.print(f"\nSubmitted as job {job}{tasks}.", style="bold", highlight=False)
    console.print(table)


def request_of(
    arguments: argparse.Namespace, name: str, output: Path, cpus_per_task: int, grace_seconds: int, tasks: int | None
) -> slurm.JobRequest:
    """Make the request to Slurm; what the arguments leave open follows from the runs."""
    return slurm.JobRequest(
        name=name,
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        cpus_per_task=arguments.cpus_per_task or cpus_per_task,
        time=arguments.time,
        grace_seconds=arguments.grace or grace_seconds,
        output=str(output),
        chdir=Path.cwd(),
        partition=arguments.partition,
        account=arguments.account,
        qos=arguments.qos,
        after=arguments.after,
        tasks=tasks,
        options=tuple(arguments.sbatch),
    )


def hardware_of(arguments: argparse.Namespace, partition: slurm.Partition | None) -> preflight.Hardware:
    """Describe the GPUs that the arguments name, else those of the partition. Raises ConfigError for unknown ones."""
    types = [arguments.gpu.lower()] if arguments.gpu else partition.gpu_types if partition else ()
    found = preflight.hardware_of(types)
    if arguments.gpu and found.device is None:
        raise ConfigError(f"--gpu={arguments.gpu} is unknown; choose from {', '.join(slurm_names())}")
    if arguments.gpu_memory:
        found = dataclasses.replace(found, gpu_bytes=arguments.gpu_memory * 1e9)
    if arguments.network:
        found = dataclasses.replace(found, network_bandwidth=arguments.network * 1e9 / 8)
    return found


def submit_evaluation(arguments: argparse.Namespace, console: Console) -> int:
    """Submit `headrace evaluate --follow` for a config's run; return the exit code."""
    (run,) = runs_of(arguments.config, arguments.overrides, None)
    logs = run.config.folder.logs
    request = request_of(arguments, f"{run.config.run.name}-eval", logs / "eval-%j.log", 2, 0, None)
    script = evaluation_script(run, request)
    print(script, end="", flush=True)
    if not arguments.dry_run:
        if not slurm.has_slurm():
            raise ConfigError("there is no sbatch on this machine, so no job can be submitted; try --dry-run")
        logs.mkdir(parents=True, exist_ok=True)
        job = slurm.submit(script)
        console.print(f"\nSubmitted as job {job}; its log is {logs}/eval-{job}.log.", style="bold")
    return 0


def submit_training(arguments: argparse.Namespace, console: Console) -> int:
    """Check and submit a config's run, or those of a sweep; return the exit code."""
    runs = runs_of(arguments.config, arguments.overrides, arguments.array)
    (named,) = runs_of(arguments.config, arguments.overrides, None)  # a sweep's runs get their names from it
    base, logs = named.config, named.config.folder.logs
    partition, silent = partition_of(arguments.partition)
    bytes_each = max(run.config.checkpoint_bytes for run in runs)
    store = CheckpointStore(runs[0].config.folder.checkpoints, base.checkpoint, bytes_each)
    save = save_time(store, arguments.nodes)
    cores = max(run.config.data.num_workers for run in runs) + 2
    output, tasks = ("%A_%a.log", len(runs)) if arguments.array else ("%j.log", None)
    request = request_of(arguments, base.run.name, logs / output, cores, preflight.grace_for(save), tasks)
    script = training_script(arguments.config, arguments.overrides, runs, request, not arguments.no_node_check)
    hardware = hardware_of(arguments, partition)
    findings = [finding for run in runs for finding in run_findings(run, request, hardware)]
    lengths, folders = [run.config.train.steps for run in runs], [run.folder for run in runs]
    steps = None if None in lengths else max(filter(None, lengths))
    findings += preflight.disk_findings(base.checkpoint, steps, bytes_each, folders)
    findings += job_findings(request, save, partition, silent, arguments.dry_run)
    if partition:
        findings.append(sbatch_finding(script))
    show(console, findings)
    wrong = any(finding.level == "error" for finding in findings)
    if arguments.dry_run or not wrong:
        print(script, end="", flush=True)
    if wrong:
        console.print("Not submitted; see the errors above.", style="bold red")
        return ConfigError.exit_code
    if not arguments.dry_run:
        logs.mkdir(parents=True, exist_ok=True)  # otherwise Slurm could not open the job's own log there
        job = slurm.submit(script)
        write_atomically(logs / f"{job}.sbatch", script)
        explain(console, job, request, runs, base)
    return 0


def run(arguments: argparse.Namespace) -> int:
    """Submit a training or an evaluation; return the exit code. Raises HeadraceError if that fails."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console.width = 120  # columns of a log file
    return submit_evaluation(arguments, console) if arguments.evaluate else submit_training(arguments, console)
