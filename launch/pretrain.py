"""Train a model, or continue training it: `deepspeed launch/pretrain.py --config configs/quickstart.yaml`."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    run_path(str(Path(__file__).with_name("_run.py")))["run"]("train")
