"""Check on every rank that each DeepSpeed key that a config may set changes no figures, files or resumes.

Usage: python -m tests.distributed.deepspeed_keys FOLDER

With a key, a run must compute the same figures as without it, save the same weights and moments for every reader,
go back to what was saved without it, and save what a run without it goes back to; all to the last bit.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.zero_files import read_partitions, whole
from pretrain.deepspeed_keys import ALLOWED, deepspeed_config
from pretrain.engine import Engine
from pretrain.parallel_config import ParallelConfig
from pretrain.step_stats import StepStats
from pretrain.topology import Topology, started
from tests.distributed.nonfinite import step
from tests.distributed.parity import GLOBAL_ROWS, OPTIM, SEED, model_config

# For each key, a value far from DeepSpeed's default and small enough to matter to a small model.
VALUES: dict[str, int | bool] = {
    "dump_state": True,
    "memory_breakdown": True,
    "zero_optimization.allgather_bucket_size": 500,
    "zero_optimization.allgather_partitions": False,
    "zero_optimization.ignore_unused_parameters": False,
    "zero_optimization.reduce_bucket_size": 500,
    "zero_optimization.reduce_scatter": False,
    "zero_optimization.stage3_max_live_parameters": 0,
    "zero_optimization.stage3_max_reuse_distance": 0,
    "zero_optimization.stage3_model_persistence_threshold": 100,
    "zero_optimization.stage3_param_persistence_threshold": 0,
    "zero_optimization.stage3_prefetch_bucket_size": 1,
    "zero_optimization.use_multi_rank_bucket_allreduce": False,
}


def engine_with(here: Topology, stage: int, keys: list[str]) -> Engine:
    parallel = ParallelConfig.model_validate({"tp_size": here.tp_size, "zero_stage": stage})
    extra: dict[str, Any] = {"zero_optimization": {}}
    for key in keys:
        section, _, name = key.rpartition(".")
        (extra[section] if section else extra)[name] = VALUES[key]
    derived = deepspeed_config(parallel, OPTIM, "bf16", extra)
    return Engine(model_config(tied=True), OPTIM, parallel, derived, 2, GLOBAL_ROWS // (2 * here.dp_size), here, SEED)


def save(engine: Engine, folder: Path, here: Topology) -> None:
    if here.is_main:
        (folder / "engine").mkdir(parents=True)
    here.barrier()
    engine.save(folder, lambda path, content: torch.save(content, path))
    here.barrier()


def states(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Return weights and moments as readers of checkpoints find them."""
    ((ranks,), _) = read_partitions(folder / "engine")
    names = {name for rank in ranks for name in rank}
    return {(name, key): whole(ranks, name, key) for name in names for key in ("fp32", "exp_avg", "exp_avg_sq", "step")}


def step_after_loading(engine: Engine, here: Topology, folder: Path) -> StepStats:
    """Go back to what was saved after two steps, from a later step; return the figures of the third one."""
    engine.load(folder)
    return step(engine, here, 2)


def main() -> None:
    folder = Path(sys.argv[1])
    assert VALUES.keys() == ALLOWED.keys(), "an allowed key is not tested here"
    gc.freeze()  # DeepSpeed collects garbage again and again
    with started(ParallelConfig()) as here:
        for stage in (1, 2, 3):
            plain = engine_with(here, stage, [])
            figures = [step(plain, here, number) for number in (0, 1)]
            save(plain, folder / f"zero{stage}", here)
            third = step(plain, here, 2)
            effective = [key for key in VALUES if "stage3" not in key or stage == 3]
            alone = [key for key in VALUES if stage == (3 if "stage3" in key else 2)]
            for keys in (*([key] for key in alone), effective):
                case = f"ZeRO-{stage}, {', '.join(keys)}"
                engine = engine_with(here, stage, keys)
                assert [step(engine, here, number) for number in (0, 1)] == figures, case
                found = folder / f"zero{stage}-{'-'.join(keys)[:99]}"
                save(engine, found, here)
                wanted = states(folder / f"zero{stage}")
                assert all(torch.equal(value, wanted[place]) for place, value in states(found).items()), case
                assert step(engine, here, 2) == third, case
                assert step_after_loading(engine, here, folder / f"zero{stage}") == third, case
                assert step_after_loading(plain, here, found) == third, case
            # The last have all keys at once
            assert step_after_loading(engine_with(here, stage, []), here, found) == third, f"ZeRO-{stage}, a new engine"


if __name__ == "__main__":
    main()
