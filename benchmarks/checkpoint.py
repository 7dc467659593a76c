"""Measure how long a save delays training, and its speed against the bare disk: `python benchmarks/checkpoint.py`.

One rank trains a model and saves it in several ways: waiting for the disk, in the background, with DeepSpeed's
decoupled writer, and with torch's `async_save`. For each: the seconds until training continues, and the seconds lost in
total, including slower steps during the write. The same run writes and reads as many bytes plainly.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed.checkpoint as dcp
from deepspeed.runtime.checkpoint_engine.decoupled_checkpoint_engine import DecoupledCheckpointEngine
from deepspeed.runtime.model_checkpointing.data_parallel_writer_factory import DataParallelWriterConfig
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from pretrain.checkpoint.save import Saver
from pretrain.checkpoint.state import DataState, RunState
from pretrain.checkpoint.store import CheckpointConfig, CheckpointStore
from pretrain.deepspeed_keys import deepspeed_config
from pretrain.engine import Engine
from pretrain.model.pieces import valid_targets
from pretrain.model.size import checkpoint_bytes, parameter_count
from pretrain.model.transformer import LlamaConfig
from pretrain.optim import OptimConfig
from pretrain.parallel_config import ParallelConfig
from pretrain.run.events import log_event
from pretrain.run.metrics import Meter
from pretrain.run.run_folder import RunFolder
from pretrain.topology import Topology, started

PIECE = 1 << 22
SEQ_LEN = 32
MODEL = LlamaConfig(dim=768, n_layers=8, n_heads=12, ffn_dim=2048, vocab_size=8192)


class Training:
    """A model that trains one step at a time."""

    def __init__(self, here: Topology) -> None:
        parallel, optim = ParallelConfig(), OptimConfig(learning_rate=1e-4)
        derived = deepspeed_config(parallel, optim, "bf16", {})
        self.engine = Engine(MODEL, optim, parallel, derived, 1, 1, here, seed=0)
        self._tokens = torch.randint(MODEL.vocab_size, (1, SEQ_LEN + 1)).to(here.device)
        self._segments = torch.ones(1, SEQ_LEN + 1, dtype=torch.int64)
        self.steps = 0
        for _ in range(3):
            self.step()

    def step(self) -> float:
        start = time.perf_counter()
        n_targets = int(valid_targets(self._segments).sum())
        self.engine.train_step(self._tokens, self._segments, n_targets, self.steps, 1e-4, Meter())
        self.steps += 1
        return time.perf_counter() - start

    def held_up(self, begin: Callable[[], None], done: Callable[[], bool]) -> dict[str, float]:
        """Begin a save and continue training until it is done, for at least one step."""
        step_seconds = statistics.median(self.step() for _ in range(3))
        start = time.perf_counter()
        begin()
        stalled = time.perf_counter() - start
        steps = 0
        while not steps or not done():
            self.step()
            steps += 1
        seconds = time.perf_counter() - start
        return {
            "stalled_seconds": round(stalled, 3),
            "lost_seconds": round(seconds - steps * step_seconds, 3),
            "until_done_seconds": round(seconds, 3),
        }


class Ours:
    """Saving in the project's own way."""

    def __init__(self, training: Training, here: Topology, root: Path, asynchronous: bool) -> None:
        self._training = training
        root.mkdir()
        config = CheckpointConfig(keep=1, asynchronous=asynchronous)
        self.store = CheckpointStore(root, config, checkpoint_bytes(MODEL, 2))
        self._saver = Saver(self.store, training.engine, here, RunFolder(root), lease=None, tell=log_event)

    def save(self) -> dict[str, float]:
        step = self._training.steps
        state = RunState(step, 0, {}, "", restarts=0, config_hash="", tp_size=1, dp_size=1, zero_stage=1)

        def done() -> bool:
            self._saver.settle(self._saver.busy)
            return self.store.is_complete(step)

        found = self._training.held_up(lambda: (self._saver.save(state, DataState({}, {})), None)[1], done)
        self._saver.finish()
        assert self._saver.seconds is not None
        return {**found, "save_gb_per_second": round(checkpoint_bytes(MODEL, 2) / 1e9 / self._saver.seconds, 3)}


def with_deepspeed(training: Training, writer: DecoupledCheckpointEngine, root: Path) -> dict[str, float]:
    """Save with DeepSpeed's decoupled writer: a process for which the next step waits; no fsync, no hash."""
    engine = training.engine.deepspeed
    before, engine.checkpoint_engine = engine.checkpoint_engine, writer
    root.joinpath("engine").mkdir(parents=True)
    found = training.held_up(lambda: engine.save_checkpoint(str(root), tag="engine"), lambda: True)
    engine.checkpoint_engine = before
    return found


