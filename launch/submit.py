"""Submits a run to Slurm: `python launch/submit.py --config FILE --nodes 4 --gpus-per-node 8 --time 24:00:00`."""

from __future__ import annotations

if __name__ == "__main__":
    from _run import run  # of this folder

    run("submit")
