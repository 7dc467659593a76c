"""Check on every rank that a non-finite step leaves no trace, whatever the stage, the offload and the precision.

Usage: python -m tests.distributed.nonfinite TP_SIZE

One engine takes bad steps between its good ones: before the first, one in which one micro-step's loss is infinite with
a finite gradient, one in which one rank's slice of a weight gets a gradient of NaN, and two that are refused as spikes,
by loss and by gradient norm. Another engine takes only the good steps. Both must agree
to the last bit, in their figures and in all that a checkpoint would hold.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash

from pretrain.deepspeed_keys import deepspeed_config
from pretrain.engine import Engine
from pretrain.model.loss import Loss
from pretrain.model.pieces import valid_targets
from pretrain.parallel_config import ParallelConfig
from pretrain.run.metrics import Meter
from pretrain.step_stats import NO_LIMITS, Limits, StepStats
from pretrain.topology import Topology, started
from tests.distributed.parity import GLOBAL_ROWS, OPTIM, SEED, global_batches, model_config

# ZeRO stage, what is offloaded, and whether a step is a single micro-step
STATES = [
    (1, "none", False),
    (1, "optimizer", False),
    (1, "optimizer", True),
    (2, "none", False),
    (2, "optimizer", False),
    (2, "optimizer", True),
    (3, "none", False),
    (3, "optimizer", False),
    (3, "optimizer", True),
    (3, "parameters", False),
]


def fingerprint(engine: Engine) -> str:
    """Hash everything that a checkpoint would hold of this rank, except for DeepSpeed's counts of steps."""
    found = xxhash.xxh3_128()

    def add(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            found.update(item.detach().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(item, dict):
            for value in item.values():
                add(value)
        elif isinstance(item, list | tuple):
            for value in item:
                add(value)

    engine.save(Path("unused"), lambda path, content: add(content))
    return found.hexdigest()


def step(engine: Engine, here: Topology, number: int, limits: Limits = NO_LIMITS) -> StepStats:
    tokens, segment_ids = global_batches()[number]
    mine = slice(here.dp_rank, None, here.dp_size)
    n_targets = int(valid_targets(segment_ids).sum())
    return engine.train_step(tokens[mine], segment_ids[mine], n_targets, number, 1e-3, Meter(), limits=limits)


@contextlib.contextmanager
def infinite_loss(engine: Engine, here: Topology) -> Iterator[None]:
    """Make the loss of the last dp rank's first micro-batch infinite, but keep its gradient finite."""
    forward, calls = engine._forward, itertools.count()

    def infinite(tokens: torch.Tensor, segment_ids: torch.Tensor) -> Loss:
        loss = forward(tokens, segment_ids)
        first = here.dp_rank == here.dp_size - 1 and next(calls) == 0
        return loss._replace(total=loss.total + (math.inf if first else 0.0))

    engine._forward = infinite  # type: ignore[method-assign]
    yield
    engine._forward = forward  # type: ignore[method-assign]


@contextlib.contextmanager
def undefined_gradient(engine: Engine, here: Topology) -> Iterator[None]:
    """Make the gradient of one weight NaN on the last rank only; the other slices of a split weight stay finite."""
    weight = engine.model.blocks[0].feed_forward.w2.weight
    factor = math.nan if here.rank == here.world_size - 1 else 1.0
    hook = weight.register_hook(lambda gradient: gradient * factor)
    yield
    hook.remove()


def history(here: Topology, stage: int, offload: str, precision: str, micro: int, with_bad: bool) -> list[object]:
    """Return figures and fingerprints of two good steps."""
    parallel = ParallelConfig.model_validate({"tp_size": here.tp_size, "zero_stage": stage, "offload": offload})
    micro_steps = GLOBAL_ROWS // (micro * here.dp_size)
    derived = deepspeed_config(parallel, OPTIM, precision, {})
    model = model_config(tied=True).model_copy(update={"n_layers": 1})
    engine = Engine(model, OPTIM, parallel, derived, micro, micro_steps, here, SEED)
    found: list[object] = []
    for number in range(2):
        if with_bad:
            for bad in (infinite_loss, undefined_gradient):
                with bad(engine, here):
                    stats = step(engine, here, 3)
                assert (stats.applied, math.isinf(stats.grad_norm)) == (False, True), stats
                assert not found or fingerprint(engine) == found[-1], f"changed by {bad.__name__}"
            for limits in (Limits(loss=0.1), Limits(grad_norm=1e-6)):
                refused = step(engine, here, 3, limits)
                assert (refused.applied, refused.refused) == (False, True), refused
                assert not found or fingerprint(engine) == found[-1], f"changed by {limits}"
            assert 0 < refused.grad_norm < math.inf, "what was refused is known"
        stats = step(engine, here, number, Limits(1e9, 1e9) if with_bad else NO_LIMITS)
        assert stats.applied, f"{stats} after a bad step: {with_bad}"
        found += [stats, fingerprint(engine)]
    return found


def main() -> None:
    gc.freeze()  # DeepSpeed collects garbage again and again
    with started(ParallelConfig(tp_size=int(sys.argv[1]))) as here:
        # Offload takes another path if a step is a single micro-step. Each state is tried in both precisions, one with
        # tensor parallelism and the other without.
        for number, (stage, offload, is_single) in enumerate(STATES, int(sys.argv[1])):
            precision, micro = ("fp32", "bf16")[number % 2], GLOBAL_ROWS // here.dp_size if is_single else 2
            case = f"{precision}, ZeRO-{stage}, offload {offload}, micro-batches of {micro}"
            try:
                plain = history(here, stage, offload, precision, micro, with_bad=False)
                assert history(here, stage, offload, precision, micro, with_bad=True) == plain
            except AssertionError as error:
                error.add_note(case)
                raise


if __name__ == "__main__":
    main()
