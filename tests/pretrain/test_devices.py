"""Every GPU is found by its names, and by none of another's."""

from __future__ import annotations

import re

import pytest

from pretrain.devices import device_of_slurm, device_of_torch, slurm_names


@pytest.mark.parametrize("name", slurm_names())
def test_a_name_in_slurm_means_one_device_with_possible_figures(name: str) -> None:
    device = device_of_slurm(name)
    assert device is not None
    assert slurm_names().count(name) == 1
    assert 16e9 <= device.memory <= 200e9
    # Bytes/s: a device reads its memory faster than its neighbours', and these faster than other nodes'
    assert device.memory_bandwidth > device.link_bandwidth > (device.network_bandwidth or 0)
    assert device.flops is None or 50e12 < device.flops < 3e15


@pytest.mark.parametrize(
    ("torch_name", "slurm_name"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA A100-SXM4-80GB", "a100_80gb"),
        ("NVIDIA A100 80GB PCIe", "a100_80gb_pcie"),
        ("NVIDIA A100-PCIE-40GB", "a100_pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100_pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA L40", "l40"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("Tesla V100-SXM2-32GB", "v100_32gb"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A10G", None),
        ("cpu", None),
    ],
)
def test_torch_and_slurm_mean_the_same_device(torch_name: str, slurm_name: str | None) -> None:
    assert device_of_torch(torch_name) == (slurm_name and device_of_slurm(slurm_name))


def test_only_known_names_are_found() -> None:
    assert device_of_slurm("unheard") is None
    assert all(re.fullmatch(r"[a-z0-9_-]+", name) for name in slurm_names()), "as gres.conf's names in lower case"
