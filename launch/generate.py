"""Continues prompts with a model: `python launch/generate.py --run runs/x --prompt "The "`."""

from __future__ import annotations

if __name__ == "__main__":
    from _run import run  # of this folder

    run("generate")
