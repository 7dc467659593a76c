"""Starts the command of a script in this folder, which Python has put first on sys.path.

There, `pretrain` would be the script of that name and not the package, so the clone's root takes the folder's place.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn


def run(command: str) -> NoReturn:
    """Run a command with the words on the command line, and exit with its code."""
    folder = Path(__file__).resolve().parent
    sys.path[:] = [str(folder.parent), *(path for path in sys.path if path != str(folder))]
    from pretrain.commands import dispatch

    sys.exit(dispatch.run(command, sys.argv[1:]))
