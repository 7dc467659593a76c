"""Let the ranks wait while rank 0 prepares the data, for as long as it makes progress. start -> startup_barrier.

A plain rendezvous gives up after a fixed time. It cannot tell a rank 0 that indexes a large corpus from one that hangs,
and does not tell the other ranks that rank 0 was refused.
"""

from __future__ import annotations

import contextlib
import os
import time
from datetime import timedelta
from types import TracebackType

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from pretrain.faults.interrupt import STOPPED, Stopped
from pretrain.topology import launcher_environment
from shards import ConfigError, HeadraceError

_LOOK_SECONDS = 0.5  # between checks of rank 0's progress, and between its signs of progress
_FIRST_LOOK_SECONDS = 0.02  # until the first check, since most starts are ready at once
_FAREWELL_SECONDS = 10.0  # that a refused rank 0 stays, so that the others learn of it
_READY = "0"


class StartupBarrier:
    """The store from which the process groups are later formed. Every rank of a start enters it; rank 0 hosts it.

    Args:
        timeout_minutes: how long the others wait without progress, and for rank 0 to open the store.
    Attributes:
        is_host: whether this process is rank 0.
        store: for `topology.started`.
    """

    def __init__(self, timeout_minutes: float) -> None:
        os.environ.update(launcher_environment(os.environ))
        self._patience = timedelta(minutes=timeout_minutes)
        self._world_size = int(os.environ["WORLD_SIZE"])
        self._last_sign = 0.0  # time.monotonic()
        self.is_host = os.environ["RANK"] == "0"
        self.store: Store

    def __enter__(self) -> StartupBarrier:
        """Open the store without waiting for ranks that have not arrived yet."""
        # Under torchrun, its agent has already opened the port.
        opens_port = self.is_host and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self.store = TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), self._world_size, opens_port,
            self._patience, wait_for_workers=False, multi_tenant=True,
        )  # fmt: skip
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # an agent's store outlives the ranks
        self.store = PrefixStore(f"headrace/{attempt}", self.store)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tell the other ranks, on rank 0, how its preparations ended."""
        if not self.is_host:
            return
        code = error.exit_code if isinstance(error, HeadraceError) else STOPPED if isinstance(error, Stopped) else 1
        self.store.set("outcome", str(code) if error else _READY)
        deadline = time.monotonic() + _FAREWELL_SECONDS
        with contextlib.suppress(DistError):
            while error and self.store.add("heard", 0) < self._world_size - 1 and time.monotonic() < deadline:
                time.sleep(0.05)

    def advance(self) -> None:
        """Give a sign of progress, on rank 0; any thread may call it, as often as it likes."""
        if time.monotonic() - self._last_sign >= _LOOK_SECONDS:
            self._last_sign = time.monotonic()
            self.store.add("signs", 1)

    def wait(self) -> None:
        """Wait, on any other rank, until rank 0 is ready, as long as it makes progress.

        Raises:
            HeadraceError: if it makes none for `timeout_minutes`, or could not start; then with the same exit code.
            Stopped: if a signal ended rank 0's start.
        """
        signs, since, pause = 0, time.monotonic(), _FIRST_LOOK_SECONDS
        while not self.store.check(["outcome"]):
            time.sleep(pause)
            pause = min(2 * pause, _LOOK_SECONDS)
            if (seen := self.store.add("signs", 0)) != signs:
                signs, since = seen, time.monotonic()
            elif time.monotonic() - since > self._patience.total_seconds():
                minutes = self._patience.total_seconds() / 60
                raise HeadraceError(
                    f"rank 0 has shown no progress for parallel.timeout_minutes={minutes:g} while preparing the data;"
                    " see its log"
                )
        outcome = self.store.get("outcome").decode()
        self.store.add("heard", 1)
        if outcome == _READY:
            return
        if outcome == str(STOPPED):
            raise Stopped
        refused = ConfigError if outcome == str(ConfigError.exit_code) else HeadraceError
        raise refused("rank 0 could not start; its message says why")
