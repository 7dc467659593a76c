"""A process that makes windows, reading stdin, answering on stdout: `python -m shards.windows.worker`.

worker_process -> worker. It imports no torch, and it ends when its parent does, however the parent ended.
"""

from __future__ import annotations

import os
import queue
import select
import signal
import sys
import threading
import traceback

import msgspec

from shards.config import DataConfig
from shards.errors import HeadraceError
from shards.windows import worker_protocol
from shards.windows.window import WindowMaker

_PARENT_CHECK_SECONDS = 1.0
PIPE_BYTES = 1 << 16


def main() -> None:
    """Answer requests until stdin ends."""
    # Signals to the process group are for the parent, which stops at a step's end and needs its windows until then.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a library that prints must not corrupt an answer
    requests: queue.SimpleQueue[worker_protocol.Request] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin.fileno(), requests), daemon=True).start()
    try:
        maker = prepare(requests.get(), answers)
        if maker is not None:
            serve(maker, requests, answers)
    except BrokenPipeError:
        os._exit(0)


def prepare(request: worker_protocol.Request, answers: int) -> WindowMaker | None:
    """Answer the first request; return None if this process cannot do its work, or would do it unlike its parent."""
    assert request.recipe is not None
    try:
        request.recipe.check_program()
        stages = [DataConfig.model_validate_json(stage) for stage in request.stages]
        maker = WindowMaker(stages, request.recipe.open(stages))
    except Exception as error:
        _write(answers, worker_protocol.encode_error(error))
        return None
    _write(answers, worker_protocol.encode_ready())
    return maker


def serve(maker: WindowMaker, requests: queue.SimpleQueue[worker_protocol.Request], answers: int) -> None:
    """Make the requested windows in order, and write them to the file descriptor `answers`."""
    while True:
        request = requests.get()
        assert request.task is not None
        try:
            parts = worker_protocol.encode_window(maker.make(request.task))
        except HeadraceError as error:
            parts = worker_protocol.encode_error(error)
        except Exception as error:  # a bug or an unforeseen input: the parent stops and reports it
            parts = worker_protocol.encode_error(RuntimeError(f"{error!r} in {request.task}"))
        _write(answers, parts)


def _write(answers: int, parts: list[bytes | memoryview]) -> None:
    for part in parts:
        view = memoryview(part)
        while view:
            view = view[os.write(answers, view) :]


def _listen(stdin: int, requests: queue.SimpleQueue[worker_protocol.Request]) -> None:
    """Read requests until the parent closes the pipe or is gone, then end the process, even amid a window."""
    try:
        _receive(stdin, requests)
    except Exception:  # such as a request written by another version of this program
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _receive(stdin: int, requests: queue.SimpleQueue[worker_protocol.Request]) -> None:
    parent = os.getppid()
    pending = b""
    while True:
        ready, _, _ = select.select([stdin], [], [], _PARENT_CHECK_SECONDS)
        if not ready and os.getppid() == parent:
            continue
        data = os.read(stdin, PIPE_BYTES) if ready else b""
        if not data:  # closed, or held open by another process after the parent is gone
            return
        pending += data
        while len(pending) >= worker_protocol.LENGTH_BYTES:
            end = worker_protocol.LENGTH_BYTES + int.from_bytes(pending[: worker_protocol.LENGTH_BYTES], "little")
            if len(pending) < end:
                break
            requests.put(
                msgspec.msgpack.decode(pending[worker_protocol.LENGTH_BYTES : end], type=worker_protocol.Request)
            )
            pending = pending[end:]


if __name__ == "__main__":
    main()
