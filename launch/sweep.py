"""Train a sweep on this machine: `python launch/sweep.py sweep.yaml --config FILE --jobs 2`."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    run_path(str(Path(__file__).with_name("_run.py")))["run"]("sweep")
