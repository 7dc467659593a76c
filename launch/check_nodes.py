"""Tries the nodes of a Slurm job before a training starts on them: `srun python launch/check_nodes.py NODES`."""

from __future__ import annotations

if __name__ == "__main__":
    from _run import run  # of this folder

    run("check-nodes")
