"""Submit a run to Slurm: `python launch/submit.py --config FILE --nodes 4 --gpus-per-node 8 --time 24:00:00`."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    run_path(str(Path(__file__).with_name("_run.py")))["run"]("submit")
