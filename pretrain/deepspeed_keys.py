"""Which of DeepSpeed's own keys a config may set beyond those that we derive. config -> engine -> deepspeed_keys.

Many of DeepSpeed's keys change what a run computes, or how its state is laid out in files without the files saying so.
The keys allowed here change neither: a test trains, saves and resumes with each of them, and compares every bit.
"""

from __future__ import annotations

from pydantic import JsonValue

from shards import ConfigError

# Key -> the type of its values. Before one is added, tests/distributed/deepspeed_keys.py has to try it
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
_LAYOUT = "it lays the optimizer's state out in a way that a checkpoint's readers do not know"

# Why some keys are refused; a section's reason holds for every key in it
_REFUSED = {
    "optimizer": _OTHER_SECTIONS,
    "scheduler": _OTHER_SECTIONS,
    "fp16": _OTHER_SECTIONS,
    "amp": _OTHER_SECTIONS,
    "bf16": _OTHER_SECTIONS,
    "prescale_gradients": _OTHER_SECTIONS,
    "gradient_predivide_factor": _OTHER_SECTIONS,
    "checkpoint": "the section checkpoint of this config says how checkpoints are written",
    "managed_gradient_accumulation": "the gradients of all micro-steps but the last would be weighted wrongly",
    "zero_optimization.elastic_checkpoint": _LAYOUT,
    "zero_optimization.load_from_fp32_weights": "a resume would take rounded weights for the optimizer's own",
    "zero_optimization.round_robin_gradients": f"{_LAYOUT}: they would give weights and moments to wrong names",
    "zero_optimization.sub_group_size": _LAYOUT,
}


def check_added_key(key: str, value: JsonValue) -> None:
    """Raise ConfigError unless a key of the config's `deepspeed` section is known to be harmless.

    Args:
        key: its path below `deepspeed`, with dots; it is none of those that are derived.
    """
    wanted = ALLOWED.get(key)
    if wanted is None:
        sections = [key[:end] for end in range(1, len(key) + 1) if key[end : end + 1] in ("", ".")]
        reason = next(
            (_REFUSED[section] for section in sections if section in _REFUSED), "nobody has shown it harmless"
        )
        raise ConfigError(
            f"deepspeed.{key} is refused: {reason}; leave it out. A run that was trained with it can only be read and"
            f" continued by the version of Headrace that began it. The keys that may be set: {', '.join(ALLOWED)}"
        )
    if type(value) is not wanted or value < 0 or (value == 0 and key.endswith("bucket_size")):
        right = "true or false" if wanted is bool else "a whole number of elements"
        raise ConfigError(f"deepspeed.{key}={value!r} is wrong; it should be {right}")
