"""Train an interval of a run again: `python launch/audit.py --run runs/a --from-step 88000 --steps 20`."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    run_path(str(Path(__file__).with_name("_run.py")))["run"]("audit")
