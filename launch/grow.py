"""Grow a run's model: `python launch/grow.py --run runs/small --config configs/large.yaml --to models/grown`."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    run_path(str(Path(__file__).with_name("_run.py")))["run"]("grow")
