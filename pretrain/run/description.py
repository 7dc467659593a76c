"""Describe what a run was trained with and on: its config, program, libraries and data. assembly -> wandb_tracker."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

import msgspec

from pretrain.run.run_folder import Ancestor
from shards import __version__, installation


def describe(
    config: Mapping[str, object],
    config_hash: str,
    fingerprint: Mapping[str, object],
    init_hash: str,
    ancestors: Sequence[Ancestor] = (),
) -> dict[str, object]:
    """Return the wandb run's description: the config, and what the run was trained with and on.

    Args:
        config: the whole config, as JSON-able values.
        fingerprint: fingerprint of the data.
        init_hash: hash of the files with the initial weights; empty if they were drawn.
        ancestors: the runs that this one was forked from.
    """
    packages = ("torch", "deepspeed", "fairscale", "sentencepiece", "zstandard")
    provenance = {
        "version": __version__,
        "git_commit": git_commit(),
        "config_hash": config_hash,
        "data": fingerprint,
        "init_hash": init_hash,
        "ancestors": msgspec.to_builtins(ancestors),
        "packages": {name: version(name) for name in packages},
    }
    return {**config, "provenance": provenance}


@cache
def git_commit() -> str:
    """Return the commit that this program was started from, with "+" if files differ; empty outside a clone.

    The answer is that of the first call: later, files may be others than those that were imported.
    """
    if not installation.is_clone():
        return ""  # a wheel may be unpacked inside another project's repository
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit + "+" * bool(changed)
