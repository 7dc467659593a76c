"""Slurm's side of submitting a run: a job script from a template, a sweep's tasks, facts about a partition.

{request, template} -> job script -> sbatch. The templates in slurm/ are complete scripts that also work by hand; only
their `#SBATCH` lines and the settings at their top are filled in here.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.config_file import read_tree
from shards import ConfigError, HeadraceError

_DIRECTIVE = re.compile(r"#SBATCH --(?P<key>[a-z-]+)(=(?P<value>\S+))?(?P<comment>\s+#.*)?")
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})")
_NO_NAME = re.compile(r"[^A-Za-z0-9._]+")
_MAX_NAME = 120  # characters of a sweep's run.name; file systems allow 255


class SlurmError(HeadraceError):
    """Slurm's commands exist, but no cluster responds to them."""


@dataclass(frozen=True)
class JobRequest:
    """A job to request from Slurm.

    Attributes:
        name: the job's name in squeue.
        nodes: number of nodes.
        gpus_per_node: also the number of ranks per node; 0 for one CPU rank per node.
        cpus_per_task: cores of one rank, including its loader's workers.
        time: limit of one start, in sbatch's format.
        grace_seconds: how long before the limit the ranks are asked to save.
        output: file for the script's own output; may use sbatch's %-patterns.
        chdir: the script's working directory, to which relative paths refer.
        after: id of a job that must succeed first.
        tasks: number of tasks of a job array; None for a single job.
        options: further sbatch options, as `--key=value` or `--key`.
    """

    name: str
    nodes: int
    gpus_per_node: int
    cpus_per_task: int
    time: str
    grace_seconds: int
    output: str
    chdir: Path
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    after: str | None = None
    tasks: int | None = None
    options: tuple[str, ...] = ()

    @property
    def ranks_per_node(self) -> int:
        return self.gpus_per_node or 1

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    def directives(self) -> dict[str, str | None]:
        """Return the `#SBATCH` lines by key; None removes a key from the template."""
        options = dict(_option(option) for option in self.options)
        return {
            "job-name": self.name,
            "nodes": str(self.nodes),
            "ntasks-per-node": str(self.ranks_per_node),
            "gpus-per-node": str(self.gpus_per_node) if self.gpus_per_node else None,
            "cpus-per-task": str(self.cpus_per_task),
            "time": self.time,
            "signal": f"B:USR1@{self.grace_seconds}",
            "requeue": "",
            "open-mode": "append",
            "output": self.output,
            "chdir": str(self.chdir),
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "array": f"0-{self.tasks - 1}" if self.tasks else None,
            # afterok, since a job needs its predecessor's results; without the next line a job would wait forever if
            # its predecessor failed.
            "dependency": f"afterok:{self.after}" if self.after else None,
            "kill-on-invalid-dep": "yes" if self.after else None,
            **options,
        }


def _option(option: str) -> tuple[str, str]:
    key, _, value = option.removeprefix("--").partition("=")
    if not option.startswith("--") or not re.fullmatch(r"[a-z][a-z-]*", key) or re.search(r"\s", value):
        raise ConfigError(f"--sbatch={option} is not an sbatch option; write for example --sbatch=--mem=0")
    return key, value


def job_script(template: str, directives: Mapping[str, str | None], settings: Mapping[str, str]) -> str:
    """Fill in the `#SBATCH` lines and settings of a template, keeping the comments beside them.

    Args:
        directives: value by key; "" for a key without a value, None for a line to remove.
        settings: shell text, by the name of a variable that the template assigns at the start of a line.
    """
    left, unset = dict(directives), dict(settings)
    lines: list[str] = []
    end = 0  # end of the #SBATCH lines, where missing ones are added
    for line in template.splitlines():
        name = line.partition("=")[0]
        if match := _DIRECTIVE.fullmatch(line):
            key = match["key"]
            value = left.pop(key, match["value"] or "")
            if value is not None:
                lines.append(_directive(key, value) + (match["comment"] or ""))
            end = len(lines)
        elif name in unset and line.startswith(f"{name}="):
            value, *below = unset.pop(name).splitlines()
            lines += [f"{name}={value}{_comment(line)}", *below]
        else:
            lines.append(line)
    assert not unset, f"the template does not assign {', '.join(unset)}"
    lines[end:end] = [_directive(key, value) for key, value in left.items() if value is not None]
    return "\n".join(lines) + "\n"


def _directive(key: str, value: str) -> str:
    return f"#SBATCH --{key}={shlex.quote(value)}" if value else f"#SBATCH --{key}"


def _comment(line: str) -> str:
    _, hash_sign, text = line.partition(" # ")
    return f"  # {text}" if hash_sign else ""


def shell_words(words: Sequence[str]) -> str:
    """Quote words for a shell."""
    return " ".join(shlex.quote(word) for word in words)


