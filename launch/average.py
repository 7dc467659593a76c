"""Average checkpoints of a run: `python launch/average.py --run runs/x --steps 800 900 --to models/x`."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    run_path(str(Path(__file__).with_name("_run.py")))["run"]("average")
