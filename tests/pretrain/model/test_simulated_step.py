"""What is foretold of a step's memory and collectives is what a simulated step of the engine takes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.cluster.speed import data_parallel_bytes, sequence_bytes, tensor_parallel_bytes
from pretrain.config import RunConfig, load_config
from pretrain.model.size import memory_per_rank

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[3]
MICRO_STEPS = 2  # of a simulated step

# Small micro-batches keep the loss short, of which a simulation runs every chunk.
CASES = [
    "quickstart 1",
    "quickstart-recurrent 1",
    "quickstart-recurrent 2 model.n_layers=2 precision=bf16 parallel.compile=true"
    " parallel.activation_checkpointing=selective",
    "quickstart-recurrent 1 model.vocab_size=64 model.n_layers=1 parallel.activation_checkpointing=full precision=bf16",
    "llama-125m-pile 8 model.n_layers=1 train.micro_batch_size=4 parallel.activation_checkpointing=selective"
    " parallel.feed_forward_tokens=2048",
    "llama-1b-dolma 8 model.n_layers=2 train.micro_batch_size=2 parallel.compile=false parallel.zero_stage=2",
    "llama-1b-dolma 8 model.n_layers=2 train.micro_batch_size=1 parallel.compile=false parallel.zero_stage=3"
    " parallel.reduce_dtype=bf16",
    "llama-7b-pile-dolma-tp2 32 model.n_layers=2 train.micro_batch_size=1 parallel.compile=false",
    "llama-7b-pile-dolma-tp2 32 model.n_layers=3 train.micro_batch_size=1 parallel.compile=false"
    " parallel.activation_checkpointing=full parallel.sequence_parallel=true",
    "llama-1b-dolma 8 model.n_layers=1 train.micro_batch_size=1 parallel.compile=false parallel.zero_stage=3"
    " init_from=a model.lora.r=16 model.lora.alpha=32",
    "llama-7b-pile-dolma-tp2 32 model.n_layers=2 train.micro_batch_size=1 parallel.compile=false"
    " init_from=a model.lora.r=16 model.lora.alpha=32 model.lora.dropout=0.1",
    "llama-1b-dolma 2 model.n_layers=2 data.seq_len=16384 train.micro_batch_size=1 parallel.compile=false"
    " parallel.zero_stage=2 parallel.sp_size=4",
    "llama-7b-pile-dolma-tp2 2 model.n_layers=2 data.seq_len=32768 train.micro_batch_size=1 parallel.compile=false"
    " parallel.activation_checkpointing=full parallel.sp_size=8",
    "llama-7b-pile-dolma 2 model.n_layers=2 data.seq_len=32768 train.micro_batch_size=1 parallel.compile=false"
    " parallel.activation_checkpointing=full parallel.sp_size=4 parallel.feed_forward_tokens=2048"
    " parallel.offload=activations",
]
Simulated = Callable[[str], dict[str, object]]


@pytest.fixture(scope="module")
def simulated() -> Simulated:
    """Return a function from a case to its simulation, made elsewhere, since tests have a process group already."""
    command = [sys.executable, "benchmarks/memory_model.py", "--json", *CASES]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = ran.stdout.splitlines()  # and nothing but lines of JSON
    assert len(lines) == len(CASES), ran.stderr
    found = dict(zip(CASES, map(json.loads, lines), strict=True))
    return found.__getitem__


def config_of(case: str) -> tuple[RunConfig, int]:
    name, dp_size, *overrides = case.split()
    return load_config(ROOT / "configs" / f"{name}.yaml", overrides), int(dp_size)


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_of_memory_is_within_a_tenth(simulated: Simulated, case: str) -> None:
    config, dp_size = config_of(case)
    estimate, found = memory_per_rank(config.workload(dp_size)), simulated(case)
    assert estimate.total == pytest.approx(found["simulation"], rel=0.1)
    assert estimate.host == found["host"]


@pytest.mark.parametrize("case", CASES)
def test_the_collectives_move_what_the_estimate_of_speed_counts(simulated: Simulated, case: str) -> None:
    config, dp_size = config_of(case)
    work, found = config.workload(dp_size), simulated(case)["collectives"]
    assert isinstance(found, dict)
    over_dp = data_parallel_bytes(work)
    # The engine also sums a norm, a loss and the like, and the softmax's figures.
    near = {"rel": 0.02, "abs": 1e6}
    reduced = MICRO_STEPS * over_dp.reduced + over_dp.reduced_once
    gathered = MICRO_STEPS * over_dp.gathered + over_dp.gathered_once
    if dp_size > 1:
        assert found.get("allreduce_", 0) == pytest.approx(reduced, **near)
        assert found.get("_reduce_scatter_base_", 0) == pytest.approx(MICRO_STEPS * over_dp.scattered, **near)
        assert found.get("_allgather_base_", 0) == pytest.approx(gathered, **near)
    over_tp = found.get("all_reduce", 0)
    over_tp += (found.get("all_gather_into_tensor", 0) + found.get("reduce_scatter_tensor", 0)) / 2
    assert over_tp == pytest.approx(MICRO_STEPS * tensor_parallel_bytes(work), **near)
    over_sp = found.get("all_to_all_single", 0)
    assert over_sp == pytest.approx(MICRO_STEPS * sequence_bytes(work))
