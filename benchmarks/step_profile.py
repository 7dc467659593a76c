"""Where a training step's time goes, by kind of work, from torch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.profiler import ProfilerActivity, profile

# What an operation inside a region counts as, whatever it is itself, and what one is otherwise; the first match counts.
# Matrix products count as such in every region but attention.
REGIONS = (
    ("attention", ("attention",)),
    ("optimizer", ("optimizer", "Optimizer.step")),
    ("collectives", ("c10d::", "gloo:")),
    ("loss", ("CrossEntropy", "LossWithGradients", "log_softmax", "LogSoftmax", "nll_loss", "NllLoss")),
)
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear")
KINDS = (
    ("fused by the compiler", ("CompiledFxGraph",)),
    (
        "copies and casts",
        ("aten::copy_", "aten::_to_copy", "aten::clone", "aten::cat", "aten::fill_", "ToCopyBackward"),
    ),
)


def step_profile(step: Callable[[], object], steps: int) -> dict[str, float]:
    """Profile some steps; return milliseconds a step of each kind of work, the largest first."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
    spent: dict[str, float] = {}
    for event in profiler.events():
        kind = kind_of(event)
        spent[kind] = spent.get(kind, 0.0) + event.self_cpu_time_total / 1e3 / steps
    return dict(sorted(spent.items(), key=lambda item: -item[1]))


def kind_of(event: Any) -> str:
    """Name the kind of work of an event by its own name and those of the regions that it lies in."""
    names = list(_upwards(event))
    regions = [region for region, parts in REGIONS if any(part in name for part in parts for name in names)]
    if "attention" in regions:
        return "attention"
    if event.name in PRODUCTS:
        return "matrix products"
    if regions:
        return regions[0]
    return next((kind for kind, parts in KINDS if any(part in event.name for part in parts)), "other")


def _upwards(event: Any) -> Iterator[str]:
    while event is not None:
        yield event.name
        event = event.cpu_parent
