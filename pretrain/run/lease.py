"""Keep a second live process out of a run folder, on one host or on many. start -> lease -> save.

The lease is a file that names its holder; its modification time is the holder's heartbeat. No operating system lock is
involved, since `flock` and process ids mean nothing on another node. To take over a dead lease, a process first claims
the succession by creating a file that only one process can create, and then renames its own lease over the old one. A
holder that was silent for too long and comes back finds another file in its place.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import socket
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType

import msgspec
import psutil

from shards import HeadraceError

_logger = logging.getLogger(__name__)

_HEARTBEAT_SECONDS = 15.0  # between heartbeats
_SILENCE_SECONDS = 120.0  # after which the holder is presumed dead: eight missed heartbeats


class Holder(msgspec.Struct, frozen=True):
    """The process that holds a lease, described so that another process can check on it."""

    token: str  # distinguishes this lease from every other
    job_id: str | None  # Slurm's job id; a requeued job keeps it
    host: str
    pid_space: str  # boot and pid namespace, outside which process ids mean nothing
    pid: int
    started: float  # seconds since the epoch, since process ids are reused

    @classmethod
    def me(cls, job_id: str | None) -> Holder:
        pid = os.getpid()
        started = psutil.Process(pid).create_time()
        return cls(secrets.token_hex(8), job_id, socket.gethostname(), _pid_space(), pid, started)

    def __str__(self) -> str:
        job = f"job {self.job_id}, " if self.job_id else ""
        return f"{job}process {self.pid} on {self.host}"

    def is_alive(self) -> bool | None:
        """Return whether the holder's process is still running; None if that cannot be determined from here."""
        if self.host != socket.gethostname() or self.pid_space != _pid_space():
            return None
        try:
            process = psutil.Process(self.pid)
            # Compare within a second: the kernel counts ticks from the boot, whose time is adjusted with the clock.
            same = abs(process.create_time() - self.started) < 1.0
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def _pid_space() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""  # not Linux; the host's name has to suffice


