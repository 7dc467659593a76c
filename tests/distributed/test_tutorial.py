"""Every command in docs/tutorial.md runs, from top to bottom, and prints what the page shows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.topology import free_port
from tests.pages import blocks, unprinted

ROOT = Path(__file__).parents[2]
FOLDERS = ("configs", "launch", "pretrain", "shards")  # the parts of a clone that the page needs


@pytest.mark.distributed
def test_the_commands_of_the_tutorial(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in FOLDERS:
        (clone / name).symlink_to(ROOT / name)
    installed = Path(sys.executable).parent
    # The page's commands use the launcher's default port, which another test may be using.
    launcher = tmp_path / "bin" / "deepspeed"
    launcher.parent.mkdir()
    launcher.write_text(f'#!/bin/sh\nexec "{installed}/deepspeed" --master_port {free_port()} "$@"\n')
    launcher.chmod(0o755)
    path = os.pathsep.join([str(launcher.parent), str(installed), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    printed, ran = "", 0
    for block in blocks("tutorial.md"):
        where = f"docs/tutorial.md, line {block.line}"
        if block.language == "bash":
            command = ["bash", "-euo", "pipefail", "-c", block.text]
            done = subprocess.run(command, cwd=clone, env=environment, text=True, capture_output=True, timeout=600)
            printed, ran = done.stdout + done.stderr, ran + 1
            assert done.returncode == 0, f"{where}: {printed}"
        else:
            missing = unprinted(block.text, printed)
            assert not missing, f"{where}: {missing} not in: {printed}"
    assert ran == 11
    assert (clone / "models/tutorial/config.json").exists()
