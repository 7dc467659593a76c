"""The parts of a submission to Slurm: its runs, the findings about each, and the job script.

headrace submit -> submission -> {preflight: findings; slurm: script, sbatch}. A submission is a single run, a sweep's
runs, or an evaluation beside a run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.checkpoint.duration import SaveTime
from pretrain.checkpoint.store import CheckpointStore
from pretrain.cluster import preflight, slurm
from pretrain.cluster.preflight import Finding, Hardware
from pretrain.config import RunConfig, load_config
from pretrain.model.size import Workload, memory_per_rank, parameter_count
from pretrain.run.run_folder import RunFolder
from pretrain.start import check_inputs, check_same_run
from pretrain.topology import dp_size_of, named_layout
from shards import ConfigError, HeadraceError, installation

_TEMPLATES = Path(__file__).parent / "templates"  # in a clone, the folder slurm/
_MOST_NODES = 256  # the most nodes that a message suggests


@dataclass(frozen=True)
class Run:
    """One run of a submission: the arguments for `headrace train`, and the resulting config."""

    overrides: tuple[str, ...]
    config: RunConfig

    @property
    def folder(self) -> Path:
        return self.config.folder.root


def runs_of(path: Path, typed: Sequence[str], sweep: Path | None) -> list[Run]:
    """Return a config's single run, or those of a sweep.

    Args:
        typed: overrides for all runs.
        sweep: a YAML file with a list of values for each key; see `slurm.read_sweep`.
    Raises:
        ConfigError: naming every run of the sweep whose config is wrong.
    """
    base = load_config(path, typed)
    if sweep is None:
        return [Run(tuple(typed), base)]
    runs, problems = [], []
    for task in slurm.read_sweep(sweep):
        name = base.run.name
        named = (f"run.name={name}-{task.suffix}", f"wandb.group={base.wandb.group or name}")
        try:
            config = load_config(path, (*typed, *task.overrides, *named))
            runs.append(Run((*task.overrides, *named), config))
        except ConfigError as error:
            problems.append(f"{sweep}, {' '.join(task.overrides)}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    return runs


def training_script(
    path: Path, typed: Sequence[str], runs: Sequence[Run], request: slurm.JobRequest, node_check: bool
) -> str:
    """Write the training job. It lists a sweep's tasks one by one, so that a reader can see what task 7 is.

    Args:
        path, typed: the config and the overrides of all runs.
        node_check: whether to test the nodes first.
    """
    lines = [f"({slurm.shell_words(['--config', str(path), *typed])})"]
    if request.tasks:
        lines.append("case $SLURM_ARRAY_TASK_ID in")
        for i, run in enumerate(runs):
            folder, added = slurm.shell_words([str(run.folder)]), slurm.shell_words(run.overrides)
            lines.append(f"  {i}) run={folder} arguments+=({added}) ;;")
        lines.append("esac")
    settings = _settings(runs[0].folder, "\n".join(lines), "train", "check-nodes")
    settings["node_check"] = "yes" if node_check else "no"
    return slurm.job_script(_template("pretrain"), request.directives(), settings)


def evaluation_script(run: Run, request: slurm.JobRequest) -> str:
    """Write the job that scores checkpoints as they appear. Raises HeadraceError if it would have nothing to score."""
    if run.config.evaluation.is_empty:
        raise ConfigError(
            "--evaluate: the config has neither evaluation.suite nor evaluation.tasks nor evaluation.needles; set one"
        )
    check_inputs(run.config)
    # All other settings come from the run's own config.
    words = slurm.shell_words([word for word in run.overrides if word.startswith("evaluation.")])
    # Nothing has to be saved before the end, and the signal would end a script without a trap.
    directives = request.directives() | {"signal": None}
    return slurm.job_script(_template("evaluate"), directives, _settings(run.folder, f"({words})", "evaluate"))


def _template(name: str) -> str:
    return (_TEMPLATES / f"{name}.sbatch").read_text()


def _settings(folder: Path, arguments: str, *commands: str) -> dict[str, str]:
    """Return what a template assigns at its top, as shell text: for each command the words that start it."""
    settings = {"run": slurm.shell_words([str(folder)]), "arguments": arguments}
    for command in commands:
        script = installation.script(command)
        start = [str(script)] if script else ["-P", "-m", "pretrain", command]  # -P: no imports from the current folder
        settings[command.replace("-", "_")] = f"({slurm.shell_words([sys.executable, *start])})"
    return settings


def layout_problem(config: RunConfig, ranks: int) -> str:
    """Describe why a config cannot be trained on this many ranks; empty if it can."""
    try:
        config.check(dp_size_of(ranks, config.parallel))
    except ConfigError as error:
        return str(error)
    return ""


def layout_findings(config: RunConfig, request: slurm.JobRequest) -> Iterator[Finding]:
    """Check that the batch can be split over the ranks, now and on other numbers of nodes."""
    nodes, each, parallel = request.nodes, request.ranks_per_node, config.parallel
    devices = f"{nodes} nodes, each of {each} {'GPUs' if request.gpus_per_node else 'CPU ranks'}"
    working = [str(n) for n in range(1, _MOST_NODES + 1) if not layout_problem(config, n * each)]
    others = f"; other node counts that work: {', '.join(working)}" if working else ""
    if problem := layout_problem(config, request.ranks):
        yield Finding("error", "layout", f"{devices}: {problem}{others}")
        return
    dp_size = dp_size_of(request.ranks, parallel)
    first = config.stage_at(0)
    yield Finding(
        "ok", "layout",
        f"{devices}: {request.ranks} ranks, {named_layout(parallel.tp_size, parallel.sp_size, dp_size)},"
        f" ZeRO-{parallel.applied_zero_stage};"
        f" {first.micro_steps(dp_size)} micro-steps of {first.micro_batch_size(dp_size)} rows{others}",
    )  # fmt: skip
    if each % parallel.tp_size:
        text = f"parallel.tp_size={parallel.tp_size} spans nodes of {each} ranks: every layer waits for the network"
        yield Finding("warning", "layout", text)
    elif each % (parallel.tp_size * parallel.sp_size):
        text = f"parallel.sp_size={parallel.sp_size} spans nodes of {each} ranks: attention waits for the network"
        yield Finding("warning", "layout", text)


def run_findings(run: Run, request: slurm.JobRequest, hardware: Hardware) -> Iterator[Finding]:
    """Yield the findings of all checks of one run."""
    config = run.config
    model, train, seq_len = config.model, config.train, config.data.seq_len
    length = f"{train.steps:,} steps" if train.steps else f"{train.epochs} epochs in steps"
    yield Finding(
        "ok", "config",
        f"{config.run.name}: {parameter_count(model):,} parameters,"
        f" {length} of {train.global_batch_size:,} rows of {seq_len:,} tokens",
    )  # fmt: skip
    try:
        check_inputs(config)
        folder = RunFolder(run.folder)
        if folder.has_begun():
            begun = load_config(folder.config, begun=True)
            steps = CheckpointStore(folder.checkpoints, config.checkpoint).steps()
            check_same_run(begun, config.settled(begun), folder, steps[-1] if steps else 0)
    except HeadraceError as error:
        yield Finding("error", "config", str(error))
    yield from preflight.lease_findings(run.folder)
    yield from layout_findings(config, request)
    yield from preflight.data_findings(config.all_stages[-1].data)
    if request.gpus_per_node and not layout_problem(config, request.ranks):
        dp_size = dp_size_of(request.ranks, config.parallel)
        stages = config.all_stages
        largest = max(stages, key=lambda stage: _estimated_bytes(config.workload(dp_size, stage)))
        work = config.workload(dp_size, largest)
        yield from preflight.memory_findings(work, largest.micro_steps(dp_size), hardware.gpu_bytes)
        work, micro_steps = config.workload(dp_size), stages[0].micro_steps(dp_size)
        layout = (request.nodes, request.gpus_per_node)
        yield from preflight.speed_findings(work, micro_steps, train.steps, *layout, hardware)


def _estimated_bytes(work: Workload) -> int:
    """Return the memory that a rank takes; 0 if it is not known."""
    estimate = memory_per_rank(work)
    return estimate.total if estimate else 0


def partition_of(name: str | None) -> tuple[slurm.Partition | None, str]:
    """Return the requested partition, or why no cluster was asked. Raises ConfigError if there is no such partition."""
    if not slurm.has_slurm():
        return None, "there is no sbatch on this machine"
    try:
        return slurm.partition(name), ""
    except slurm.SlurmError as error:
        return None, str(error)


def job_findings(
    request: slurm.JobRequest,
    save: SaveTime,
    partition: slurm.Partition | None,
    silent: str,
    dry_run: bool,
) -> Iterator[Finding]:
    """Yield the findings about the job itself, independent of its runs.

    Args:
        silent: why no cluster was asked, if there is no partition.
    """
    limit = slurm.seconds_of(request.time)
    preemption = (partition.preemption, partition.preemption_grace_seconds) if partition else ("OFF", 0)
    if limit is None:
        text = f"--time={request.time} is not a time; write minutes, hours:minutes:seconds or days-hours"
        yield Finding("error", "time", text)
    else:
        yield from preflight.grace_findings(save, request.grace_seconds, limit, *preemption)
    if partition is None:
        text = f"{silent}: no cluster was asked, and no job can be submitted from here"
        yield Finding("note" if dry_run else "error", "slurm", text)


def sbatch_finding(script: str) -> Finding:
    """Ask sbatch whether it would accept the job."""
    try:
        return Finding("ok", "slurm", slurm.try_out(script))
    except ConfigError as error:
        return Finding("error", "slurm", str(error))
