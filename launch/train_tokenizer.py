"""Train a tokenizer: `python launch/train_tokenizer.py PATTERN --vocab-size 4096 --out FILE`."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    run_path(str(Path(__file__).with_name("_run.py")))["run"]("train-tokenizer")
