"""Run a command: `python -m pretrain train ...` does what `headrace train ...` does."""

from __future__ import annotations

import sys

from pretrain.commands.dispatch import main

if __name__ == "__main__":
    sys.exit(main())
