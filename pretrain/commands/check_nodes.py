"""Tries the nodes of a Slurm job before a training starts on them; slurm/pretrain.sbatch runs it, one task a rank.

By hand, in a job of its own: MASTER_ADDR=<first node> MASTER_PORT=12345 srun headrace check-nodes <all nodes>

Exit codes: 0 all is well, 1 a node is not, or the nodes do not reach each other.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from pretrain.cluster.node_check import Task, check


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("nodes", nargs="+", help="names of the job's nodes, in the order of their ranks")
    parser.add_argument("--run-folder", type=Path, default=Path.cwd(), help="a folder that every node has to see")
    parser.add_argument("--bad-nodes", type=Path, help="write the names of nodes to leave out here, one a line")


def run(arguments: argparse.Namespace) -> int:
    """Try the nodes, say what is wrong with them, and return the exit code."""
    task = Task.from_environment(os.environ, arguments.nodes)
    problems = check(task, arguments.run_folder)
    if task.rank == 0:
        for node, problem in problems.items():
            print(f"{node}: {problem}")
        if not problems:
            print(f"{len(task.nodes)} nodes, {task.world_size} ranks: fine, alone and together")
        elif len(problems) == len(task.nodes) > 1:
            print("every node has a problem, so none is left out: look for what they share")
        elif arguments.bad_nodes:
            arguments.bad_nodes.write_text("".join(f"{node}\n" for node in problems))
    return 1 if problems else 0
