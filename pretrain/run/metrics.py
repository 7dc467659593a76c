"""Define the records of metrics.jsonl, measure where a step's seconds go, and show progress on the console.

recorder -> StepRecord -> journal -> {metrics.jsonl, console, wandb}.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import resource
import shlex
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Annotated, Protocol, Self

import torch
from pydantic import Field, field_validator, model_validator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from pretrain import log
from pretrain.devices import device_of_torch
from pretrain.topology import Topology
from shards import Config

_logger = logging.getLogger(__name__)


class ProfileConfig(Config):
    """Which steps to profile with PyTorch's profiler."""

    steps: tuple[int, int]  # the first and the last, counted as in metrics.jsonl
    ranks: tuple[Annotated[int, Field(ge=0)], ...] = (0,)  # each rank that profiles writes files of its own

    @model_validator(mode="after")
    def _check(self) -> ProfileConfig:
        first, last = self.steps
        if not 1 <= first <= last:
            raise ValueError(f"steps: [{first}, {last}] are no steps; set the first, at least 1, and the last")
        return self


class MetricsConfig(Config):
    """How progress is shown during a run. Every step is recorded in metrics.jsonl, whatever is set here."""

    log_every_seconds: float = Field(10.0, ge=0)  # between two plain lines, if the output is not a terminal
    # optimizer steps between records of each layer's figures in layers.jsonl, besides that of step 1; None: none
    layers_every: int | None = Field(100, ge=1)
    # Whether to estimate the gradient noise scale, by the norms of the micro-batches' gradients. A step of one
    # micro-batch on one rank has no estimate; docs/training.md
    noise_scale: bool = True
    profile: ProfileConfig | None = None  # None: no steps, until a rank gets SIGUSR2 and profiles its next five
    # bf16 FLOP/s of one device, dense; None: from the table, if listed
    peak_flops: float | None = Field(None, gt=0)
    # A command that is run at each event (spikes, stops, failed saves, the end), with the event as one line of JSON on
    # its standard input. It is split into words, and no shell runs it; training goes on meanwhile. None: no command
    on_event: str | None = None

    @field_validator("on_event")
    @classmethod
    def _is_a_command(cls, command: str | None) -> str | None:
        if command is not None and not shlex.split(command):  # which itself raises ValueError: No closing quotation
            raise ValueError(f"on_event: {command!r} names no program")
        return command

    def measures_layers(self, step: int) -> bool:
        """Return whether the layers' figures of a step are recorded."""
        return self.layers_every is not None and (step == 1 or step % self.layers_every == 0)


