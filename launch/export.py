"""Export a run's model for other programs: `python launch/export.py --run runs/x --to models/x`."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    run_path(str(Path(__file__).with_name("_run.py")))["run"]("export")
