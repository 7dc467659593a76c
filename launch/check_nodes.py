"""Test the nodes of a Slurm job before training starts on them: `srun python launch/check_nodes.py NODES`."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    run_path(str(Path(__file__).with_name("_run.py")))["run"]("check-nodes")