@dataclass(frozen=True)
class StepRecord:
    """One line of metrics.jsonl. The names are relied on outside the repository."""

    step: int  # optimizer steps done, including this one
    loss: float  # nats per valid target of the global batch; null in the file if it is not finite
    grad_norm: float  # global L2 norm before clipping
    learning_rate: float
    tokens: int  # trained on since the run's start, over all ranks, without padding
    tokens_per_second: float  # over all ranks, without padding
    batch_hash: str  # 16 hex digits, chained with the previous step: equal hashes mean equal data
    step_seconds: float  # the whole step; the next three are parts of it
    data_wait_seconds: float
    forward_backward_seconds: float
    optimizer_seconds: float  # including gradient reduction that does not overlap the backward pass
    peak_memory_bytes: int  # on this rank: the GPU allocator's, or the process's resident set
    padding_share: float  # share of the global batch's positions
    tokens_per_source: dict[str, int]  # in this step's global batch
    epoch_per_source: dict[str, float]  # passes over each source since the run's start
    skipped_records: int  # bad records since the run's start, over all ranks; bad_records.jsonl names them
    replayed_entries: int  # invalid entries of shards in this step, over all ranks, which slow down decoding
    # As batch_hash, of what was trained on; None if that is all that was read, so if no document was forgotten and no
    # step passed over
    trained_hash: str | None = None
    targets: int | None = None  # tokens that were predicted; None without prompts, as all are but each piece's first
    forgotten_tokens: int | None = None  # of documents in data.forget, in this step; None if there are none
    passed_over: bool | None = None  # True if data.skip_steps names the step: its batch was read, and nothing changed
    stage: int | None = None  # number of the run's stage, the first being 0; None if it has only one
    failed_saves: int | None = None  # in a row, up to this step; None if the last save succeeded
    checkpoint_seconds: float | None = None  # pause for a save before this step; None without one
    # Documents dropped on the way to this step's rows because they share text with data.decontaminate's suite
    contaminated_per_source: dict[str, int] | None = None
    z_loss: float | None = None  # its part of the training loss; None if it is off
    # Gradient noise scale in targets, smoothed over some hundred steps; None while there is no estimate
    noise_scale: float | None = None
    gradient_signal: float | None = None  # this step's estimate of the true gradient's squared norm; may be negative
    gradient_variance: float | None = None  # and of the variance of a single target's gradient
    nonfinite: bool | None = None  # True if loss or gradient was not finite, and the step changed nothing
    without_targets: bool | None = None  # True if the batch had nothing to predict: no loss, and nothing changed
    spike: bool | None = None  # True if its loss or gradient norm stands out against the steps before
    skipped_update: bool | None = None  # True if its update was not made because of that (train.on_spike)
    straggler: int | None = None  # a rank that holds the others up for long; None for most steps
    straggler_seconds: float | None = None  # that it works longer than the typical rank, in a step
    # 16 hex digits, equal in every layout for equal bits after this step; None where train.weight_hash_every gives none
    weight_hash: str | None = None  # of the fp32 weights
    optimizer_hash: str | None = None  # of their moments, and of their moving average if train.ema keeps one
    # Model FLOP utilization, in [0, 1]; None if the device's peak is unknown. Attention counts as if each row were one
    # document, the convention of published figures
    mfu: float | None = None
    mfu_documents: float | None = None  # the same, but attention counts only within documents, as it is computed

    def as_json(self) -> dict[str, object]:
        """Return the record without the fields that are None."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


class DeviceEvent(Protocol):
    """A moment in a device's queue of work, such as `torch.cuda.Event(enable_timing=True)`."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, later: Self, /) -> float: ...  # milliseconds


class Meter:
    """Splits the seconds of a step into named parts, and starts afresh with each step."""

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, device_event: Callable[[], DeviceEvent] | None = None
    ) -> None:
        """Start timing a step.

        Args:
            clock: seconds, monotonic.
            device_event: makes an event of a device that works through a queue of its own; None if there is no such
                device, and what is computed is done when the call returns.
        """
        self._clock = clock
        self._device_event = device_event
        self._parts: dict[str, float] = {}
        self._on_device: list[tuple[str, DeviceEvent, DeviceEvent]] = []
        self._step_start = clock()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Charge the time inside the block to a part; repeated parts of a step add up."""
        start = self._clock()
        try:
            yield
        finally:
            self._charge(name, self._clock() - start)

    @contextmanager
    def device_part(self, name: str) -> Iterator[None]:
        """Charge to a part the time that the device takes for what is asked of it inside the block.

        The device is not waited for: its events are read when the step ends, which needs the step's results anyway.
        """
        if self._device_event is None:
            with self.part(name):
                yield
            return
        start, end = self._device_event(), self._device_event()
        start.record()
        yield
        end.record()
        self._on_device.append((name, start, end))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside the block out of the step; what the device is asked for in it has to be waited for."""
        start = self._clock()
        yield
        self._step_start += self._clock() - start

    def end_step(self) -> dict[str, float]:
        """Return each part's seconds since the step began, and the whole step's under `step`; begin the next step."""
        for name, start, end in self._on_device:
            end.synchronize()
            self._charge(name, start.elapsed_time(end) / 1000)
        now = self._clock()
        seconds = {**self._parts, "step": now - self._step_start}
        self.start_step()
        return seconds

    def start_step(self) -> None:
        """Discard what was measured: the time of an evaluation or a save does not belong to the next step."""
        self._parts = {}
        self._on_device = []
        self._step_start = self._clock()

    def _charge(self, name: str, seconds: float) -> None:
        self._parts[name] = self._parts.get(name, 0.0) + seconds


def device_meter(device: torch.device) -> Meter:
    """Return a meter of what a device computes."""
    if device.type != "cuda":
        return Meter()
    return Meter(device_event=functools.partial(torch.cuda.Event, enable_timing=True))


