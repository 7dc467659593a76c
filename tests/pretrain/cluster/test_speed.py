"""The estimate of a step's time is right by hand, and moves the right way with whatever it depends on."""

from __future__ import annotations

import dataclasses

import pytest

from pretrain.cluster.speed import Cluster, StepTime, sequence_bytes, step_time, tokens_per_second, why_unknown
from pretrain.devices import Device, device_of_slurm
from pretrain.model.size import Workload
from pretrain.model.transformer import LlamaConfig
from pretrain.parallel_config import ParallelConfig

LLAMA_7B = LlamaConfig(dim=4096, n_layers=32, n_heads=32, vocab_size=32_000)
PARAMETERS = 6_738_415_616


def workload(dp_size: int = 1, **parallel: object) -> Workload:
    layout = ParallelConfig.model_validate({"compile": True, **parallel})
    return Workload(LLAMA_7B, layout, dp_size, micro_batch_size=4, seq_len=2048, bytes_per_weight=2)


def h100() -> Device:
    found = device_of_slurm("h100")
    assert found is not None
    return found


def cluster(nodes: int = 1, gpus_per_node: int = 8, network: float = 400e9) -> Cluster:
    return Cluster(h100(), nodes, gpus_per_node, network)


def test_one_gpu_by_hand() -> None:
    found = step_time(workload(), 3, cluster(gpus_per_node=1))
    # Three micro-steps of 8,192 tokens of 41.25 GFLOPs (tests/pretrain/model/test_size.py) at 0.65 of 989 TFLOP/s
    assert found.products == pytest.approx(3 * 8192 * 41_253_076_992 / (0.65 * 989e12))
    # AdamW: four numbers read and three written in fp32, one written in bf16; the norm, clipping and zeros 4 more
    assert found.optimizer == pytest.approx(PARAMETERS * (7 * 4 + 2 + 4 * 4) / (0.8 * 3350e9))
    assert (found.tensor_parallel, found.data_parallel) == (0, 0)
    assert tokens_per_second(workload(), 3, 2.0) == 3 * 8192 / 2


def test_zero_1_reduces_once_over_the_slowest_link_by_hand() -> None:
    # A ring of 16 over two nodes: each rank sends 15/16 of the fp32 gradients twice, and of the bf16 weights once
    sent = 15 / 16 * PARAMETERS * (2 * 4 + 2)
    for network, slowest in ((400e9, 400e9), (1e15, 450e9)):
        found = step_time(workload(16), 3, cluster(nodes=2, network=network))
        assert found.data_parallel == pytest.approx(sent / (0.8 * slowest))
    # With tp 2 the two dp groups of each node share its network, and each has half of the parameters
    found = step_time(workload(8, tp_size=2), 3, cluster(nodes=2, network=100e9))
    assert found.data_parallel == pytest.approx(7 / 8 * PARAMETERS / 2 * 10 / (0.8 * 50e9), rel=1e-3)


def test_exchanges_of_heads_for_tokens_by_hand() -> None:
    # Four exchanges of 8,192 / 4 tokens of 4,096 numbers in bf16 a layer, forward and as many backward; 3/4 are sent
    given = 32 * 2 * 4 * 2048 * 4096 * 2
    inside = step_time(workload(sp_size=4), 1, cluster(gpus_per_node=4))
    assert inside.sequence == pytest.approx(3 / 4 * given / (0.8 * 450e9))
    # Ranks that share rows divide the optimizer's state too, and reduce gradients as dp ranks do
    assert inside.data_parallel == step_time(workload(4), 1, cluster(gpus_per_node=4)).data_parallel
    assert inside.products == pytest.approx(step_time(workload(), 1, cluster()).products / 4)
    again = step_time(workload(sp_size=4, activation_checkpointing="full"), 1, cluster(gpus_per_node=4))
    assert again.sequence == pytest.approx(1.5 * inside.sequence)


def test_few_key_value_heads_are_sent_to_every_rank_that_needs_them() -> None:
    grouped = LLAMA_7B.model_copy(update={"n_kv_heads": 2})
    bytes_of = {
        sp_size: sequence_bytes(dataclasses.replace(workload(sp_size=sp_size), model=grouped)) * sp_size
        for sp_size in (2, 8)
    }
    # Of queries and output 32 heads each; of keys and values 2 each, or 8 where 8 ranks need one
    assert bytes_of[8] / bytes_of[2] == pytest.approx((2 * 32 + 2 * 8) / (2 * 32 + 2 * 2))


def test_tensor_parallel_ranks_on_two_nodes_wait_for_the_network() -> None:
    inside = step_time(workload(tp_size=4), 1, cluster(gpus_per_node=4))
    across = step_time(workload(tp_size=4), 1, cluster(nodes=2, gpus_per_node=2, network=45e9))
    assert across.tensor_parallel == pytest.approx(10 * inside.tensor_parallel)


def test_what_works_beside_the_backward_pass_is_not_counted() -> None:
    fast, slow = cluster(nodes=2), cluster(nodes=2, network=1e9)
    once = step_time(workload(16, zero_stage=1), 4, fast).data_parallel
    hidden = step_time(workload(16, zero_stage=2), 4, fast).data_parallel
    assert 0 < hidden < once, "only the gathering of weights is left"
    assert step_time(workload(16, zero_stage=3), 4, fast).data_parallel == 0
    for stage in (2, 3):
        assert step_time(workload(16, zero_stage=stage), 4, slow).bound == "links of dp ranks"


@pytest.mark.parametrize(
    ("worse", "part"),
    [
        ({"activation_checkpointing": "full"}, "products"),
        ({"activation_checkpointing": "selective"}, "memory"),
        ({"compile": False}, "memory"),
    ],
)
def test_saving_memory_costs_what_it_should(worse: dict[str, object], part: str) -> None:
    plain, found = (dataclasses.asdict(step_time(workload(**keys), 1, cluster())) for keys in ({}, worse))
    assert found[part] > 1.05 * plain[part]
    untouched = {"products", "optimizer", "data_parallel"} - {part}
    assert {name: found[name] for name in untouched} == {name: plain[name] for name in untouched}


def test_the_largest_part_bounds() -> None:
    assert StepTime(1, 2, 3, 5, 0, 4).bound == "links of tp ranks"
    assert StepTime(1, 2, 3, 5, 1, 4).total == 16


def test_what_is_not_known_is_said() -> None:
    v100 = device_of_slurm("v100")
    assert v100 is not None
    assert why_unknown(workload(), h100()) == ""
    assert "V100" in why_unknown(workload(), v100)
    assert "offload=optimizer" in why_unknown(workload(offload="optimizer"), h100())
    assert "fp32" in why_unknown(dataclasses.replace(workload(), bytes_per_weight=4), h100())
