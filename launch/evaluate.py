"""Scores models on held-out text: `python launch/evaluate.py --run runs/x --suite DIR`."""

from __future__ import annotations

if __name__ == "__main__":
    from _run import run  # of this folder

    run("evaluate")
