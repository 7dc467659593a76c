"""Hugging Face folders of LLaMA and Qwen3 models: config.json and safetensors under transformers' names.

Qwen3 is LLaMA with an RMSNorm on each query and key head before the rotation: our model with qk_norm. Queries and keys
need no permutation: our RoPE rotates the two halves of a head, as transformers' does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.exchange import safetensors_folder
from pretrain.exchange.description import ModelDescription, read_json, read_specs, refuse, required, write_json
from pretrain.exchange.safetensors_folder import CONFIG, StoredWeights
from pretrain.model.architecture import ModelConfig, WeightSpec
from pretrain.model.transformer import LlamaConfig
from pretrain.model.weights import Weights, weight_specs

_KEYS = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "ffn_dim": "intermediate_size", "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps", "rope_theta": "rope_theta", "rope_scaling": "rope_scaling",
    "tie_embeddings": "tie_word_embeddings",
}  # fmt: skip
_NAMES = {
    "attention_norm": "input_layernorm", "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj", "feed_forward.w2": "mlp.down_proj",
    "attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm",
}  # fmt: skip
_OUTSIDE = {"embedding": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
# qk_norm -> the model_type of config.json, and transformers' class
_KINDS = {False: ("llama", "LlamaForCausalLM"), True: ("qwen3", "Qwen3ForCausalLM")}
_QWEN3_HEAD_DIM, _QWEN3_CONTEXT = 128, 32_768  # defaults of transformers' Qwen3Config
# model_type -> where its norms differ from ours, for models that are otherwise alike
_OTHER_NORMS = dict.fromkeys(
    ("olmo2", "olmo3"),
    "norms before each branch, not after it, and qk_norm over each head, not over all of them together",
)
_ROPE_TYPES = ("linear", "llama3", "yarn")  # those of `model.rope_scaling` that transformers computes alike
_ROPE_TABLES = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_ROPE_TABLES_AND_OUTPUT = re.compile(rf"{_ROPE_TABLES.pattern}|lm_head\.weight")


def hf_name(name: str) -> str:
    """Return transformers' name for one of our weights."""
    name = name.removesuffix(".weight")
    if name in _OUTSIDE:
        return f"{_OUTSIDE[name]}.weight"
    _, layer, part = name.split(".", 2)
    return f"model.layers.{layer}.{_NAMES[part]}.weight"


class HFModel:
    """A model in a Hugging Face folder; only the requested slices of weights are read, on request.

    Args:
        expected: the config of the model that the slices are for; None: one of the folder's.
    Raises:
        ConfigError: if it has another architecture, or weights are missing.
    """

    def __init__(self, folder: Path, expected: ModelConfig | None = None) -> None:
        self.folder = folder
        self.description = read_config(folder / CONFIG)
        config = self.description.config
        self.specs = read_specs(config, expected)
        names = {name: hf_name(name) for name in self.specs}
        # Old files hold these tables beside the weights, and some programs write a tied weight twice.
        ignored = _ROPE_TABLES if not config.tie_embeddings else _ROPE_TABLES_AND_OUTPUT
        self._weights = StoredWeights(folder, weight_specs(config), self.specs, names, ignored)

    def read(self, name: str, index: int = 0, count: int = 1) -> Tensor:
        """Read a weight, or its slice for tensor-parallel rank `index` of `count`, in the file's type."""
        return self._weights.read(name, index, count)


