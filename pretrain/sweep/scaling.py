"""From small runs to a large one: its learning rate, loss and time. {runs, fits} -> scaling -> commands.scale."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.table import Table

from pretrain.report.figures import duration
from pretrain.sweep.fits import Prediction, line, lowest_of_parabola, power_law
from shards import ConfigError

LEAST_SIZES = 3  # below which nothing is extrapolated
_SAME = 1.1  # times another's compute, up to which it counts as the same
_FAR = 100.0  # times the largest run's compute, beyond which a prediction is called a guess


class Size(NamedTuple):
    """What a training amounts to.

    Attributes:
        width: model.dim.
        parameters: of the whole model.
        tokens: trained on.
        flops: of all of them, forward and backward.
    """

    width: int
    parameters: int
    tokens: int
    flops: float

    @property
    def tokens_per_parameter(self) -> float:
        return self.tokens / self.parameters


@dataclass(frozen=True)
class SmallRun:
    """A finished run.

    Attributes:
        settings: what else its config has that differs from other runs', without learning rate and seed.
        loss: infinite if it is not finite.
        flops_per_second: usual, of the model's own arithmetic.
        devices: on which it was trained.
    """

    size: Size
    learning_rate: float
    settings: str
    loss: float
    flops_per_second: float
    devices: str


@dataclass(frozen=True)
class SizeFound:
    """The runs of one size, width and compute, with the settings under which they came to the lowest loss.

    Attributes:
        losses: mean over the seeds, by learning rate.
        best_rate: at the bottom of a parabola through the lowest loss and its neighbours; None if the lowest is at the
            edge of the rates tried, or there are too few.
    """

    size: Size
    runs: Sequence[SmallRun]
    losses: Mapping[float, float]
    best_rate: float | None

    @property
    def loss(self) -> float:
        return min(self.losses.values())


def sizes_of(runs: Sequence[SmallRun]) -> list[SizeFound]:
    """Put runs together by width and compute, and take the best settings of each; by compute."""
    alike: dict[str, list[SmallRun]] = defaultdict(list)
    for run in runs:
        alike[run.settings].append(run)
    by_width: dict[int, list[SizeFound]] = defaultdict(list)
    for members in alike.values():
        by_width[members[0].size.width].append(_found(members))
    return sorted((one for found in by_width.values() for one in _best_of_each(found)), key=_flops)


def _flops(found: SizeFound) -> float:
    return found.size.flops


def _best_of_each(sizes: Sequence[SizeFound]) -> list[SizeFound]:
    """Return the one with the lowest loss of each compute, by compute; those that diverged are none."""
    best: list[SizeFound] = []
    least = 0.0  # of the last one's group
    for found in sorted(sizes, key=_flops):
        if not math.isfinite(found.loss):
            continue
        if best and found.size.flops < _SAME * least:
            best[-1] = min(best[-1], found, key=lambda one: one.loss)
        else:
            best.append(found)
            least = found.size.flops
    return best


def _found(members: Sequence[SmallRun]) -> SizeFound:
    by_rate: dict[float, list[float]] = defaultdict(list)
    for run in members:
        by_rate[run.learning_rate].append(run.loss)
    losses = {rate: statistics.fmean(by_rate[rate]) for rate in sorted(by_rate)}
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    bottom = lowest_of_parabola([*map(math.log, finite)], [*finite.values()])
    return SizeFound(members[0].size, members, losses, None if bottom is None else math.exp(bottom))


def size_table(sizes: Sequence[SizeFound], figure: str) -> Table:
    """Show each size with the best of its runs."""
    table = Table(title=f"{sum(len(found.runs) for found in sizes)} runs, {len(sizes)} sizes")
    for head in ("width", "parameters", "tokens", "a parameter", "FLOPs", "rates", "best rate", figure):
        table.add_column(head, justify="right")
    for found in sizes:
        size = found.size
        rate = "at the edge" if found.best_rate is None else f"{found.best_rate:.3g}"
        table.add_row(
            f"{size.width:,}", f"{size.parameters:,}", f"{size.tokens:,}", f"{size.tokens_per_parameter:.3g}",
            f"{size.flops:.3g}", str(len(found.losses)),
            rate if len(found.losses) > 2 else "too few rates", f"{found.loss:.4f}",
        )  # fmt: skip
    return table


def advice(sizes: Sequence[SizeFound], target: Size, figure: str) -> Iterator[str]:
    """Yield what to expect of a target, and what to set for it, a sentence or two each.

    Raises:
        ConfigError: if there are too few sizes to extrapolate from.
    """
    frontier = _best_of_each(sizes)
    if len(frontier) < LEAST_SIZES:
        raise ConfigError(
            f"these runs are of {len(frontier)} sizes, and two points fit every curve: finish runs of at least"
            f" {LEAST_SIZES} amounts of compute, of other widths, depths or numbers of tokens"
        )
    yield _rate_advice(sizes, target)
    yield from _loss_advice(frontier, target, figure)
    yield _time_advice(frontier[-1], target)


def _rate_advice(sizes: Sequence[SizeFound], target: Size) -> str:
    known = [(found.size.width, found.best_rate) for found in sizes if found.best_rate is not None]
    if (count := len({width for width, _ in known})) < LEAST_SIZES:
        return (
            f"learning rate: not told, since only {count} widths have their lowest loss between two of the rates tried;"
            f" {LEAST_SIZES} are needed"
        )
    widths, rates = ([math.log(value) for value in values] for values in zip(*known, strict=True))
    slope, logarithm, _ = line(widths, rates, math.log(target.width))
    rate = logarithm.exponential()
    return (
        f"learning rate: set optim.learning_rate={rate.value:.3g}, {_interval(rate)}; the best one goes with the"
        f" width to the power {slope:+.2f}"
    )


def _loss_advice(sizes: Sequence[SizeFound], target: Size, figure: str) -> Iterator[str]:
    fit = power_law([found.size.flops for found in sizes], [found.loss for found in sizes], target.flops)
    if fit.exponent <= 0:
        losses = ", ".join(f"{found.loss:.3f}" for found in sizes)
        yield f"{figure}: not told, since it does not fall with the compute: {losses}, by compute"
        return
    points, ahead = f"{len(sizes)} points", target.flops / sizes[-1].size.flops
    offset = f"{fit.offset:.3g} and a part that goes" if fit.offset else "it goes"
    few = f"; an offset cannot be told from {points}" if len(sizes) == LEAST_SIZES else ""
    curve = f"{offset} with the compute to the power {-fit.exponent:.3g}{few}"
    yield f"{figure}: {fit.expected.value:.3f}, {_interval(fit.expected)}; {curve}"
    far = ", more a guess than a prediction" if ahead > _FAR else ""
    yield f"the target takes {target.flops:.3g} FLOPs, {ahead:.3g} times those of the largest of {points}{far}"
    ratios = [found.size.tokens_per_parameter for found in sizes]
    if not min(ratios) / 2 <= target.tokens_per_parameter <= 2 * max(ratios):
        longer = "longer" if target.tokens_per_parameter > max(ratios) else "shorter"
        yield (
            f"the target has {target.tokens_per_parameter:.3g} tokens a parameter, the runs {min(ratios):.3g} to"
            f" {max(ratios):.3g}: they say little about a model that is trained for so much {longer}"
        )


def _time_advice(largest: SizeFound, target: Size) -> str:
    speeds = [run.flops_per_second for run in largest.runs if run.flops_per_second > 0]
    if not speeds:
        return "time: not told, since the runs recorded no speed"
    usual = statistics.median(speeds)
    devices = "; ".join(dict.fromkeys(run.devices for run in largest.runs))
    spread = f" ({duration(target.flops / max(speeds))} to {duration(target.flops / min(speeds))})"
    return (
        f"time: {duration(target.flops / usual)}{spread if len(speeds) > 1 else ''} of training steps at the"
        f" {usual:.3g} FLOP/s of the largest runs, on {devices}; evaluations and saves come on top, and other models or"
        " layouts have another speed"
    )


def _interval(expected: Prediction) -> str:
    return f"95 % interval {expected.low:.3g} to {expected.high:.3g}"
