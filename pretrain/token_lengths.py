"""Lengths that a config gives in tokens, in optimizer steps. config_file -> token_lengths -> config.

A step has as many tokens as its batch has rows times seq_len, padding included, so this is a pure function of the
config. What is written down of a run has steps only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

_TOKENS = re.compile(r"(\d[\d_]*(?:\.\d+)?(?:[eE]\+?\d+)?) ?([KMBT]?) tokens?")
_UNITS = {"": 0, "K": 3, "M": 6, "B": 9, "T": 12}  # powers of ten

Tree = Mapping[str, Any]


def tokens_of(value: object) -> int | None:
    """Return the number in a text such as `20e9 tokens` or `1.5B tokens`, rounded up; None for any other value."""
    found = _TOKENS.fullmatch(value) if isinstance(value, str) else None
    return math.ceil(Decimal(found[1]).scaleb(_UNITS[found[2]])) if found else None


class Pace(NamedTuple):
    """How many tokens a step has: from each of these steps on, so many."""

    parts: Sequence[tuple[int, int]]

    def tokens_until(self, step: int) -> int:
        """Return the tokens of the steps up to one, padding included."""
        ends = [*(begin for begin, _ in self.parts[1:]), step]
        return sum(max(0, min(end, step) - begin) * each for (begin, each), end in zip(self.parts, ends, strict=True))

    def steps_for(self, tokens: int, begin: int = 0) -> int:
        """Return how many steps from `begin` on have at least so many tokens; at least one."""
        reached = 0
        for i, (first, each) in enumerate(self.parts):
            first = max(first, begin)
            is_last = i + 1 == len(self.parts)
            length = 0 if is_last else max(0, self.parts[i + 1][0] - first)
            if is_last or tokens <= reached + each * length:
                return max(1, first - begin - (reached - tokens) // each)
            reached += each * length
        raise AssertionError

    def last_steps_for(self, tokens: int, end: int) -> int:
        """Return how many steps up to `end` have at least so many tokens; at least one, and no more than there are."""
        reached, stop = 0, end
        for first, each in reversed(self.parts):
            if first < stop:
                if tokens <= reached + each * (stop - first):
                    return max(1, end - stop - (reached - tokens) // each)
                reached, stop = reached + each * (stop - first), first
        return end


def in_steps(tree: Tree) -> Tree:
    """Return a run's config with every length in steps.

    These are train.steps, stages[].step, and the warmup_steps and decay_steps of the schedules. What is no such text
    stays as it is, right or wrong, and so does everything if the size of a batch is unknown.
    """
    stages = tree.get("stages") or []
    if not isinstance(stages, list | tuple):
        return tree
    if not all(map(_is_section, (tree.get("data"), tree.get("train"), *stages))):
        return tree
    seq_len, rows = tree["data"].get("seq_len"), tree["train"].get("global_batch_size")
    pace, found = Pace([]), []
    for stage in ({"step": 0}, *stages):
        step = _in_steps(stage.get("step"), pace.steps_for)
        data, train = ({**stage[key]} if _is_section(stage.get(key)) else {} for key in ("data", "train"))
        seq_len, rows = data.get("seq_len") or seq_len, train.get("global_batch_size") or rows
        if not all(isinstance(value, int) for value in (step, seq_len, rows)) or seq_len * rows < 1:
            return tree
        pace = Pace([*pace.parts, (step, seq_len * rows)])
        found.append({**stage, "step": step})
    train = {**tree["train"]}
    if "steps" in train:
        train["steps"] = _in_steps(train["steps"], pace.steps_for)
    owners = [tree, *found[1:]]
    begins = [stage["step"] for stage in found]
    new = [
        {**owner, "optim": _schedule_in_steps(owner["optim"], begin, _end(i, owners, begins, train.get("steps")), pace)}
        if _is_section(owner.get("optim"))
        else owner
        for i, (owner, begin) in enumerate(zip(owners, begins, strict=True))
    ]
    return {**new[0], "train": train} | ({"stages": new[1:]} if stages else {})


def _is_section(value: object) -> bool:
    return isinstance(value, Mapping)


def _in_steps(value: Any, steps_for: Callable[[int], int]) -> Any:
    tokens = tokens_of(value)
    return value if tokens is None else steps_for(tokens)


def _end(number: int, owners: Sequence[Tree], begins: Sequence[int], steps: Any) -> Any:
    """Return the step at which a schedule ends: the run's own and the last one end with it, others where one begins."""
    later = (begins[i] for i in range(number + 1, len(owners)) if number and owners[i].get("optim") is not None)
    return next(later, steps)


def _schedule_in_steps(optim: Tree, begin: int, end: Any, pace: Pace) -> Tree:
    """Return a schedule with its warm-up, counted from its begin, and its decay, counted from its end, in steps."""

    def of_decay(tokens: int) -> int:
        return pace.last_steps_for(tokens, end) if isinstance(end, int) else pace.steps_for(tokens)

    def of_warmup(tokens: int) -> int:
        return pace.steps_for(tokens, begin)

    rules = {"warmup_steps": of_warmup, "decay_steps": of_decay}
    return {**optim, **{key: _in_steps(optim[key], rule) for key, rule in rules.items() if key in optim}}