@dataclass(frozen=True)
class SweepTask:
    """One run of a sweep: the suffix of its name, and its overrides."""

    suffix: str
    overrides: tuple[str, ...]


def read_sweep(path: Path) -> list[SweepTask]:
    """Read a YAML file that lists values for each key into a grid; the last key varies fastest.

    Raises:
        ConfigError: if a key has no list or sets the run's name, or two runs would have the same name.
    """
    tree, origins = read_tree(path)
    if not tree:
        raise ConfigError(f"{path}: empty; write, for example, optim.learning_rate: [1e-3, 3e-3]")
    for key, values in tree.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{origins[key]}: {key} is {values!r}; a sweep needs a list of values for each key")
        if key in ("run.name", "run.dir"):
            raise ConfigError(f"{origins[key]}: {key} is set by the sweep itself; change it in the config instead")
    tasks = []
    for values in itertools.product(*tree.values()):
        chosen = dict(zip(tree, values, strict=True))
        overrides = tuple(f"{key}={json.dumps(value)}" for key, value in chosen.items())
        suffix = "-".join(
            _NO_NAME.sub("-", f"{key.rpartition('.')[2]}-{value}").strip("-") for key, value in chosen.items()
        )
        tasks.append(SweepTask(suffix, overrides))
    suffixes = [task.suffix for task in tasks]
    for suffix in suffixes:
        if suffixes.count(suffix) > 1 or len(suffix) > _MAX_NAME:
            raise ConfigError(f"{path}: each run is named after its keys and values, but {suffix!r} is not a name")
    return tasks


def seconds_of(time: str) -> int | None:
    """Read a time limit in sbatch's formats: minutes, m:s, h:m:s, d-h, d-h:m or d-h:m:s; None for anything else."""
    match = _TIME.fullmatch(time)
    if match is None:
        return None
    numbers = [int(number) for number in match["clock"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
        return ((int(match["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(numbers) == 3:
        return (numbers[0] * 60 + numbers[1]) * 60 + numbers[2]
    return numbers[0] * 60 + (numbers[1] if len(numbers) == 2 else 0)


@dataclass(frozen=True)
class Partition:
    """A partition's GPUs and its preemption rules.

    Attributes:
        gpu_types: as named in the cluster's gres.conf, in lower case.
        preemption: REQUEUE, CANCEL, SUSPEND, ... or OFF.
        preemption_grace_seconds: between the warning and the end.
    """

    name: str
    gpu_types: frozenset[str]
    preemption: str
    preemption_grace_seconds: int


def has_slurm() -> bool:
    return shutil.which("sbatch") is not None


def partition(name: str | None) -> Partition:
    """Ask Slurm about a partition, by default its default one.

    Raises:
        ConfigError: if there is no such partition.
        SlurmError: if no cluster responds.
    """
    found = [dict(_fields(line)) for line in _slurm("scontrol", "show", "partition", "--oneliner").splitlines()]
    chosen = [p for p in found if p["PartitionName"] == name or (name is None and p.get("Default") == "YES")]
    if not chosen:
        names = ", ".join(p["PartitionName"] for p in found)
        raise ConfigError(f"--partition={name}: there is no such partition; choose from {names}")
    fields = chosen[0]
    gres = _slurm("sinfo", "--noheader", "--partition", fields["PartitionName"], "--format=%G")
    return Partition(
        name=fields["PartitionName"],
        gpu_types=frozenset(re.findall(r"gpu:([a-z][\w.-]*):\d", gres.lower())),
        preemption=fields.get("PreemptMode", "OFF"),
        preemption_grace_seconds=int(fields.get("GraceTime", "0")),
    )


def _fields(line: str) -> list[tuple[str, str]]:
    pairs = (word.partition("=") for word in line.split())
    return [(key, value) for key, _, value in pairs]


def try_out(script: str) -> str:
    """Ask Slurm when and where it would start a job now. Raises ConfigError if it would refuse the job."""
    return _sbatch(script, "--test-only").stderr.strip().removeprefix("sbatch: ")


def submit(script: str) -> str:
    """Hand a script to sbatch and return the job's id. Raises ConfigError if sbatch refuses it."""
    return _sbatch(script, "--parsable").stdout.strip().partition(";")[0]


def _sbatch(script: str, option: str) -> subprocess.CompletedProcess[str]:
    # sbatch passes its environment on to the job, whose ranks would then train on CPUs as this command does.
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    ran = subprocess.run(["sbatch", option], input=script, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise ConfigError(f"sbatch refuses the job: {ran.stderr.strip()}")
    return ran


def _slurm(*command: str) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SlurmError(ran.stderr.strip().rpartition("\n")[2])
    return ran.stdout
