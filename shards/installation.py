"""How the commands of this copy of Headrace are typed, in a clone or installed from a wheel."""

from __future__ import annotations

import shlex
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]  # the clone's root; in a wheel, the folder that all packages share
_SCRIPTS = {"train": "pretrain"}  # commands whose scripts in launch/ have other names


def is_clone() -> bool:
    """Return whether this is a clone, which has the scripts in launch/, not a wheel that pip unpacked."""
    return (_ROOT / "launch" / "pretrain.py").is_file()


def script(command: str) -> Path | None:
    """Return the script of a command such as `train-tokenizer`; a wheel has none, nor has a clone for `sample`."""
    path = _ROOT / "launch" / f"{_SCRIPTS.get(command, command.replace('-', '_'))}.py"
    return path if is_clone() and path.is_file() else None


def typed(command: str, *words: str) -> str:
    """Return a command as a user types it in a shell, for a clone in its root."""
    path = script(command)
    start = ["python", str(path.relative_to(_ROOT))] if path else ["headrace", command]
    return shlex.join([*start, *words])
