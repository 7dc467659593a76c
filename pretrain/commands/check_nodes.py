"""Tries the nodes of a Slurm job before a training starts on them; slurm/pretrain.sbatch runs it, one task a rank.

By hand, in a job of its own: MASTER_ADDR=<first node> MASTER_PORT=12345 srun python launch/check_nodes.py <all nodes>

Exit codes: 0 all is well, 1 a node is not, or the nodes do not reach each other.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.cluster.node_check import Task, check
from shards import HeadraceError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nodes", nargs="+", help="names of the job's nodes, in the order of their ranks")
    parser.add_argument("--run-folder", type=Path, default=Path.cwd(), help="which every node has to see")
    parser.add_argument("--bad-nodes", type=Path, help="write the names of nodes to leave out here, one a line")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    try:
        task = Task.from_environment(os.environ, arguments.nodes)
        problems = check(task, arguments.run_folder)
    except HeadraceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
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


if __name__ == "__main__":
    raise SystemExit(main())
