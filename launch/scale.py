"""Tell a large run from small ones: `python launch/scale.py runs/a runs/b runs/c --config configs/large.yaml`."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    run_path(str(Path(__file__).with_name("_run.py")))["run"]("scale")
