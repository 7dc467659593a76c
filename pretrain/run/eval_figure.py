"""A line of evals.jsonl, and a figure of it, named as in wandb: eval/macro/perplexity. evals.jsonl -> {store, ...}.

Figures are compared as costs, of which the lowest is the best.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pretrain.run.step_log import step_of
from shards import ConfigError

_HIGHER_IS_BETTER = "accuracy"
_OF_BYTES = "bits_per_byte"
AVERAGES = ("macro", "micro")  # domains that are averages over those of a suite
AVERAGED = "ema:"  # prefix of a line's domain, if the moving average of the weights was scored
UNIT_OF = {_OF_BYTES: "bits per byte", "nll_per_token": "nats per token"}  # of a loss in evals.jsonl
# Of a config's key: a domain, `source:NAME`, macro or micro, and the figure of its line in evals.jsonl
EVAL_FIGURE = rf"^eval/.+/(nll_per_token|perplexity|{_OF_BYTES}|{_HIGHER_IS_BETTER})$"


def is_of_task(record: Mapping[str, object]) -> bool:
    """Return whether a line of evals.jsonl is that of a task; otherwise it is of a domain or an average of a suite."""
    return "metric" in record


def is_average(record: Mapping[str, object]) -> bool:
    """Return whether a line of evals.jsonl is an average over the domains of a suite."""
    return not is_of_task(record) and str(record["domain"]).removeprefix(AVERAGED) in AVERAGES


def depths_of(record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the figures by depth in a line of evals.jsonl of needles; none in any other line."""
    return record.get("by_depth") or {}


def contexts_of(record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the figures by the tokens of context in a line of evals.jsonl; none in those of tasks and old programs."""
    return record.get("by_context") or {}


def described_depths(record: Mapping[str, Any]) -> str:
    """Write the accuracy at each depth of needles, for a message; nothing of any other line."""
    by_depth = depths_of(record)
    found = ", ".join(f"{depth}: {figures['accuracy']:.2f}" for depth, figures in by_depth.items())
    return f"; at depth {found}" if found else ""


def knows_bytes(record: Mapping[str, object]) -> bool:
    """Return whether a line of evals.jsonl counts bytes, as all do but those of token ids without their texts."""
    return record.get("bytes", 0) is not None


def loss_key(records: Iterable[Mapping[str, object]]) -> str:
    """Return the figure by which lines of evals.jsonl are compared: nats per token if one of them counts no bytes."""
    return _OF_BYTES if all(map(knows_bytes, records)) else "nll_per_token"


def no_bytes(figure: str, suite: str) -> str:
    """Say why a suite has no bits per byte, and what to compare instead."""
    return (
        f"{figure}: the suite {suite} holds token ids without their texts there, so its bytes are unknown; name "
        "the texts with text_key beside its input_ids_key, or take nll_per_token"
    )


class EvalFigure(NamedTuple):
    """A figure of a domain or an average."""

    domain: str
    name: str

    @classmethod
    def parse(cls, text: str) -> EvalFigure:
        """Read a name that matches `EVAL_FIGURE`."""
        _, domain_and_name = text.split("/", 1)
        return cls(*domain_and_name.rsplit("/", 1))

    @property
    def needs_bytes(self) -> bool:
        """Return whether it is known only where the bytes of the texts are."""
        return self.name == _OF_BYTES

    @property
    def is_loss(self) -> bool:
        """Return whether a lower value is better, so that its costs are its values."""
        return self.name != _HIGHER_IS_BETTER

    def cost(self, record: Mapping[str, object]) -> float:
        """Return the cost in a line of evals.jsonl; infinite if the figure is not finite, which is null in the file.

        Raises: ConfigError for bits per byte of a suite that does not know its bytes.
        """
        if self.needs_bytes and not knows_bytes(record):
            raise ConfigError(no_bytes(f"{self.domain}/{self.name}", str(record["suite"])))
        value = math.nan if record[self.name] is None else float(str(record[self.name]))
        if not math.isfinite(value):
            return math.inf
        return value if self.is_loss else -value

    def costs(self, records: Iterable[Mapping[str, object]], suite: str) -> dict[int, float]:
        """Return the cost at each step that was evaluated on a suite, in the order of the steps."""
        wanted = {"suite": suite, "domain": self.domain}
        found = {step_of(r): self.cost(r) for r in records if all(r[key] == wanted[key] for key in wanted)}
        return dict(sorted(found.items()))


def best_step(costs: Mapping[int, float], steps: Iterable[int]) -> int | None:
    """Return the step with the lowest cost, the first of equals; None if none of the steps has one."""
    return min((step for step in steps if step in costs), key=lambda step: (costs[step], step), default=None)


def perplexity(nll_per_token: float) -> float:
    """Return exp of a loss in nats; infinite beyond a float's range, so a diverged model cannot crash the run."""
    return math.exp(nll_per_token) if nll_per_token < 700 else math.inf
