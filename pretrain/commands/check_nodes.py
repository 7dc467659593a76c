"""Test the nodes of a Slurm job before training starts on them; slurm/pretrain.sbatch runs one task per rank.

By hand, in a separate job: MASTER_ADDR=<first node> MASTER_PORT=12345 srun headrace check-nodes <all nodes>

Exit codes: 0 all is well, 1 a node is faulty or the nodes cannot reach each other.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from pretrain.cluster.node_check import Task, check


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("nodes", nargs="+", help="names of the job's nodes, in the order of their ranks")
    parser.add_argument("--run-folder", type=Path, default=Path.cwd(), help="a folder that every node must see")
    parser.add_argument("--bad-nodes", type=Path, help="file to write the names of nodes to exclude to, one per line")


def run(arguments: argparse.Namespace) -> int:
    """Test the nodes, print what is wrong with them, and return the exit code."""
    task = Task.from_environment(os.environ, arguments.nodes)
    problems = check(task, arguments.run_folder)
    if task.rank == 0:
        for node, problem in problems.items():
            print(f"{node}: {problem}")
        if not problems:
            print(f"{len(task.nodes)} nodes, {task.world_size} ranks: fine, alone and together")
        elif len(problems) == len(task.nodes) > 1:
            print("every node has a problem, so none is excluded: look for a common cause")
        elif arguments.bad_nodes:
            arguments.bad_nodes.write_text("".join(f"{node}\n" for node in problems))
    return 1 if problems else 0
