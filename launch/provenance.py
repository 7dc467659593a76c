"""Names every document of a step: `python launch/provenance.py --run runs/quickstart --step 300`."""

from __future__ import annotations

if __name__ == "__main__":
    from _run import run  # of this folder

    run("provenance")
