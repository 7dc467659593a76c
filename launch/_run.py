"""Start the command that a script in this folder names.

Python puts a script's folder first on sys.path, where `import pretrain` would find pretrain.py instead of the package;
the clone's root takes that place.
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

    sys.exit(dispatch.run_program(command, sys.argv[1:]))
