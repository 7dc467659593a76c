"""Indexes the shards of a run before it reads them: `python launch/index.py --config configs/my-run.yaml`."""

from __future__ import annotations

if __name__ == "__main__":
    from _run import run  # of this folder

    run("index")
