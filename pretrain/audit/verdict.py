"""Say in a sentence or two what a comparison shows, and no more. comparison -> verdict -> {certificate, command}."""

from __future__ import annotations

from pretrain.audit.comparison import BATCHES, Comparison, Difference
from pretrain.audit.interval import Figures

_EITHER = "in the run or in this audit, which a second audit on another node can tell"
_HASHES = ("weight_hash", "optimizer_hash")


def verdict(comparison: Comparison) -> str:
    """Describe the agreement, or the kind of fault that the first difference points to."""
    if comparison.agrees:
        return _agreement(comparison)
    first = comparison.differences[0]
    if first.step == comparison.found.before.step:
        return _altered_checkpoint(comparison, first)
    return _faulty_step(comparison, first)


def _agreement(comparison: Comparison) -> str:
    recorded = comparison.recorded
    if comparison.tolerances is None:
        hashed = sum(figures.weight_hash is not None for figures in recorded.steps)
        weights = f", and the weights and moments of the {hashed} that were hashed" if hashed else ""
        text = f"The run agrees bit for bit in {recorded.described}: batches, losses and gradient norms{weights}."
    else:
        last = len(recorded.steps) - 1
        loss, norm = (
            f"{comparison.deviations[figure]:.1e} (allowed: {tolerance.at(0):.1e} at the first step,"
            f" {tolerance.at(last):.1e} at the last)"
            for figure, tolerance in comparison.tolerances.items()
        )
        text = (
            f"The run agrees in {recorded.described}: the same batches, losses within {loss}, gradient norms within"
            f" {norm}. A fault with a smaller effect is not excluded; an audit in the run's own layout, on its kind of"
            " device, would show it."
        )
    return f"{text} {_of_checkpoint(comparison)}"


def _of_checkpoint(comparison: Comparison) -> str:
    before = comparison.recorded.before
    if before.step == 0:
        return "It was trained from its first weights on."
    if before.weight_hash is None:
        return (
            f"The checkpoint of step {before.step} was taken as it is, since metrics.jsonl has no hash of that step's"
            " weights."
        )
    return f"The checkpoint of step {before.step} holds the weights and moments that the run had then, bit for bit."


def _altered_checkpoint(comparison: Comparison, first: Difference) -> str:
    """Describe a state that is not the recorded one before any step is trained."""
    step = first.step
    if first.figure in BATCHES:
        return (
            f"The checkpoint of step {step} and metrics.jsonl do not belong to one history: the checkpoint has seen the"
            f" batches {first.found}, the record says {first.recorded}. One of the two was altered, or comes from"
            " another run."
        )
    what = " and ".join(
        name for figure, name in zip(_HASHES, ("weights", "moments"), strict=True) if comparison.differs(step, figure)
    )
    text = (
        f"The checkpoint of step {step} does not hold the {what} that the run hashed after that step, although its"
        " files are those that COMPLETE lists."
    )
    later = next((found for found in comparison.differences if found.step > step), None)
    if later is None and comparison.tolerances is None:
        return (
            f"{text} The steps trained from it agree bit for bit, so the run went on with just these values: they had"
            f" changed in memory between the hash and the save, or the record of step {step} was altered."
        )
    if later is None:
        return (
            f"{text} It was altered after the hash was taken, by a fault in memory, while it was saved or by hand, too"
            " little to show in the losses; or the record was."
        )
    return (
        f"{text} The steps trained from it differ too, from step {later.step} on: the run itself went on with other"
        " values. The checkpoint was damaged while it was saved, or altered since and signed again."
    )


def _faulty_step(comparison: Comparison, first: Difference) -> str:
    """Describe what the first difference of a step that was trained points to."""
    step, values = first.step, f"recorded {first.recorded}, found {first.found}"
    if first.figure in BATCHES:
        return (
            f"Step {step} was trained on another batch than data, config and seed give now ({values}): shards,"
            " tokenizer, a list of forgotten documents or the program have changed since, or the record was altered."
            " Its other figures say nothing."
        )
    if first.figure == "learning_rate":
        return f"Step {step} was trained at another learning rate than its config gives ({values}): one was altered."
    if again := _agrees_again(comparison, step):
        return (
            f"The {_name(first.figure)} of step {step} is not what the record says ({values}), yet the weights after"
            f" step {again.step} agree bit for bit: the training was right, and the record of step {step} is not."
        )
    since = _last_agreed(comparison, step)
    same = "its batch is the same" + (
        f", and so were the weights after step {since.step}, bit for bit" if since else ""
    )
    if comparison.tolerances is not None:
        return (
            f"The {_name(first.figure)} of step {step} differs by more than another order of summation explains"
            f" ({values}), although {same}: weights or arithmetic were corrupted, {_EITHER}."
        )
    place = _place(first, since)
    return f"The {_name(first.figure)} of step {step} differs ({values}), although {same}: {place}, {_EITHER}."


def _place(first: Difference, since: Figures | None) -> str:
    """Say what can have gone wrong where bits are compared, given that all figures before are equal."""
    step = first.step
    if first.figure in _HASHES:
        return f"an update up to that of step {step}, or what it had written to memory, was corrupted"
    earlier = "" if since and since.step == step - 1 else f"an update up to that of step {step - 1}, "
    passes = "forward pass" if first.figure == "loss" else "forward or backward pass or the sum of gradients"
    return f"{earlier}a weight in memory or the {passes} of step {step} was corrupted"


def _agrees_again(comparison: Comparison, step: int) -> Figures | None:
    """Return the first later step whose weights agree bit for bit, if nothing after `step` differs."""
    if comparison.tolerances is not None or any(found.step > step for found in comparison.differences):
        return None
    return next((figures for figures in comparison.recorded.steps if figures.step > step and figures.weight_hash), None)


def _last_agreed(comparison: Comparison, step: int) -> Figures | None:
    """Return the last step before `step` whose weights were compared, and agreed."""
    recorded = comparison.recorded
    compared = [recorded.before] if comparison.tolerances else [recorded.before, *recorded.steps]
    return next((figures for figures in reversed(compared) if figures.step < step and figures.weight_hash), None)


def _name(figure: str) -> str:
    names = {"loss": "loss", "grad_norm": "gradient norm", "weight_hash": "weights' hash"}
    return names.get(figure, "moments' hash")
