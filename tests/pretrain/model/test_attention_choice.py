"""Which attention a run uses: what its device can run, and of that the fastest, the same on all ranks."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch

from pretrain.model import attention_choice
from pretrain.model.architecture import Heads
from pretrain.model.attention_choice import AttentionShape, attention_backend, with_fastest_attention
from pretrain.parallel_config import ParallelConfig
from pretrain.topology import Topology
from shards import ConfigError, HeadraceError

SHAPE = AttentionShape(rows=2, length=40, n_heads=4, n_kv_heads=2, head_dim=16, dtype=torch.bfloat16)


class Rank(Topology):
    """One of two ranks that take what rank 0 found; its device need not be there."""

    found_by_rank_0: Any = None

    def together(self, action: Any) -> Any:
        return action()

    def broadcast_object(self, value: Any) -> Any:
        if self.is_main:
            type(self).found_by_rank_0 = value
        return self.found_by_rank_0


def rank(number: int = 0, device: str = "cuda") -> Rank:
    return Rank(number, 2, tp_rank=0, tp_size=1, dp_rank=number, dp_size=2, device=torch.device(device))


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let there be a GPU to ask for its version, though not to compute on."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))


def seconds(monkeypatch: pytest.MonkeyPatch, **of_backend: float | str) -> list[str]:
    """Let backends take so many seconds, or fail with a message; return the list of those that were measured."""
    measured = []

    def take(backend: str, *_: object) -> float:
        measured.append(backend)
        taken = of_backend[backend]
        if isinstance(taken, str):
            raise RuntimeError(taken)
        return taken

    monkeypatch.setattr(attention_choice, "_seconds_of", take)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return measured


@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize(
    ("device", "head_dim", "dtype", "expected"),
    [
        ("cuda", 64, torch.bfloat16, "varlen"),
        ("cuda", 64, torch.float32, "flex"),
        ("cuda", 20, torch.bfloat16, "flex"),
        ("cuda", 512, torch.bfloat16, "flex"),
        ("cuda", 8, torch.float32, "sdpa"),
        ("cpu", 6, torch.float32, "varlen"),
    ],
)
def test_auto_is_what_the_device_can_run(device: str, head_dim: int, dtype: torch.dtype, expected: str) -> None:
    assert attention_backend(ParallelConfig(), rank(device=device), Heads(4, 2, head_dim), dtype) == expected


def test_an_old_gpu_has_no_varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert attention_backend(ParallelConfig(), rank(), Heads(4, 2, 64), torch.bfloat16) == "flex"


@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize(
    ("attention", "device", "head_dim", "dtype"),
    [
        ("varlen", "cuda", 64, torch.float32),
        ("varlen", "cuda", 36, torch.bfloat16),
        ("flex", "cuda", 8, torch.bfloat16),
        ("flex", "cpu", 64, torch.bfloat16),
    ],
)
def test_what_the_device_cannot_run_is_refused(attention: Any, device: str, head_dim: int, dtype: torch.dtype) -> None:
    parallel = ParallelConfig(attention=attention)
    with pytest.raises(ConfigError, match=rf"parallel\.attention={attention} needs .* use auto"):
        attention_backend(parallel, rank(device=device), Heads(4, 2, head_dim), dtype)


@pytest.mark.usefixtures("ampere")
def test_all_ranks_take_what_rank_0_measured_to_be_fastest(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    measured = seconds(monkeypatch, varlen=0.003, flex=0.002, sdpa=0.2)
    with caplog.at_level(logging.INFO):
        chosen = [with_fastest_attention(ParallelConfig(), rank(number), SHAPE).attention for number in (0, 1)]
    assert chosen == ["flex", "flex"]
    assert measured == ["varlen", "flex", "sdpa"], "rank 1 has nothing to measure"
    assert "attention: flex" in caplog.text
    assert "varlen 3.00 ms, flex 2.00 ms, sdpa 200.00 ms" in caplog.text


@pytest.mark.usefixtures("ampere")
def test_of_long_rows_nothing_with_a_whole_mask_is_measured_or_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = seconds(monkeypatch, varlen=0.003, flex=0.002, sdpa=0.001)
    long = dataclasses.replace(SHAPE, length=131_072)
    assert with_fastest_attention(ParallelConfig(), rank(), long).attention == "flex"
    later = dataclasses.replace(SHAPE, longest=131_072)  # rows of a later stage, which the same backend computes
    assert with_fastest_attention(ParallelConfig(), rank(), later).attention == "flex"
    assert measured == ["varlen", "flex"] * 2
    odd = dataclasses.replace(long, head_dim=8, dtype=torch.float32)  # which nothing else can compute
    for parallel in (ParallelConfig(), ParallelConfig(deterministic=True)):
        with pytest.raises(ConfigError, match=r"data\.seq_len=131072: .* mask of a row would take 17\.2 GB"):
            with_fastest_attention(parallel, rank(), odd)


@pytest.mark.usefixtures("ampere")
def test_a_backend_that_fails_is_named_and_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seconds(monkeypatch, varlen="out of memory", flex=0.2, sdpa=0.3)
    assert with_fastest_attention(ParallelConfig(), rank(), SHAPE).attention == "flex"
    assert "varlen cannot run here: out of memory" in caplog.text
    seconds(monkeypatch, varlen="no", flex="no", sdpa="no")
    with pytest.raises(HeadraceError, match="no attention can run"):
        with_fastest_attention(ParallelConfig(), rank(), SHAPE)


@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize(
    ("values", "device"),
    [({"attention": "sdpa"}, "cuda"), ({"deterministic": True}, "cuda"), ({}, "cpu")],
)
def test_nothing_is_measured_where_nothing_is_to_choose(
    values: dict[str, object], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = seconds(monkeypatch)
    parallel = ParallelConfig.model_validate(values)
    assert with_fastest_attention(parallel, rank(device=device), SHAPE) == parallel
    assert measured == []


def test_what_is_measured_runs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert attention_choice._fastest(torch.device("cpu"), SHAPE, ("varlen", "sdpa")) in ("varlen", "sdpa")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
