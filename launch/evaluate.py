"""Score models on held-out text: `python launch/evaluate.py --run runs/x --suite DIR`."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    run_path(str(Path(__file__).with_name("_run.py")))["run"]("evaluate")