def read_config(path: Path) -> ModelDescription[LlamaConfig]:
    """Read the config.json of a LLaMA or Qwen3 model.

    Raises:
        ConfigError: naming the first key without a counterpart in our model.
    """
    values = read_json(path)
    _check_kind(path, values)
    qk_norm = values.get("model_type") == "qwen3"
    found = {key: values.get(theirs) for key, theirs in _KEYS.items()} | {"qk_norm": qk_norm}
    # A Qwen3 without key and value heads would get 32 of them, whatever its n_heads.
    for key in ("dim", "n_layers", "n_heads", "ffn_dim", "vocab_size", *(["n_kv_heads"] if qk_norm else [])):
        required(path, values, _KEYS[key])
    rope = _rope(path, values)
    found["rope_theta"] = rope.pop("rope_theta", None) or values.get("rope_theta") or 10_000.0
    context = values.get("max_position_embeddings", _QWEN3_CONTEXT if qk_norm else 2048)  # LlamaConfig's default
    found["rope_scaling"] = _rope_scaling(path, rope, values.get("original_max_position_embeddings"), context)
    found["norm_eps"] = values.get("rms_norm_eps", 1e-6)  # the default of transformers' LlamaConfig
    if found["tie_embeddings"] is None:
        found["tie_embeddings"] = False  # likewise
    config = LlamaConfig.parse(found, at=str(path))
    head_dim = values.get("head_dim") or (_QWEN3_HEAD_DIM if qk_norm else config.dim // config.n_heads)
    if head_dim * config.n_heads != config.dim:
        raise refuse(path, "head_dim", head_dim, "hidden_size / num_attention_heads")
    return ModelDescription(path, config, _KEYS | {"qk_norm": "(model_type=qwen3)"}, context)


def _check_kind(path: Path, values: Mapping[str, Any]) -> None:
    """Refuse, by its key, whatever our model has no counterpart for."""
    kind = values.get("model_type", "llama")
    if kind not in (name for name, _ in _KINDS.values()):
        raise refuse(path, "model_type", kind, _OTHER_NORMS.get(kind, "model_type='llama' or 'qwen3'"))
    for key, wanted in (
        ("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False), ("quantization_config", None),
        ("use_sliding_window", False),
    ):  # fmt: skip
        if values.get(key, wanted) != wanted:
            raise refuse(path, key, values[key], f"{key}={wanted!r}")
    for layer in values.get("layer_types") or ():
        if layer != "full_attention":
            raise refuse(path, "layer_types", layer, "'full_attention' in every layer")


def _rope(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return how positions are rotated: transformers 5 writes rope_parameters, earlier versions rope_scaling."""
    sections = [dict(section) for key in ("rope_parameters", "rope_scaling") if (section := values.get(key))]
    bare = [{key: value for key, value in section.items() if key != "rope_theta"} for section in sections]
    if bare and bare[0] != bare[-1]:
        raise refuse(path, "rope_scaling", sections[-1], "the same as in rope_parameters, or only one of them")
    return sections[0] if sections else {}


def _rope_scaling(path: Path, rope: Mapping[str, Any], original: object, context: object) -> dict[str, Any] | None:
    """Return the section of a scaling, which keeps keys that it has not for our own config to refuse.

    Args:
        original: original_max_position_embeddings beside the section, which transformers prefers to that inside.
        context: max_position_embeddings, which is the original length where none is named, as in transformers.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in _ROPE_TYPES:
        raise refuse(path, "rope_scaling.rope_type", kind, " or ".join(map(repr, ("default", *_ROPE_TYPES))))
    found = {key: value for key, value in rope.items() if key not in ("rope_type", "type") and value is not None}
    if "truncate" in rope:
        found["truncate"] = bool(rope["truncate"])  # where it is there, null is false
    if kind != "linear":
        named = {} if original is None else {"original_max_position_embeddings": original}
        found = {"original_max_position_embeddings": context, **found, **named}
    return {"rope_type": kind, **found}


def write_config(
    folder: Path, config: LlamaConfig, seq_len: int, dtype: torch.dtype, ids: Mapping[str, int | None]
) -> None:
    """Write config.json and generation_config.json.

    Args:
        seq_len: context length of the training, in tokens.
        ids: bos_token_id and eos_token_id; None if there is none.
    """
    model_type, class_name = _KINDS[config.qk_norm]
    values = {
        "architectures": [class_name],
        "model_type": model_type,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling.model_dump(exclude_none=True) if config.rope_scaling else None,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": config.init_std,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        **ids,
    }
    for name, content in ((CONFIG, values), ("generation_config.json", {**ids, "do_sample": True})):
        write_json(folder / name, content)


def write_weights(
    folder: Path, weights: Weights, specs: Mapping[str, WeightSpec], dtype: torch.dtype, max_shard_bytes: int
) -> None:
    """Write the weights under transformers' names; see `safetensors_folder`."""
    names = {name: hf_name(name) for name in specs}
    safetensors_folder.write_weights(folder, weights, specs, names, dtype, max_shard_bytes)
