"""Compare the figures of an interval with what the run recorded. interval, replay -> comparison -> certificate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from pretrain.audit.interval import Figures, Interval, Training
from pretrain.audit.replay import Replay
from pretrain.config import RunConfig
from pretrain.model.architecture import Precision
from pretrain.run.starts import StartRecord

_NUMBERS, _HASHES = ("loss", "grad_norm"), ("weight_hash", "optimizer_hash")
BATCHES = ("batch_hash", "trained_hash")  # chains of what was read, and of what was trained on
_RATE_TOLERANCE = 1e-9  # relative; the schedule is computed in double precision, by other libraries elsewhere
# Parts of `parallel` that change no bit, or are compared as part of the layout and the environment
_COMPARED_ELSEWHERE = {"timeout_minutes", "attention", "tp_size", "sp_size", "zero_stage"}


class Tolerance(NamedTuple):
    """The relative deviation that another order of summation explains; it grows, since training is chaotic.

    Attributes:
        first: of the first step that is trained from equal weights.
        most: however many steps follow.
    """

    first: float
    most: float

    def at(self, index: int) -> float:
        """Return the tolerance of the `index`-th step of an interval, counted from 0."""
        doublings = min(index / _DOUBLING_STEPS, _DOUBLINGS)
        return min(self.first * 2**doublings, self.most)


_DOUBLING_STEPS = 5
_DOUBLINGS = 100  # far beyond what any tolerance allows, and no overflow
# By figure. docs/reliability.md says what was measured.
TOLERANCES: dict[Precision, dict[str, Tolerance]] = {
    "fp32": {"loss": Tolerance(1e-6, 1e-2), "grad_norm": Tolerance(1e-5, 0.2)},
    "bf16": {"loss": Tolerance(3e-4, 1e-2), "grad_norm": Tolerance(3e-3, 0.2)},
}


class Difference(NamedTuple):
    """A figure that differs by more than the comparison allows; `step` is the steps done when it was taken."""

    step: int
    figure: str
    recorded: str | float | None
    found: str | float | None


@dataclass(frozen=True)
class Comparison:
    """The outcome of an audit.

    Attributes:
        recorded, found: what was compared.
        tolerances: by figure; None if every bit was compared.
        obstacles: why bits could not be expected to be equal; empty without a tolerance.
        differences: in the order in which they came about.
        deviations: the largest relative ones of all steps, of those figures that have any.
    """

    recorded: Interval
    found: Interval
    tolerances: dict[str, Tolerance] | None
    obstacles: list[str]
    differences: list[Difference]
    deviations: dict[str, float]

    @property
    def agrees(self) -> bool:
        """Return whether the run is what it says that it is, as far as this comparison goes."""
        return not self.differences

    def differs(self, step: int, figure: str) -> bool:
        """Return whether a figure of a step differs."""
        return any((found.step, found.figure) == (step, figure) for found in self.differences)


def compare(recorded: Interval, found: Interval, precision: Precision, obstacles: list[str]) -> Comparison:
    """Compare an interval's figures: bit for bit or, if there are obstacles to that, within a tolerance.

    Batches and the weights that the interval begins with are always compared bit for bit.
    """
    tolerances = TOLERANCES[precision] if obstacles else None
    steps = list(zip(recorded.steps, found.steps, strict=True))
    differences = list(_different(recorded.before, found.before, (*BATCHES, *_HASHES)))
    for index, (before, after) in enumerate(steps):
        differences += _differences_of_step(before, after, index, tolerances)
    deviations = {
        figure: max(deviation(getattr(before, figure), getattr(after, figure)) for before, after in steps)
        for figure in _NUMBERS
    }
    return Comparison(recorded, found, tolerances, obstacles, differences, deviations)


def deviation(recorded: float | None, found: float | None) -> float:
    """Return the relative deviation of a figure, infinite if only one of the two is a number."""
    if recorded is None or found is None:
        return 0.0 if recorded is found else float("inf")
    if recorded == found:
        return 0.0
    return abs(found - recorded) / abs(recorded) if recorded else float("inf")


def _differences_of_step(
    recorded: Figures, found: Figures, index: int, tolerances: dict[str, Tolerance] | None
) -> Iterator[Difference]:
    yield from _different(recorded, found, BATCHES)
    limits = {figure: tolerances[figure].at(index) if tolerances else 0.0 for figure in _NUMBERS}
    for figure, limit in {"learning_rate": _RATE_TOLERANCE, **limits}.items():
        values = getattr(recorded, figure), getattr(found, figure)
        if deviation(*values) > limit:
            yield Difference(found.step, figure, *values)
    if tolerances is None:
        yield from _different(recorded, found, _HASHES)


def _different(recorded: Figures, found: Figures, figures: tuple[str, ...]) -> Iterator[Difference]:
    """Yield those of some figures that are not equal, without those that the run did not record."""
    for figure in figures:
        values = getattr(recorded, figure), getattr(found, figure)
        if values[0] is not None and values[0] != values[1]:
            yield Difference(found.step, figure, *values)


def obstacles_to_equality(training: Training, replay: Replay) -> list[str]:
    """Say why an honest run's bits may differ from an audit's; empty if all that decides them is the same."""
    if not training.starts:
        return ["the run did not record what it was trained with, since an older version began it"]
    found: list[str] = []
    audited = _conditions(replay.start, replay.config)
    for start, config in zip(training.starts, training.recorded, strict=True):
        recorded = _conditions(start, config)
        found += [
            f"{name}: the run had {recorded.get(name)}, the audit {audited.get(name)}"
            for name in dict.fromkeys((*audited, *recorded))
            if recorded.get(name) != audited.get(name)
        ]
    if replay.start.environment.threads is None and not replay.config.parallel.deterministic:
        found.append("parallel.deterministic is off, so that a GPU may sum in another order each time")
    return list(dict.fromkeys(found))


def _conditions(start: StartRecord, config: RunConfig) -> dict[str, object]:
    """Return all that decides bits, besides data, model and schedule, by name."""
    environment = start.environment
    conditions: dict[str, object] = {"layout": str(start.layout)}
    conditions |= {name: getattr(environment, name) for name in ("devices", "threads", "attention")}
    conditions |= environment.packages
    parallel = config.parallel.model_dump(mode="json", exclude=_COMPARED_ELSEWHERE)
    conditions |= {f"parallel.{key}": value for key, value in parallel.items()}
    for i, stage in enumerate(config.all_stages):
        section = f"stages.{i - 1}.train" if i else "train"
        conditions[f"{section}.micro_batch_size"] = stage.micro_batch_size(start.dp_size)
    return conditions
