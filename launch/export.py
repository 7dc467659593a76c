"""Writes a run's model for other programs: `python launch/export.py --run runs/x --to models/x`."""

from __future__ import annotations

if __name__ == "__main__":
    from _run import run  # of this folder

    run("export")