class Lease:
    """A held lease: `with Lease(folder.lease, job_id) as lease: ... lease.check()`."""

    def __init__(
        self,
        path: Path,
        job_id: str | None = None,
        heartbeat: float = _HEARTBEAT_SECONDS,
        silence: float = _SILENCE_SECONDS,
    ):
        """Prepare a lease on a file; `with` takes it.

        Args:
            path: the lease file.
            job_id: SLURM_JOB_ID, if any; the same job takes over its own lease at once.
            heartbeat, silence: in seconds; changed only by tests.
        """
        self.path = path
        self._me = Holder.me(job_id)
        self._heartbeat = heartbeat
        self._silence = silence
        self._descriptor = -1
        self._last_sign = 0.0  # time.monotonic()
        self._lost_to: str | None = None
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        """Take the lease: at once if it is free or its holder is gone; if that cannot be determined, after its silence.

        Raises:
            HeadraceError: if its holder is alive; the message names the holder.
        """
        while not (self._create() or self._succeed()):
            time.sleep(self._heartbeat / 10)
        self._last_sign = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._released.set()
        self._thread.join()
        # A lease that cannot be removed gives no more heartbeats, which frees it too.
        with contextlib.suppress(OSError):
            if self._is_mine():
                self.path.unlink()
        os.close(self._descriptor)

    def check(self) -> None:
        """Check that the lease is still held; this costs nothing while heartbeats succeed.

        Raises:
            HeadraceError: if another process has taken over the lease, as it may after a long suspension of this one.
        """
        # This process may have been suspended, and the thread may not have looked yet.
        if time.monotonic() - self._last_sign > 3 * self._heartbeat:
            self._give_sign()
        if self._lost_to is not None:
            raise HeadraceError(
                f"lost {self.path} to {self._lost_to}: this process was silent for too long; it stops without writing"
            )

    def is_free(self) -> bool:
        """Return whether no process is working in the folder, as far as can be determined; do not take the lease."""
        found = self._look()
        return found is None or self._is_free(*found)

    def _create(self) -> bool:
        """Create the lease if nobody holds it; return whether that succeeded."""
        try:
            self._descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        except FileExistsError:
            return False
        self._sign_it()
        return True

    def _sign_it(self) -> None:
        os.write(self._descriptor, msgspec.json.encode(self._me) + b"\n")
        os.fsync(self._descriptor)

    def _succeed(self) -> bool:
        """Wait until the holder is known to be alive, which is an error, or gone; then take over from it.

        Returns:
            False if the lease was released meanwhile, or another contender was faster.
        """
        announced = False
        youngest = math.inf
        while (found := self._look()) is not None:
            holder, age = found
            if self._is_free(holder, age):
                return self._take_over(holder)
            if (
                holder and holder.is_alive()
            ) or age < youngest < math.inf:  # its heartbeat advanced since we began to look
                raise HeadraceError(
                    f"the run folder {self.path.parent} is in use by {holder or 'another process'} "
                    f"(last sign of life {age:.0f} s ago); stop that one first, or give this run another run.name"
                )
            if not announced:
                _logger.warning(
                    "%s is held by %s, silent for %.0f s; waiting for a sign of life, at most %.0f s",
                    self.path, holder or "an unknown process", age, self._silence - age,
                )  # fmt: skip
                announced = True
            youngest = age
            time.sleep(min(1.0, self._heartbeat / 4))
        return False

    def _is_free(self, holder: Holder | None, age: float) -> bool:
        """Return whether a lease may be taken over: its holder is gone, silent, or an earlier start of the same job."""
        alive = holder.is_alive() if holder else None
        own_job = holder is not None and holder.job_id is not None and holder.job_id == self._me.job_id
        return alive is False or (alive is None and own_job) or age >= self._silence

    def _take_over(self, judged: Holder | None) -> bool:
        claim = self.path.with_name(f".lease-after-{judged.token if judged else 'unreadable'}")
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                if self._age(claim.stat().st_mtime) >= self._silence:  # the claimant died right after claiming
                    claim.unlink()
            return False
        try:
            # Only now is it certain that nobody else takes over from this holder, so check again who holds it.
            found = self._look()
            if found is None or found[0] != judged or not self._is_free(*found):
                return False
            mine = self.path.with_name(f".lease-{self._me.token}")
            self._descriptor = os.open(mine, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
            self._sign_it()
            mine.replace(self.path)
            _logger.info("took over %s from %s", self.path, judged or "an unknown process")
            return True
        finally:
            claim.unlink()

    def _look(self) -> tuple[Holder | None, float] | None:
        """Return the holder, None if unreadable, and the seconds since its heartbeat; None if there is no lease."""
        try:
            with self.path.open("rb") as file:  # reopened each time, since NFS asks the server only on opening
                content = file.read()
                age = self._age(os.fstat(file.fileno()).st_mtime)
        except FileNotFoundError:
            return None
        try:
            return msgspec.json.decode(content, type=Holder), age
        except msgspec.DecodeError:  # its writer was killed, or is between two calls
            return None, age

    def _age(self, modified: float) -> float:
        """Return the seconds since a file was modified, by the file system's clock, since nodes' clocks may differ."""
        with tempfile.NamedTemporaryFile(dir=self.path.parent, prefix=".lease-clock-") as clock:
            clock.write(b"?")
            clock.flush()
            return max(0.0, os.fstat(clock.fileno()).st_mtime - modified)

    def _is_mine(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def _give_sign(self) -> None:
        try:
            # Through the open file, not by its name: a lease that was taken over must not be touched.
            os.utime(self._descriptor)
            mine = self._is_mine()
        except OSError as error:
            _logger.warning("could not write a sign of life to %s: %s", self.path, error)
            mine = time.monotonic() - self._last_sign < self._silence
        else:
            self._last_sign = time.monotonic() if mine else self._last_sign
        if not mine:
            found = self._look()
            self._lost_to = str((found and found[0]) or "an unknown process")

    def _beat(self) -> None:
        while not self._released.wait(self._heartbeat) and self._lost_to is None:
            self._give_sign()
