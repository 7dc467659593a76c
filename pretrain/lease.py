"""Keeps two live processes off one run folder, on one host or on many. run_folder -> lease -> loop.

The lease is a file that names its holder; its modification time is the holder's sign of life. No lock of the operating
system is involved, since `flock` and process ids mean nothing on another node. A take-over moves the old file away by a
rename, which one contender alone can do, and creates the new one exclusively; a holder that has lost its lease finds
another file in its place.
"""

from __future__ import annotations

import contextlib
import logging
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

HEARTBEAT_SECONDS = 15.0  # between two signs of life
SILENCE_SECONDS = 120.0  # after which the holder counts as dead: eight missed signs


class Holder(msgspec.Struct, frozen=True):
    """Who holds a lease, as far as another process can check it."""

    token: str  # tells this lease from every other
    job_id: str | None  # of Slurm; a requeued job keeps its id
    host: str
    pid_space: str  # boot and pid namespace: only within one do process ids mean the same
    pid: int
    started: float  # seconds since the epoch, of the process: a process id comes round again

    @classmethod
    def me(cls, job_id: str | None) -> Holder:
        pid = os.getpid()
        started = psutil.Process(pid).create_time()
        return cls(secrets.token_hex(8), job_id, socket.gethostname(), _pid_space(), pid, started)

    def __str__(self) -> str:
        job = f"job {self.job_id}, " if self.job_id else ""
        return f"{job}process {self.pid} on {self.host}"

    def is_alive(self) -> bool | None:
        """Whether the holder's process still runs; None if that cannot be seen from here."""
        if self.host != socket.gethostname() or self.pid_space != _pid_space():
            return None
        try:
            process = psutil.Process(self.pid)
            # Within a second: the kernel counts ticks from the boot, whose time is adjusted with the clock
            same = abs(process.create_time() - self.started) < 1.0
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def _pid_space() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""  # not Linux: the host's name has to do


class Lease:
    """A held lease: `with Lease(folder.lease, job_id) as lease: ... lease.check()`."""

    def __init__(
        self,
        path: Path,
        job_id: str | None = None,
        heartbeat: float = HEARTBEAT_SECONDS,
        silence: float = SILENCE_SECONDS,
    ):
        """
        Args:
            path: of the lease file.
            job_id: SLURM_JOB_ID, if any; the same job takes its own lease over at once.
            heartbeat, silence: seconds; only tests have a reason to change them.
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
        """Takes the lease: at once if it is free or its holder is gone; where that cannot be seen, after its silence.

        Raises:
            HeadraceError: if its holder lives; the message names it.
        """
        while not self._try_to_create():
            self._wait_until_silent()
        self._last_sign = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._released.set()
        self._thread.join()
        with contextlib.suppress(
            OSError
        ):  # a lease that cannot be taken back is silent from now on, which frees it too
            if self._is_mine():
                self.path.unlink()
        os.close(self._descriptor)

    def check(self) -> None:
        """Costs nothing while the signs of life go out.

        Raises:
            HeadraceError: if another process has taken the lease over, as it may after a long stop of this one.
        """
        if (
            time.monotonic() - self._last_sign > 3 * self._heartbeat
        ):  # this process stood still: the thread may not have looked yet
            self._give_sign()
        if self._lost_to is not None:
            raise HeadraceError(
                f"lost {self.path} to {self._lost_to}: this process was silent for too long; it stops without writing"
            )

    def _try_to_create(self) -> bool:
        try:
            self._descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        except FileExistsError:
            return False
        os.write(self._descriptor, msgspec.json.encode(self._me) + b"\n")
        os.fsync(self._descriptor)
        return True

    def _wait_until_silent(self) -> None:
        """Returns when the lease is free, having moved a dead holder's file away."""
        announced = False
        first_age: float | None = None
        while (found := self._look()) is not None:
            holder, age = found
            alive = holder.is_alive() if holder else None
            own_job = holder is not None and holder.job_id is not None and holder.job_id == self._me.job_id
            if alive is False or (alive is None and own_job) or age >= self._silence:
                self._move_away(holder)
                return
            moved = first_age is not None and age < first_age  # a sign of life since we began to look
            if alive or moved:
                raise HeadraceError(
                    f"the run folder {self.path.parent} is in use by {holder or 'another process'} "
                    f"(last sign of life {age:.0f} s ago); "
                    "stop that one first, or give this run another run.name"
                )
            if not announced:
                _logger.warning(
                    "%s is held by %s, silent for %.0f s; waiting for a sign of life, at most %.0f s",
                    self.path, holder or "an unknown process", age, self._silence - age,
                )  # fmt: skip
                announced = True
            first_age = age
            time.sleep(min(1.0, self._heartbeat / 4))

    def _look(self) -> tuple[Holder | None, float] | None:
        """The holder, None if it is unreadable, and the seconds since its sign of life; None if there is no lease."""
        try:
            with self.path.open("rb") as file:  # opened anew each time: that is when NFS asks the server
                content = file.read()
                sign = os.fstat(file.fileno()).st_mtime
            # Both times are the file system's, so the clocks of two nodes need not agree
            with tempfile.NamedTemporaryFile(dir=self.path.parent, prefix=".lease-clock-") as clock:
                clock.write(b"?")
                clock.flush()
                os.utime(clock.fileno())
                age = max(0.0, os.fstat(clock.fileno()).st_mtime - sign)
        except FileNotFoundError:
            return None
        try:
            return msgspec.json.decode(content, type=Holder), age
        except msgspec.DecodeError:  # its writer was killed, or is between two of its calls
            return None, age

    def _move_away(self, judged: Holder | None) -> None:
        """Frees the name. If another contender was faster and the file is its fresh lease, puts that back."""
        moved = self.path.with_name(f".lease-{self._me.token}")
        try:
            self.path.rename(moved)
            found = msgspec.json.decode(moved.read_bytes(), type=Holder)
        except FileNotFoundError:
            return
        except msgspec.DecodeError:
            found = None
        if found == judged:
            _logger.info("took %s over from %s", self.path, judged or "an unknown process")
            moved.unlink()
        elif not self.path.exists():
            moved.rename(self.path)

    def _is_mine(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def _give_sign(self) -> None:
        try:
            # On the open file, not by its name: a lease that was taken over must not be touched
            os.utime(self._descriptor)
            mine = self._is_mine()
        except OSError as error:
            _logger.warning("no sign of life to %s: %s", self.path, error)
            mine = time.monotonic() - self._last_sign < self._silence
        else:
            self._last_sign = time.monotonic() if mine else self._last_sign
        if not mine:
            found = self._look()
            self._lost_to = str((found and found[0]) or "an unknown process")

    def _beat(self) -> None:
        while not self._released.wait(self._heartbeat) and self._lost_to is None:
            self._give_sign()
