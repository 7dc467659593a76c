"""Profile a few steps of a training, as its config or a signal asks. trainer -> profiling -> a run's profiles/.

Each rank that is asked profiles by itself: by `metrics.profile`, or because it received SIGUSR2.
"""

from __future__ import annotations

import logging
import signal
from datetime import datetime
from pathlib import Path
from types import FrameType, TracebackType

import torch
from torch.profiler import ProfilerActivity, profile

from pretrain.run.metrics import ProfileConfig
from pretrain.topology import Topology

_logger = logging.getLogger(__name__)

_STEPS_ON_DEMAND = 5
_ALLOCATIONS = 1_000_000  # of which the memory snapshot keeps the last
_TABLE_ROWS = 40


class StepProfiler:
    """Profiles the steps of one rank, inside its `with` block.

    Args:
        config: which steps, if any; a signal asks for the next five.
        folder: where the files go; it is made when there are any.
    """

    def __init__(self, config: ProfileConfig | None, folder: Path, topology: Topology) -> None:
        self._planned = config.steps if config and topology.rank in config.ranks else None
        self._folder, self._rank, self._device = folder, topology.rank, topology.device
        missing = [rank for rank in config.ranks if rank >= topology.world_size] if config else []
        if missing and topology.is_main:
            _logger.warning("metrics.profile.ranks: %s; there are %d ranks, from 0 on", missing, topology.world_size)
        self._asked = False
        self._profile: profile | None = None
        self._first = self._last = 0  # steps that are being profiled
        self._step = 0  # the last that is done

    def __enter__(self) -> StepProfiler:
        self._previous = signal.signal(signal.SIGUSR2, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGUSR2, self._previous)
        if self._profile and kind is None:  # after an error, the device may wait for a rank that is gone
            self._write(self._step)

    def begin_step(self, step: int) -> None:
        """Begin to profile if a step is to be the first."""
        self._step = step - 1
        if self._profile:
            return
        if self._planned and self._planned[0] <= step <= self._planned[1]:
            self._start(step, self._planned[1])
        elif self._asked:
            self._start(step, step + _STEPS_ON_DEMAND - 1)

    def end_step(self, step: int) -> None:
        """Write the files if a step was the last to profile."""
        self._step = step
        if self._profile and step >= self._last:
            self._write(step)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def _start(self, first: int, last: int) -> None:
        _logger.info("rank %d profiles steps %d to %d, which takes time", self._rank, first, last)
        self._asked = False
        self._first, self._last = first, last
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS, stacks="python")
        self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profile.start()

    def _write(self, last: int) -> None:
        """Stop profiling and write the files; training goes on if that fails."""
        done, self._profile = self._profile, None
        assert done is not None
        now = datetime.now().astimezone().strftime("%Y%m%dT%H%M%S")  # a step that is trained again gets other files
        path = self._folder / f"steps_{self._first:08d}-{last:08d}.rank{self._rank}.{now}"
        try:
            done.stop()
            self._folder.mkdir(exist_ok=True)
            done.export_chrome_trace(f"{path}.trace.json.gz")
            by = f"self_{self._device.type}_time_total"
            path.with_name(f"{path.name}.txt").write_text(done.key_averages().table(by, _TABLE_ROWS))
            if self._device.type == "cuda":
                torch.cuda.memory._dump_snapshot(f"{path}.memory.pickle")  # type: ignore[no-untyped-call]
        except (OSError, RuntimeError) as error:
            _logger.error("rank %d: the profile %s could not be written: %s", self._rank, path, error)
        else:
            _logger.info("rank %d: profile of steps %d to %d in %s.*", self._rank, self._first, last, path)
        finally:
            if self._device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)
