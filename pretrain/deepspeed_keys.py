"""DeepSpeed's configuration: what follows from ours, and which of its own keys a config may also set.

config -> deepspeed_keys -> engine. Many of DeepSpeed's keys change what a run computes, or how its files lay out state
without saying so. The keys allowed here change neither: a test trains, saves and resumes with each of them and compares
every bit.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import JsonValue

from pretrain.model.architecture import Precision
from pretrain.optim import OptimConfig
from pretrain.parallel_config import ParallelConfig
from shards import ConfigError

DeepSpeedConfig = dict[str, Any]  # in DeepSpeed's own JSON schema

# Key -> the type of its values. Before adding one, try it in tests/distributed/deepspeed_keys.py.
ALLOWED: dict[str, type[int] | type[bool]] = {
    "dump_state": bool,
    "memory_breakdown": bool,
    "zero_optimization.allgather_bucket_size": int,
    "zero_optimization.allgather_partitions": bool,
    "zero_optimization.ignore_unused_parameters": bool,
    "zero_optimization.reduce_bucket_size": int,
    "zero_optimization.reduce_scatter": bool,
    "zero_optimization.stage3_max_live_parameters": int,
    "zero_optimization.stage3_max_reuse_distance": int,
    "zero_optimization.stage3_model_persistence_threshold": int,
    "zero_optimization.stage3_param_persistence_threshold": int,
    "zero_optimization.stage3_prefetch_bucket_size": int,
    "zero_optimization.use_multi_rank_bucket_allreduce": bool,
}

_OTHER_SECTIONS = "it follows from the sections optim, precision and parallel"
_BATCH = "it follows from the section train and the number of ranks"
_LAYOUT = "it lays out the optimizer's state in a way that readers of a checkpoint do not know"

# Why some keys are refused; a section's reason applies to every key in it.
_REFUSED = {
    "optimizer": _OTHER_SECTIONS,
    "scheduler": _OTHER_SECTIONS,
    "fp16": _OTHER_SECTIONS,
    "amp": _OTHER_SECTIONS,
    "bf16": _OTHER_SECTIONS,
    "train_batch_size": _BATCH,
    "train_micro_batch_size_per_gpu": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "prescale_gradients": _OTHER_SECTIONS,
    "gradient_predivide_factor": _OTHER_SECTIONS,
    "checkpoint": "the section checkpoint of this config says how checkpoints are written",
    "managed_gradient_accumulation": "the gradients of all micro-steps but the last would be weighted wrongly",
    "zero_optimization.elastic_checkpoint": _LAYOUT,
    "zero_optimization.load_from_fp32_weights": "a resume would take rounded weights for the optimizer's own",
    "zero_optimization.round_robin_gradients": f"{_LAYOUT}: they would assign weights and moments to the wrong names",
    "zero_optimization.sub_group_size": _LAYOUT,
}


def deepspeed_config(
    parallel: ParallelConfig, optim: OptimConfig, precision: Precision, extra: DeepSpeedConfig
) -> DeepSpeedConfig:
    """Derive DeepSpeed's configuration from ours, except for the batch sizes, which depend on the number of ranks.

    Args:
        extra: the config's `deepspeed` section.
    Raises:
        ConfigError: if `extra` contradicts what is derived, or has a key not known to be harmless.
    """
    stage = parallel.applied_zero_stage
    zero: DeepSpeedConfig = {"stage": stage, "contiguous_gradients": True, "overlap_comm": stage >= 2}
    for key, on_cpu in (
        ("offload_optimizer", parallel.offloads_optimizer),
        ("offload_param", parallel.offloads_weights),
    ):
        zero[key] = {"device": "cpu" if on_cpu else "none", "pin_memory": on_cpu and torch.cuda.is_available()}
    derived: DeepSpeedConfig = {
        "gradient_clipping": optim.grad_clip,
        # fp32 gradients are summed as they come; otherwise ZeRO-1 keeps the bf16 ones beside them until the step's end.
        "bf16": {"enabled": precision == "bf16", "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": parallel.reduce_dtype,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # offload keeps torch's AdamW; DeepSpeed's own compiles at first use
        "steps_per_print": 2**31,  # it reports nothing that we do not report
        "wall_clock_breakdown": False,
    }
    return _merged(derived, extra)


def batch_sizes(micro_batch_size: int, micro_steps: int, zero_size: int) -> DeepSpeedConfig:
    """Return the part of DeepSpeed's configuration that splits a global batch."""
    return {
        "train_batch_size": micro_batch_size * micro_steps * zero_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": micro_steps,
    }


def without_batch_sizes(section: DeepSpeedConfig) -> DeepSpeedConfig:
    """Drop batch sizes from an existing run's section; older versions accepted them if they agreed with the config."""
    return {key: value for key, value in section.items() if key not in batch_sizes(1, 1, 1)}


def _merged(derived: DeepSpeedConfig, extra: DeepSpeedConfig, above: str = "") -> DeepSpeedConfig:
    merged = dict(derived)
    for name, value in extra.items():
        key = above + name
        if isinstance(value, dict) and isinstance(merged.get(name), dict):
            merged[name] = _merged(merged[name], value, f"{key}.")
        elif name not in merged:
            _check_added_key(key, value)
            merged[name] = value
        elif merged[name] != value:
            raise ConfigError(
                f"deepspeed.{key}={value!r} contradicts {merged[name]!r}, which follows from the rest of the config;"
                " change that instead, and leave this key out"
            )
    return merged


def _check_added_key(key: str, value: JsonValue) -> None:
    """Raise ConfigError unless a key of the config's `deepspeed` section is known to be harmless.

    Args:
        key: its dotted path below `deepspeed`; not one of the derived keys.
    """
    wanted = ALLOWED.get(key)
    if wanted is None:
        sections = [key[:end] for end in range(1, len(key) + 1) if key[end : end + 1] in ("", ".")]
        reason = next(
            (_REFUSED[section] for section in sections if section in _REFUSED), "it is not known to be harmless"
        )
        raise ConfigError(
            f"deepspeed.{key} is refused: {reason}; leave it out. A run that was trained with it can only be read and"
            f" continued by the version of Headrace that began it. The keys that may be set: {', '.join(ALLOWED)}"
        )
    if type(value) is not wanted or value < 0 or (value == 0 and key.endswith("bucket_size")):
        right = "true or false" if wanted is bool else "a whole number of elements"
        raise ConfigError(f"deepspeed.{key}={value!r} is wrong; it should be {right}")
