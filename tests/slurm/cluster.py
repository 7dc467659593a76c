"""A Slurm cluster of several nodes on this host: munged, slurmctld, and a slurmd for each node, without systemd.

Everything is in one folder and listens on free ports of 127.0.0.1, and jobs are numbered from a start of the cluster's
own, from which the ports of their ranks follow, so two clusters do not collide.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from getpass import getuser
from pathlib import Path

import psutil

from pretrain.topology import free_port

DAEMONS = ("munged", "slurmctld", "slurmd")
GPUS = 2  # of each node; they are copies of /dev/null
CPUS = 8
PATIENCE = 120.0  # seconds

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MinJobAge=3600
FirstJobId={first_job}
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=10 PreemptMode=off
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
"""


class Cluster:
    """A running cluster: `with Cluster(folder, ["node1", "node2"]) as cluster`."""

    def __init__(self, folder: Path, nodes: list[str]) -> None:
        self.folder = folder
        self.nodes = nodes
        self.config = folder / "slurm.conf"
        self.environment = {**os.environ, "SLURM_CONF": str(self.config)}

    def __enter__(self) -> Cluster:
        self._configure()
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _configure(self) -> None:
        gpus = [self.folder / f"gpu{number}" for number in range(GPUS)]
        for gpu in gpus:
            if os.geteuid() == 0:
                os.mknod(gpu, 0o020666, os.makedev(1, 3))  # a second /dev/null
            else:
                gpu.touch()
        host = socket.gethostname().partition(".")[0]
        nodes = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()}"
            f" CPUs={CPUS} RealMemory=8000 Gres=gpu:{GPUS} State=UNKNOWN"
            for node in self.nodes
        ]
        for name in ("state", *(f"spool/{node}" for node in self.nodes)):
            self.folder.joinpath(name).mkdir(parents=True)
        port = free_port()
        values = {"host": host, "port": port, "first_job": port, "user": getuser(), "folder": self.folder}
        self.config.write_text(CONFIG.format(**values, nodes="\n".join(nodes)))
        gres = [f"NodeName={node} Name=gpu File={','.join(map(str, gpus))}\n" for node in self.nodes]
        self.folder.joinpath("gres.conf").write_text("".join(gres))

    def _start(self) -> None:
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        files = {"key-file": "munge.key", "socket": "munge.socket", "log-file": "munge.log", "pid-file": "munged.pid"}
        options = [f"--{option}={self.folder / name}" for option, name in files.items()]
        # --force, since it requires every folder above its own to be open to all users.
        self._run("munged", *options, f"--seed-file={self.folder}/munge.seed", "--force")
        self._run("slurmctld", "-f", str(self.config))
        for node in self.nodes:
            self.start_node(node)

    def start_node(self, node: str) -> None:
        """Start a node's daemon, and wait until the cluster counts on it."""
        self._run("slurmd", "-N", node, "-f", str(self.config))
        silent = re.compile(r"unk|\*")
        wait_for(lambda: not silent.search(self.ask("sinfo", "-hN", "-n", node, "-o", "%t")), f"{node} answers")

    def lose_node(self, node: str) -> None:
        """Lose a node as in a power cut: nothing runs there any more, and the cluster has noticed."""
        self._daemon(f"slurmd-{node}.pid").kill()
        self.ask("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")
        for process in self.processes(SLURMD_NODENAME=node):
            for there in (process.parent(), process):  # the slurmstepd that would report a task's end, then the task
                if there is not None and (there is process or there.name() == "slurmstepd"):
                    _end(there)

    def ask(self, *command: str) -> str:
        """Return the output of one of Slurm's commands."""
        ran = subprocess.run(
            command, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, f"{' '.join(command)}: {ran.stdout}{ran.stderr}"
        return ran.stdout

    def job(self, job: str) -> dict[str, str]:
        """Return the fields of a job, as `scontrol show job` prints them."""
        words = self.ask("scontrol", "show", "job", "-o", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_state(self, job: str, *states: str) -> None:
        described = f"job {job} is {' or '.join(states)}"
        wait_for(lambda: self.job(job)["JobState"] in states, described, lambda: self.job(job))

    def processes(self, **environment: str) -> list[psutil.Process]:
        """Return the processes of this cluster's jobs whose environment has these values."""
        wanted = {**environment, "SLURM_CONF": str(self.config)}.items()
        here = [process for process in psutil.process_iter() if wanted <= environment_of(process).items()]
        return [process for process in here if process.pid != os.getpid()]

    def _run(self, daemon: str, *arguments: str) -> None:
        path = executable(daemon)
        assert path is not None
        self.ask(path, *arguments)

    def _daemon(self, pid_file: str) -> psutil.Process:
        return psutil.Process(int((self.folder / pid_file).read_text()))

    def __exit__(self, *_: object) -> None:
        """End the jobs and the daemons, each by its id, and whatever they left behind."""
        for pid_file in ("slurmctld.pid", *(f"slurmd-{node}.pid" for node in self.nodes), "munged.pid"):
            if (self.folder / pid_file).exists():
                _end(self._daemon(pid_file))
        # slurmstepd outlives its daemon and forgets its environment, but stays in the daemon's folder.
        for process in [*self.processes(), *(p for p in psutil.process_iter() if _folder_of(p) == self.folder)]:
            _end(process)


def executable(daemon: str) -> str | None:
    """Return the path of an installed daemon; None if it is not installed."""
    return shutil.which(daemon, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))


def environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def _folder_of(process: psutil.Process) -> Path | None:
    try:
        return Path(process.cwd())
    except (psutil.Error, OSError):
        return None


def _end(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()  # there is nothing to save
        process.wait(10)


def wait_for(what: Callable[[], bool], described: str, otherwise: Callable[[], object] = str) -> None:
    """Wait until a condition holds; if it never does, report the actual state."""
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end, f"not within {PATIENCE:.0f} s: {described}; {otherwise()}"
        time.sleep(0.1)
