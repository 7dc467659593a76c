"""Begin a run from a checkpoint of another: `python launch/fork.py --run runs/a --step 90000 --name b`."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    run_path(str(Path(__file__).with_name("_run.py")))["run"]("fork")