def decoupled_writer(training: Training) -> DecoupledCheckpointEngine:
    """Start DeepSpeed's writer process, with the writer that needs nothing compiled."""
    config = training.engine.deepspeed._config
    config.checkpoint_config["writer"] = {
        "type": "PYTHON", "decoupled": True, "io_buffer_size": 1 << 26, "io_buffer_double": True, "io_multiplier": 1,
        "show_statistics": False, "data_parallel": None,
    }  # fmt: skip
    return DecoupledCheckpointEngine(config, DataParallelWriterConfig(1, 0, 0, 0, True), optimize_dp_state=True)


def with_torch(training: Training, root: Path, stager: DefaultStager) -> dict[str, float]:
    """Save with torch's `async_save` in its own file format, staged in memory that it keeps."""
    engine = training.engine.deepspeed
    saved: list[Future[object]] = []

    def begin() -> None:
        content = {"module": engine.module.state_dict(), "optimizer": engine.optimizer.state_dict()}
        response = dcp.async_save(content, checkpoint_id=root, async_stager=stager)
        saved.append(getattr(response, "upload_completion", response))

    return training.held_up(begin, lambda: saved[0].done())


def written_plainly(root: Path, size: int) -> float:
    """Measure writing one file in large pieces with a sync, as `dd conv=fsync` does: bytes per second."""
    piece = os.urandom(PIECE)
    start = time.perf_counter()
    with (root / "plain").open("wb", buffering=0) as file:
        for _ in range(size // PIECE):
            file.write(piece)
        os.fsync(file.fileno())
    return size // PIECE * PIECE / (time.perf_counter() - start)


def forget(paths: list[Path]) -> None:
    """Drop files from the page cache, so that they are read from the disk."""
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_plainly(path: Path) -> float:
    """Measure reading a file from the disk: bytes per second."""
    forget([path])
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.read(PIECE):
            pass
    return path.stat().st_size / (time.perf_counter() - start)


def loaded(training: Training, store: CheckpointStore) -> dict[str, float]:
    """Measure verifying a checkpoint from the disk, then loading it: bytes per second."""
    checkpoint = store.open(store.steps()[-1])
    size = sum(entry.size for entry in checkpoint.files)
    forget([checkpoint.folder / entry.name for entry in checkpoint.files])
    start = time.perf_counter()
    assert checkpoint.broken_files() == []
    verified = time.perf_counter()
    training.engine.load(checkpoint.folder)
    end = time.perf_counter()
    return {"verify": size / (verified - start), "load": size / (end - verified), "both": size / (end - start)}


def say(what: str, figures: dict[str, float]) -> None:
    print(json.dumps({"what": what, **figures}), flush=True)


def gigabytes(rates: dict[str, float]) -> dict[str, float]:
    return {f"{name}_gb_per_second": round(rate / 1e9, 3) for name, rate in rates.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the system's temporary folder")
    parser.add_argument("--saves", type=int, default=3, help="saves of each kind, after a first, uncounted one")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(dir=arguments.folder))
        here = stack.enter_context(started(ParallelConfig()))
        root = Path(name)
        training = Training(here)
        size = checkpoint_bytes(MODEL, 2)
        say("model", {"parameters": parameter_count(MODEL), "checkpoint_gb": size / 1e9})
        background = Ours(training, here, root / "background", asynchronous=True)
        waiting = Ours(training, here, root / "waiting", asynchronous=False)
        on_gpu = here.device.type == "cuda"
        stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=on_gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=on_gpu
            )
        )
        writer = decoupled_writer(training)
        stack.callback(writer.cleanup)  # otherwise the exit would wait for its process, whatever happened
        ways: dict[str, Callable[[], dict[str, float]]] = {
            "waiting": waiting.save,
            "background": background.save,
            "torch async_save": lambda: with_torch(training, root / "torch", stager),
            "DeepSpeed decoupled": lambda: with_deepspeed(training, writer, root / "deepspeed"),
        }
        found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for number in range(arguments.saves + 1):  # alternating, since the disk's speed changes
            say("plain write", gigabytes({"write": written_plainly(root, size)}))
            for way, save in ways.items():
                found[way].append(save())
                say(way if number else f"{way}, first", found[way][-1])
                for folder in ("torch", "deepspeed"):
                    shutil.rmtree(root / folder, ignore_errors=True)
        for way, figures in found.items():
            medians = {name: statistics.median(f[name] for f in figures[1:]) for name in figures[0]}
            say(f"{way}, median", medians)
        stalls = {way: statistics.median(f["stalled_seconds"] for f in found[way][1:]) for way in ways}
        say("stall of a background save by that of a waiting one", {"share": stalls["background"] / stalls["waiting"]})
        say("plain read", gigabytes({"read": read_plainly(root / "plain")}))
        say("load", gigabytes(loaded(training, background.store)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
