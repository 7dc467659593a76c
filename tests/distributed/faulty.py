"""A disk that fails one rank of a run."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.pretrain.checkpoint.disk import KILLED, Disk, Operation


def install(rank: int, root: str, faults: Sequence[tuple[int, str, object]]) -> None:
    """Replace this process's disk by one with faults, for everything below a folder.

    Args:
        root: the run folder's parent.
        faults: each with the rank, a part of a path, and what happens at each write there: "kill" the process, "wait"
            until there is a file named `go-on` in `root`, or the number of the error to raise.
    """
    mine = [(path, what) for number, path, what in faults if number == rank]

    def fail(number: int, operation: Operation) -> OSError | None:
        what = next((what for path, what in mine if path in str(operation.path)), None)
        if operation.kind != "write" or what is None:
            return None
        if what == "kill":
            os._exit(KILLED)
        while what == "wait" and not (Path(root) / "go-on").exists():
            time.sleep(0.01)
        return None if what == "wait" else OSError(what, os.strerror(int(str(what))))

    Disk(Path(root), pytest.MonkeyPatch(), fail)
