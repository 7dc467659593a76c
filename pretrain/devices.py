"""The GPUs that are known: their memory, peak and bandwidths, by the names that torch and Slurm give them.

One table for everything that needs such figures: model FLOP utilization, and the checks before a run is submitted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """What the makers' data sheets say of one GPU; a module of two devices counts as two.

    Attributes:
        name: how people call it.
        torch_name: pattern for its `torch.cuda.get_device_name()`.
        slurm_names: its usual names in gres.conf, in lower case.
        memory: bytes, decimal.
        flops: dense bf16 FLOP/s with fp32 accumulation (a figure "with sparsity" is halved); None without bf16 units.
        memory_bandwidth: bytes/s, reading and writing together.
        link_bandwidth: bytes/s in one direction, half of what data sheets add up, to all other devices of its node:
            NVLink or Infinity Fabric where these join a whole node, else PCIe.
        network_bandwidth: bytes/s in one direction that its maker's own servers have for each device; None if there are
            no such servers.
    """

    name: str
    torch_name: str
    slurm_names: tuple[str, ...]
    memory: float
    flops: float | None
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float | None = None


_PCIE_3, _PCIE_4, _PCIE_5 = 16e9, 32e9, 64e9  # 16 lanes
_HDR, _NDR = 25e9, 50e9  # InfiniBand: 200 and 400 Gbit/s

# The first whose pattern matches counts. A Slurm name that is sold in two sizes means the smaller.
_DEVICES = (
    # NVIDIA GB200 NVL72 data sheet, divided by 72: 360 PFLOPS sparse, 13.4 TB at 576 TB/s, 130 TB/s of NVLink
    Device("GB200", r"GB200", ("gb200",), 186e9, 2500e12, 8000e9, 900e9, _NDR),
    # NVIDIA DGX B200 data sheet, divided by 8: 36 PFLOPS sparse bf16, 1,440 GB at 64 TB/s, 14.4 TB/s of NVLink
    Device("B200", r"B200", ("b200",), 180e9, 2250e12, 8000e9, 900e9, _NDR),
    Device("GH200", r"GH200", ("gh200",), 96e9, 989e12, 4000e9, 450e9),  # NVIDIA GH200 data sheet, with HBM3
    Device("H200 NVL", r"H200 NVL", ("h200_nvl",), 141e9, 835e12, 4800e9, _PCIE_5),  # NVIDIA H200 data sheet, NVL
    Device("H200", r"H200", ("h200",), 141e9, 989e12, 4800e9, 450e9, _NDR),  # NVIDIA H200 and DGX H200 data sheets
    Device("H100 NVL", r"H100 NVL", ("h100_nvl",), 94e9, 835e12, 3900e9, _PCIE_5),  # NVIDIA H100 NVL data sheet
    Device("H100 PCIe", r"H100 PCIe", ("h100_pcie",), 80e9, 756e12, 2000e9, _PCIE_5),  # NVIDIA H100 data sheet, PCIe
    Device("H100", r"H100", ("h100",), 80e9, 989e12, 3350e9, 450e9, _NDR),  # NVIDIA H100 and DGX H100 data sheets, SXM
    Device("H800", r"H800", ("h800",), 80e9, 989e12, 3350e9, 200e9, _NDR),  # as H100, with 400 GB/s of NVLink
    # NVIDIA A100 and DGX A100 data sheets; PCIe and SXM alike but for the links
    Device("A100 PCIe 80 GB", r"A100 80GB PCIe", ("a100_80gb_pcie",), 80e9, 312e12, 1935e9, _PCIE_4),
    Device("A100 PCIe", r"A100-PCIE", ("a100_pcie",), 40e9, 312e12, 1555e9, _PCIE_4),
    Device("A100 80 GB", r"A100.*80GB", ("a100_80gb", "a100-80", "a100l"), 80e9, 312e12, 2039e9, 300e9, _HDR),
    Device("A100", r"A100", ("a100", "a100_40gb"), 40e9, 312e12, 1555e9, 300e9, _HDR),
    Device("A800", r"A800", ("a800",), 80e9, 312e12, 2039e9, 200e9, _HDR),  # as A100, with 400 GB/s of NVLink
    Device("A30", r"A30\b", ("a30",), 24e9, 165e12, 933e9, _PCIE_4),  # NVIDIA A30 data sheet
    Device("A40", r"A40\b", ("a40",), 48e9, 149.7e12, 696e9, _PCIE_4),  # NVIDIA A40 data sheet
    Device("A10", r"A10\b", ("a10",), 24e9, 125e12, 600e9, _PCIE_4),  # NVIDIA A10 data sheet
    Device("RTX A6000", r"RTX A6000", ("a6000",), 48e9, 154.8e12, 768e9, _PCIE_4),  # NVIDIA RTX A6000 data sheet
    Device("L40S", r"L40S", ("l40s",), 48e9, 362e12, 864e9, _PCIE_4),  # NVIDIA L40S data sheet
    Device("L40", r"L40\b", ("l40",), 48e9, 181e12, 864e9, _PCIE_4),  # NVIDIA L40 data sheet
    Device("L4", r"L4\b", ("l4",), 24e9, 121e12, 300e9, _PCIE_4),  # NVIDIA L4 data sheet
    # NVIDIA Ada GPU architecture white paper, appendix A
    Device("RTX 4090", r"RTX 4090\b(?! (?:D|Laptop))", ("rtx4090",), 24e9, 165.2e12, 1008e9, _PCIE_4),
    Device("RTX 3090", r"RTX 3090\b(?! Ti)", ("rtx3090",), 24e9, 71e12, 936e9, _PCIE_4),  # GA102 white paper, table 9
    Device("V100 32 GB", r"V100.*32GB", ("v100_32gb",), 32e9, None, 900e9, 150e9),  # NVIDIA V100 data sheet
    Device("V100", r"V100", ("v100",), 16e9, None, 900e9, 150e9),
    Device("P100", r"P100", ("p100",), 16e9, None, 732e9, 80e9),  # NVIDIA P100 data sheet
    Device("T4", r"T4\b", ("t4",), 16e9, None, 320e9, _PCIE_3),  # NVIDIA T4 data sheet
    # AMD Instinct MI300X data sheet: seven links of 128 GB/s
    Device("MI300X", r"MI300X", ("mi300x",), 192e9, 1307e12, 5300e9, 448e9),
    # AMD Instinct MI250X and MI250 data sheets, of two dies, each a device: 383 and 362.1 TFLOPS, 3.2 TB/s, eight and
    # six links of 100 GB/s
    Device("MI250X", r"MI250X", ("mi250x",), 64e9, 191.5e12, 1600e9, 200e9),
    Device("MI250", r"MI250\b", ("mi250",), 64e9, 181e12, 1600e9, 150e9),
)


def device_of_torch(torch_name: str) -> Device | None:
    """Return the device that torch calls by this name; None if it is unknown."""
    return next((device for device in _DEVICES if re.search(device.torch_name, torch_name)), None)


def device_of_slurm(slurm_name: str) -> Device | None:
    """Return the device with this name in gres.conf; None if it is unknown."""
    return next((device for device in _DEVICES if slurm_name in device.slurm_names), None)


def slurm_names() -> list[str]:
    """Return all names by which `device_of_slurm` finds a device, in alphabetical order."""
    return sorted(name for device in _DEVICES for name in device.slurm_names)
