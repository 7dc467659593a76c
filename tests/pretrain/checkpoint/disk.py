"""A disk that fails on demand, between this process and the files under a folder.

Every operation that changes something (and the opening of a folder for an fsync) is numbered. At one of them an error
can be raised, or the process killed, before, during or after it. Otherwise the operations are recorded, and `Recording`
shows what a power cut would have left of them.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

Moment = Literal["before", "within", "after"]
KILLED = 86  # the exit code of a process that was killed at an operation


class Operation(NamedTuple):
    kind: str  # create, write, fsync, open, mkdir, rename, unlink or rmdir
    path: Path
    to: Path | None = None  # of a rename
    content: bytes = b""  # of a write


class Disk:
    """The files under `root`, as this process sees them while `monkeypatch` lasts.

    Args:
        fail: called with the number of each operation, from 0; returns the error to raise, if any.
        kill: the number of the operation at which the process ends, and when.
    """

    def __init__(
        self,
        root: Path,
        monkeypatch: pytest.MonkeyPatch,
        fail: Callable[[int, Operation], OSError | None] = lambda number, operation: None,
        kill: tuple[int, Moment] | None = None,
    ) -> None:
        self.root, self.operations = root, list[Operation]()
        self._fail, self._kill = fail, kill
        self._real = {name: getattr(os, name) for name in ("open", "write", "fsync", "mkdir", "unlink", "rmdir")}
        self._real |= {"replace": os.replace, "rename": os.rename, "io_open": io.open}
        for name in ("open", "write", "fsync"):
            monkeypatch.setattr(os, name, getattr(self, name))
        for name in ("mkdir", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, self._on_a_name(name))
        for name in ("replace", "rename"):
            monkeypatch.setattr(os, name, self._rename(self._real[name]))
        monkeypatch.setattr(io, "open", self._io_open)

    def _do(self, operation: Operation, whole: Callable[[], Any], half: Callable[[], Any] = lambda: None) -> Any:
        if not operation.path.is_relative_to(self.root):
            return whole()
        number = len(self.operations)
        error = self._fail(number, operation)
        if error is not None:
            self.operations.append(operation)
            raise error
        at, moment = self._kill or (-1, "before")
        if number == at and moment != "after":
            if moment == "within":
                half()
            os._exit(KILLED)
        result = whole()
        self.operations.append(operation)
        if number == at:
            os._exit(KILLED)
        return result

    def _path(self, name: Any, dir_fd: int | None = None) -> Path:
        path = Path(os.fsdecode(name))
        return path if dir_fd is None else Path(os.readlink(f"/proc/self/fd/{dir_fd}"), path)

    def open(self, name: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        path = self._path(name, dir_fd)
        kind = "create" if flags & os.O_CREAT and not path.exists() else "open"
        return self._do(Operation(kind, path), lambda: self._real["open"](name, flags, mode, dir_fd=dir_fd))

    def write(self, descriptor: int, data: bytes) -> int:
        return self._write(
            Path(os.readlink(f"/proc/self/fd/{descriptor}")), data, lambda d: self._real["write"](descriptor, d)
        )

    def _write(self, path: Path, data: Any, write: Callable[[Any], int]) -> int:
        view = memoryview(data).cast("B")
        return self._do(
            Operation("write", path, content=bytes(view)), lambda: write(view), lambda: write(view[: len(view) // 2])
        )

    def fsync(self, descriptor: int) -> None:
        # Not passed on: an fsync guards against a power cut, whose effect `Recording` simulates.
        self._do(Operation("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))), lambda: None)

    def _on_a_name(self, kind: str) -> Callable[..., None]:
        def act(name: Any, *arguments: Any, dir_fd: int | None = None, **options: Any) -> None:
            operation = Operation(kind, self._path(name, dir_fd))
            self._do(operation, lambda: self._real[kind](name, *arguments, dir_fd=dir_fd, **options))

        return act

    def _rename(self, real: Callable[..., None]) -> Callable[..., None]:
        def act(source: Any, target: Any) -> None:
            self._do(Operation("rename", self._path(source), self._path(target)), lambda: real(source, target))

        return act

    def _io_open(self, file: Any, mode: str = "r", buffering: int = -1, *arguments: Any, **options: Any) -> Any:
        if isinstance(file, int) or "opener" in options or not {"w", "x", "a"} & set(mode) or "b" not in mode:
            return self._real["io_open"](file, mode, buffering, *arguments, **options)
        path, disk = Path(file), self

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                return disk._write(path, data, super().write)

        raw = disk._do(Operation("create", path), lambda: Raw(path, mode.replace("b", "")))
        return raw if buffering == 0 else io.BufferedWriter(raw, buffering if buffering > 1 else 8192)


@dataclass
class _Node:
    """A file or a folder, as it is now and as a power cut would leave it."""

    is_folder: bool
    content: bytes = b""
    synced_content: bytes = b""
    names: dict[str, _Node] = field(default_factory=dict)
    synced_names: dict[str, _Node] = field(default_factory=dict)


class Recording:
    """Replays recorded operations, and shows after each what a power cut may leave.

    POSIX promises only what was synced: a file's content by an fsync of the file, its name by one of its folder.
    """

    def __init__(self, root: Path, done_in: Path) -> None:
        """Read the folder before its operations are replayed.

        Args:
            root: the folder as it was before the operations; everything in it is durable.
            done_in: the folder in which they were recorded.
        """
        self._root = done_in
        self._tree = self._read(root)

    def _read(self, path: Path) -> _Node:
        if path.is_file():
            content = path.read_bytes()
            return _Node(False, content, content)
        names = {child.name: self._read(child) for child in path.iterdir()}
        return _Node(True, names=names, synced_names=dict(names))

    def _find(self, path: Path) -> _Node:
        node = self._tree
        for part in path.relative_to(self._root).parts:
            node = node.names[part]
        return node

    def replay(self, operation: Operation) -> None:
        path = operation.path
        if operation.kind == "fsync":
            node = self._find(path)
            node.synced_content, node.synced_names = node.content, dict(node.names)
        elif operation.kind == "write":
            self._find(path).content += operation.content
        elif operation.kind in ("create", "mkdir"):
            self._find(path.parent).names[path.name] = _Node(operation.kind == "mkdir")
        elif operation.kind in ("unlink", "rmdir"):
            del self._find(path.parent).names[path.name]
        elif operation.to is not None:
            self._find(operation.to.parent).names[operation.to.name] = self._find(path.parent).names.pop(path.name)

    def leavings(self, folder: Path) -> Iterator[str]:
        """Fill `folder` with what may be left, in turn for each extreme: all, all names, only what was synced."""
        for what, names, contents in (
            ("everything", "names", "content"),
            ("names without contents", "names", "synced_content"),
            ("what was synced", "synced_names", "synced_content"),
        ):
            self._write(self._tree, folder / what, names, contents)
            yield what

    def _write(self, node: _Node, path: Path, names: str, contents: str) -> None:
        if not node.is_folder:
            path.write_bytes(getattr(node, contents))
            return
        path.mkdir()
        for name, child in getattr(node, names).items():
            self._write(child, path / name, names, contents)


def make_unreadable(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every access to a file or folder raise an I/O error, while `monkeypatch` lasts."""

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def look(name: Any = ".", *arguments: Any, **options: Any) -> Any:
            if not isinstance(name, int) and Path(os.fsdecode(name)) == path:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return real(name, *arguments, **options)

        return look

    for module, name in ((os, "stat"), (os, "listdir"), (os, "scandir"), (os, "open"), (io, "open")):
        monkeypatch.setattr(module, name, failing(getattr(module, name)))
    monkeypatch.setattr(Path, "exists", lambda self: os.path.exists(self))  # treats it as absent, as Python 3.14 does