def peak_flops_of(device_name: str) -> float | None:
    """Return a device's dense bf16 FLOP/s by its `torch.cuda.get_device_name()`; None if unknown."""
    device = device_of_torch(device_name)
    return device.flops if device else None


def total_peak_flops(config: MetricsConfig, topology: Topology) -> float | None:
    """Return the dense bf16 FLOP/s of all devices together; None if unknown."""
    peak = config.peak_flops
    if peak is None and topology.device.type == "cuda":
        peak = peak_flops_of(torch.cuda.get_device_name())
    return peak * topology.world_size if peak else None


def mfu(flops_per_token: float, tokens_per_second: float, peak_flops: float | None) -> float | None:
    """Return the share of the devices' peak used for the model's own arithmetic; recomputation does not count.

    Args:
        flops_per_token: of forward and backward pass.
        tokens_per_second: over all devices.
        peak_flops: FLOP/s of all devices together; None if unknown.
    Source: Chowdhery et al. 2022, arXiv 2204.02311, appendix B.
    """
    return None if peak_flops is None else flops_per_token * tokens_per_second / peak_flops


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that this process has held, by the GPU's allocator or as its resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def seconds_left(times: Sequence[tuple[float, float]], work: float) -> float | None:
    """Estimate how long the rest of a run will take at its recent speed.

    Args:
        times: (seconds on some clock, work done), in order; time between two steps, such as for an evaluation, counts.
        work: that of the whole run, in steps or tokens.
    Returns:
        Seconds; None until there are two different amounts.
    """
    if len(times) < 2 or times[-1][1] <= times[0][1]:
        return None
    (first_time, first_done), (last_time, last_done) = times[0], times[-1]
    return (last_time - first_time) / (last_done - first_done) * (work - last_done)


def step_line(record: StepRecord, steps: int, left: float | None) -> str:
    """Describe a step in one line of a log."""
    parts = [
        f"step {record.step}/{steps}",
        f"loss {record.loss:.4f}",
        f"grad norm {record.grad_norm:.3f}",
        f"lr {record.learning_rate:.2e}",
        f"{_short(record.tokens)} tokens",
        f"{_short(record.tokens_per_second)} tokens/s",
        f"data wait {record.data_wait_seconds / max(record.step_seconds, 1e-9):.0%}",
    ]
    if record.mfu is not None:
        parts.append(f"MFU {record.mfu:.1%}")
    return "  ".join([*parts, f"ETA {_duration(left)}"])


def _short(count: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.4g}{unit}"
    return f"{count:.4g}"


def _duration(seconds: float | None) -> str:
    return "?" if seconds is None else str(timedelta(seconds=round(seconds)))


class StepProgress:
    """Shows progress: a live bar on a terminal, elsewhere a plain log line at intervals."""

    def __init__(
        self,
        steps: int,
        config: MetricsConfig,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        work_until: Callable[[int], float] = float,
    ):
        """Prepare the progress display; `with` shows it.

        Args:
            steps: length of the whole run.
            config: sets the interval of plain lines.
            console: where the bar is drawn; the log's by default.
            clock: seconds, monotonic.
            work_until: returns how much work the steps up to one are, where they differ.
        """
        console = console or log.console()
        self._steps = steps
        self._every = config.log_every_seconds
        self._clock = clock
        self._work_until = work_until
        self._times: deque[tuple[float, float]] = deque(maxlen=200)
        self._last_line = -float("inf")
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[figures]}"))
            self._bar = Progress(*columns, console=console, auto_refresh=True)
            self._task = self._bar.add_task("train", total=steps, figures="")

    def __enter__(self) -> StepProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, record: StepRecord) -> None:
        """Show that a step is done."""
        now = self._clock()
        self._times.append((now, self._work_until(record.step)))
        line = step_line(record, self._steps, seconds_left(self._times, self._work_until(self._steps)))
        if self._bar is not None:
            figures = line.partition("  ")[2]  # the bar has its own count of steps
            self._bar.update(self._task, completed=record.step, figures=figures)
        elif now - self._last_line >= self._every or record.step == self._steps:
            self._last_line = now
            _logger.info("%s", line)
