"""Run on every rank: a step that is no number changes nothing, at every ZeRO stage.

One rank's loss in one micro-step is made infinite, with a gradient that is finite, or a weight is; the fingerprint of
weights and optimizer must be the same before and after, on all ranks, and the step after it must change it.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import torch
import xxhash

from pretrain.engine import Engine, StepStats, deepspeed_config, valid_targets
from pretrain.metrics import Meter
from pretrain.topology import ParallelConfig, Topology, started
from tests.distributed.parity import GLOBAL_ROWS, OPTIM, SEED, global_batches, model_config


def fingerprint(engine: Engine) -> str:
    """Of all that a checkpoint would hold of this rank, but for DeepSpeed's count of skipped steps."""
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


def step(engine: Engine, here: Topology, number: int) -> StepStats:
    tokens, segment_ids = global_batches()[number]
    mine = slice(here.dp_rank, None, here.dp_size)
    n_targets = int(valid_targets(segment_ids).sum())
    return engine.train_step(tokens[mine], segment_ids[mine], n_targets, number, 1e-3, Meter())


def poison(engine: Engine, here: Topology) -> None:
    """Makes the loss of the last rank's next micro-batch infinite, and leaves its gradient finite."""
    losses, calls = engine._losses, itertools.count()

    def infinite(tokens: torch.Tensor, segment_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nll, z_loss = losses(tokens, segment_ids)
        first = here.dp_rank == here.dp_size - 1 and next(calls) == 0
        return nll + (math.inf if first else 0.0), z_loss

    engine._losses = infinite  # type: ignore[method-assign]


def main() -> None:
    with started(ParallelConfig()) as here:
        for precision, stage in itertools.product(("bf16", "fp32"), (1, 2, 3)):
            parallel = ParallelConfig.model_validate({"zero_stage": stage})
            ds_config = deepspeed_config(
                parallel, OPTIM, precision, 2, GLOBAL_ROWS // (2 * here.dp_size), here.dp_size, {}
            )
            engine = Engine(model_config(tied=True), OPTIM, parallel, precision, ds_config, here, SEED)
            case = f"{precision}, ZeRO-{stage}"
            assert step(engine, here, 0).applied, case
            before, kept = fingerprint(engine), engine._losses
            poison(engine, here)
            skipped = step(engine, here, 1)
            engine._losses = kept  # type: ignore[method-assign]
            assert (skipped.applied, math.isfinite(skipped.loss)) == (False, False), case
            assert fingerprint(engine) == before, case
            after = step(engine, here, 2)
            assert (after.applied, math.isfinite(after.loss + after.grad_norm)) == (True, True), case
            assert fingerprint(engine) != before, case


if __name__ == "__main__":
    main()
