"""Find out when a run was trained on a text: `python launch/exposure.py --run runs/a --text "..."`."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    run_path(str(Path(__file__).with_name("_run.py")))["run"]("exposure")
