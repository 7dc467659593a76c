"""launch/pretrain.py on a disk that fails one rank: `python -m tests.distributed.faulty FAULTS [its arguments]`.

FAULTS is JSON, a list of [rank, part of a path, what]. What happens at each write there: "kill" the process, wait until
a file named `go-on` stands in the run folder's parent ("wait"), or raise the error of that number.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from pretrain.commands import dispatch
from tests.pretrain.checkpoint.disk import KILLED, Disk, Operation


def main() -> int:
    faults = [(path, what) for rank, path, what in json.loads(sys.argv.pop(1)) if rank == int(os.environ["RANK"])]
    folder = Path(sys.argv[sys.argv.index("--config") + 1]).parent

    def fail(number: int, operation: Operation) -> OSError | None:
        what = next((what for path, what in faults if path in str(operation.path)), None)
        if operation.kind != "write" or what is None:
            return None
        if what == "kill":
            os._exit(KILLED)
        while what == "wait" and not (folder / "go-on").exists():
            time.sleep(0.01)
        return None if what == "wait" else OSError(what, os.strerror(what))

    with pytest.MonkeyPatch.context() as patch:
        Disk(folder, patch, fail)
        return dispatch.run("train", sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
