"""Metrics: names that others rely on, seconds that add up, MFU and ETA against hand-computed values."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pretrain.evaluation.tables import domain_table
from pretrain.run.metrics import (
    Meter,
    MetricsConfig,
    StepProgress,
    StepRecord,
    mfu,
    peak_flops_of,
    peak_memory_bytes,
    seconds_left,
)
from pretrain.run.run_folder import StepLog

RECORD = StepRecord(
    step=3,
    loss=2.5,
    grad_norm=0.25,
    learning_rate=3e-4,
    tokens=12_345,
    tokens_per_second=1_500.0,
    batch_hash="00000000deadbeef",
    step_seconds=2.0,
    data_wait_seconds=0.5,
    forward_backward_seconds=1.0,
    optimizer_seconds=0.25,
    peak_memory_bytes=1 << 30,
    padding_share=0.004,
    skipped_records=0,
    replayed_entries=0,
    tokens_per_source={"pile": 4_000, "dolma": 100},
    epoch_per_source={"pile": 0.5, "dolma": 2.0},
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_line_has_the_keys_that_others_rely_on(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "metrics.jsonl")
    log.append(RECORD.as_json())
    log.append(dataclasses.replace(RECORD, mfu=0.4).as_json())
    without, with_mfu = map(json.loads, log.path.read_text().splitlines())
    assert {
        "step", "loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "batch_hash",
        "data_wait_seconds", "step_seconds",
    } < without.keys()  # fmt: skip
    assert without["tokens_per_source"] == {"pile": 4_000, "dolma": 100}
    assert "mfu" not in without
    assert with_mfu["mfu"] == 0.4


def test_the_parts_of_a_step_are_timed_separately_and_add_up() -> None:
    clock = Clock()
    meter = Meter(clock)
    with meter.part("data_wait"):
        clock.now += 2
    for _ in range(2):
        with meter.part("forward_backward"):
            clock.now += 3
    clock.now += 1  # outside all parts
    assert meter.end_step() == {"data_wait": 2, "forward_backward": 6, "step": 9}
    clock.now += 50  # for example, an evaluation
    meter.start_step()
    with contextlib.suppress(RuntimeError), meter.part("optimizer"):
        clock.now += 4
        raise RuntimeError
    assert meter.end_step() == {"optimizer": 4, "step": 4}


def test_a_devices_time_is_read_when_the_step_ends_and_not_waited_for_before() -> None:
    queue, done = [0.0], []  # milliseconds of work in the device's queue

    class Event:
        def record(self) -> None:
            self.at = sum(queue)

        def synchronize(self) -> None:
            done.append(self.at)

        def elapsed_time(self, later: Event) -> float:
            return later.at - self.at

    meter = Meter(lambda: 0.0, Event)
    for work in (3000.0, 2000.0):
        with meter.device_part("forward_backward"):
            queue.append(work)
        queue.append(500.0)
    with meter.device_part("optimizer"):
        queue.append(250.0)
    assert not done
    assert meter.end_step() == {"forward_backward": 5.0, "optimizer": 0.25, "step": 0.0}
    assert done == [3000.0, 5500.0, 6250.0]
    assert meter.end_step() == {"step": 0.0}


def test_mfu_equals_a_value_computed_by_hand() -> None:
    # 7B parameters x 6 FLOPs on 8 devices at 4,000 tokens/s each, 312 TFLOP/s peak: 168/312
    assert mfu(42e9, 32_000, 8 * 312e12) == pytest.approx(0.53846, rel=1e-4)
    assert mfu(42e9, 32_000, None) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("Tesla V100-SXM2-32GB", None),
        ("cpu", None),
    ],
)
def test_peak_flops_are_those_of_the_exact_device(name: str, peak: float | None) -> None:
    assert peak_flops_of(name) == peak


def test_time_left_equals_a_value_computed_by_hand() -> None:
    assert seconds_left([], 10) is None
    assert seconds_left([(5.0, 1)], 10) is None
    assert seconds_left([(5.0, 1), (6.0, 1)], 10) is None
    assert seconds_left([(5.0, 1), (7.0, 2), (11.0, 4)], 10) == 12.0
    assert seconds_left([(5.0, 9), (6.0, 10)], 10) == 0.0


def test_memory_is_counted_in_bytes() -> None:
    block = torch.ones(64 << 20, dtype=torch.uint8)
    assert peak_memory_bytes(torch.device("cpu")) > block.numel()
    assert peak_memory_bytes(torch.device("cpu")) < 1 << 40


def test_plain_lines_are_printed_at_intervals_and_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    config = MetricsConfig(log_every_seconds=10)
    with StepProgress(20, config, Console(file=io.StringIO()), clock) as progress:
        for step in range(1, 21):
            clock.now += 4
            progress.show(dataclasses.replace(RECORD, step=step))
    steps = [message.split()[1] for message in caplog.messages]
    assert steps == ["1/20", "4/20", "7/20", "10/20", "13/20", "16/20", "19/20", "20/20"]
    assert "loss 2.5000" in caplog.messages[1]
    assert "1.5k tokens/s" in caplog.messages[1]
    assert "data wait 25%" in caplog.messages[1]
    assert caplog.messages[1].endswith("ETA 0:01:04")


def test_the_time_left_counts_what_each_step_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    with StepProgress(
        20, MetricsConfig(log_every_seconds=0), Console(file=io.StringIO()), clock, lambda s: s**2
    ) as shown:
        for step in (1, 2):
            clock.now += 3
            shown.show(dataclasses.replace(RECORD, step=step))
    assert caplog.messages[1].endswith("ETA 0:06:36"), "3 seconds for 3 of 399, 396 to go"


def test_a_terminal_shows_a_bar(caplog: pytest.LogCaptureFixture) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=140)
    with StepProgress(20, MetricsConfig(), console, Clock()) as progress:
        progress.show(RECORD)
    assert "3/20" in screen.getvalue()
    assert "loss 2.5000" in screen.getvalue()
    assert not caplog.messages


def test_the_closing_table_shows_each_domain_before_and_after() -> None:
    def line(step: int, domain: str, perplexity: float) -> dict[str, object]:
        return {"step": step, "domain": domain, "perplexity": perplexity, "bits_per_byte": perplexity / 1000}

    before = [line(0, "wiki", 4096.25), line(0, "macro", 4100.0)]
    after = [line(9, "new", 50.0), line(9, "wiki", 91.5), line(9, "macro", 88.0)]
    console = Console(file=io.StringIO(), width=100)
    console.print(domain_table(before, after))
    assert isinstance(console.file, io.StringIO)
    rows = [row.replace("│", " ").split() for row in console.file.getvalue().splitlines()]
    assert ["wiki", "4,096.2", "91.5", "4.096", "0.091"] in rows
    assert ["new", "-", "50.0", "-", "0.050"] in rows
    assert ["macro", "4,100.0", "88.0", "4.100", "0.088"] in rows
