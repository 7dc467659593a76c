"""Trains a model, or continues training it: `deepspeed launch/pretrain.py --config configs/quickstart.yaml`."""

from __future__ import annotations

if __name__ == "__main__":
    from _run import run  # of this folder

    run("train")
