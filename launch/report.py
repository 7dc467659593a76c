"""Make one page about runs: `python launch/report.py runs/a --to report.html`."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    run_path(str(Path(__file__).with_name("_run.py")))["run"]("report")
