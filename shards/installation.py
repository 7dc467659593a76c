"""How this copy of Headrace was installed: its version, and how its commands are typed."""

from __future__ import annotations

import shlex
import tomllib
from importlib import metadata
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]  # of a clone; of a wheel the folder that all packages share
_SCRIPTS = {"train": "pretrain"}  # commands whose script in launch/ has another name


def version() -> str:
    """Return the version that pyproject.toml names, in a clone by reading it, else as pip recorded it.

    A clone is asked first: what pip recorded of it may be older.
    """
    if is_clone():
        return str(tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]["version"])
    return metadata.version("headrace")


def is_clone() -> bool:
    """Tell a clone, which has the scripts in launch/, from a wheel that pip has unpacked."""
    return (_ROOT / "launch" / "pretrain.py").is_file()


def script(command: str) -> Path | None:
    """Return the script of a command such as `train-tokenizer`; a wheel has none."""
    name = _SCRIPTS.get(command, command.replace("-", "_"))
    return _ROOT / "launch" / f"{name}.py" if is_clone() else None


def typed(command: str, *words: str) -> str:
    """Return a command as a user types it in a shell; that of a clone is typed in the clone's root."""
    path = script(command)
    start = ["python", str(path.relative_to(_ROOT))] if path else ["headrace", command]
    return shlex.join([*start, *words])
