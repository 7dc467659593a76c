"""Meta's layout of LLaMA models: params.json and consolidated.XX.pth, one file for each tensor-parallel rank.

Meta's RoPE rotates neighbouring pairs of a head (2i, 2i + 1), ours the pairs (i, i + head_dim / 2), so the rows of the
query and key matrices are ordered differently within each head.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from pretrain.exchange.description import ModelDescription, read_json, read_specs, required, write_json
from pretrain.model.architecture import ModelConfig, WeightSpec
from pretrain.model.rotary import Llama3Scaling, RopeScaling
from pretrain.model.transformer import LlamaConfig
from pretrain.model.weights import Weights, weight_specs
from shards import ConfigError

PARAMS = "params.json"

_KEYS = {
    "dim": "dim", "n_layers": "n_layers", "n_heads": "n_heads", "n_kv_heads": "n_kv_heads", "norm_eps": "norm_eps",
    "rope_theta": "rope_theta", "rope_scaling": "use_scaled_rope", "ffn_dim": "(rows of feed_forward.w1)",
    "vocab_size": "(rows of tok_embeddings)", "tie_embeddings": "(output equal to tok_embeddings)",
}  # fmt: skip
# Constants of Meta's code; params.json only says whether they are used.
_LOW_FREQ_FACTOR, _HIGH_FREQ_FACTOR, _ORIGINAL_LENGTH = 1.0, 4.0, 8192


def meta_name(name: str) -> str:
    """Return Meta's name for one of our weights."""
    return name.replace("blocks.", "layers.").replace("embedding.", "tok_embeddings.")


def interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder query or key rows [heads * head_dim, dim] from our order to Meta's."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def halved(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder query or key rows [heads * head_dim, dim] from Meta's order to ours."""
    return weight.view(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


class MetaModel:
    """A model in a folder with Meta's layout; its files are mapped, and weights are assembled on request.

    Args:
        expected: the config of the model that the slices are for, with the scaling of its positions, which params.json
            does not tell whole; None: the folder's.
    Raises:
        ConfigError: if it has another architecture, or weights are missing.
    """

    def __init__(self, folder: Path, expected: ModelConfig | None = None) -> None:
        self.folder = folder
        paths = sorted(folder.glob("consolidated.*.pth"))
        if not paths:
            raise ConfigError(f"{folder} has a {PARAMS} but no consolidated.00.pth")
        self._parts = [_load_part(path) for path in paths]
        from_run = expected.rope_scaling if isinstance(expected, LlamaConfig) else None
        self.description = self._describe(folder / PARAMS, from_run)
        self._stored = weight_specs(self.description.config)
        self.specs = read_specs(self.description.config, expected)
        wanted = {meta_name(name) for name in self.specs} | {"output.weight", "rope.freqs"}
        if unknown := sorted(self._parts[0].keys() - wanted):
            raise ConfigError(f"{folder} has weights of another architecture: {', '.join(unknown[:4])}")

    def _describe(self, path: Path, rope_scaling: RopeScaling | None) -> ModelDescription[LlamaConfig]:
        values = read_json(path)
        dim = required(path, values, "dim")
        # params.json does not say: it has -1 for Llama 2's vocabulary, and the width only through a formula.
        vocab_size = self._rows("tok_embeddings.weight", len(self._parts) if self._embedding_dim(dim) == 0 else 1)
        hidden_dim = self._rows("layers.0.feed_forward.w1.weight", len(self._parts))
        found = {
            "dim": dim,
            **{key: required(path, values, key) for key in ("n_layers", "n_heads", "norm_eps")},
            "n_kv_heads": values.get("n_kv_heads"),
            "ffn_dim": hidden_dim,
            "vocab_size": vocab_size,
            "rope_theta": values.get("rope_theta", 10_000.0),
            "rope_scaling": _scaling(path, values, rope_scaling),
            "tie_embeddings": self._is_tied(dim),
        }
        context = values.get("max_seq_len", 2048)  # the default of Meta's code, which takes it as an argument
        return ModelDescription(path, LlamaConfig.parse(found, at=str(path)), _KEYS, context)

    def _embedding_dim(self, dim: object) -> int:
        """Find the embedding's split dimension: Llama 1 and 2 split its width (1), Llama 3 the vocabulary (0)."""
        return 0 if self._part(0, "tok_embeddings.weight").shape[1] == dim else 1

    def _is_tied(self, dim: object) -> bool:
        if "output.weight" not in self._parts[0]:
            return True
        embedding, output = (
            self._whole("tok_embeddings.weight", self._embedding_dim(dim)),
            self._whole("output.weight", 0),
        )
        return torch.equal(embedding[:1], output[:1]) and torch.equal(embedding, output)

    def _part(self, rank: int, name: str) -> Tensor:
        if name not in self._parts[rank]:
            raise ConfigError(f"{self.folder}: consolidated.{rank:02d}.pth lacks {name}")
        return self._parts[rank][name]

    def _rows(self, name: str, count: int) -> int:
        return sum(len(self._part(rank, name)) for rank in range(count))

    def _whole(self, name: str, dim: int | None) -> Tensor:
        if dim is None:
            return self._part(0, name)
        return torch.cat([self._part(rank, name) for rank in range(len(self._parts))], dim)

    def read(self, name: str, index: int = 0, count: int = 1) -> Tensor:
        """Read a weight, or its slice for tensor-parallel rank `index` of `count`, in the file's type."""
        spec, config = self.specs[name], self.description.config
        dim = self._embedding_dim(config.dim) if name == "embedding.weight" else spec.shard_dim
        whole = self._whole(meta_name(name), dim)
        if tuple(whole.shape) != self._stored[name].shape:
            raise ConfigError(
                f"{self.folder}: {meta_name(name)} has the shape {list(whole.shape)} over all files, but {PARAMS}"
                f" implies {list(self._stored[name].shape)}"
            )
        if name.endswith(("attention.wq.weight", "attention.wk.weight")):
            whole = halved(whole, config.head_dim)
        return whole[spec.bounds(index, count)]


def _load_part(path: Path) -> dict[str, Tensor]:
    try:
        part: dict[str, Tensor] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, EOFError, RuntimeError, UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{path}: cannot be read as weights: {reason}; was the copy complete?") from None
    return part


def _scaling(path: Path, values: Mapping[str, Any], from_run: RopeScaling | None) -> dict[str, Any] | None:
    if not values.get("use_scaled_rope"):
        return None
    factor = values.get("rope_scaling_factor")
    if factor is not None:
        return {
            "factor": factor,
            "low_freq_factor": _LOW_FREQ_FACTOR,
            "high_freq_factor": values.get("rope_high_freq_factor", _HIGH_FREQ_FACTOR),
            "original_max_position_embeddings": _ORIGINAL_LENGTH,
        }
    if from_run is None:
        raise ConfigError(
            f"{path}: use_scaled_rope=true does not say how much; set model.rope_scaling: {{factor: 8.0}} for"
            " Llama 3.1, {factor: 32.0} for Llama 3.2"
        )
    if not isinstance(from_run, Llama3Scaling):
        raise ConfigError(
            f"{path}: use_scaled_rope=true is rope_type=llama3, but model.rope_scaling.rope_type={from_run.rope_type}"
        )
    return from_run.model_dump()


def write_params(folder: Path, config: LlamaConfig) -> None:
    """Write params.json. Raises ConfigError if Meta's code cannot represent this model."""
    values: dict[str, object] = {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.kv_heads,
        "vocab_size": config.vocab_size,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        **_width(config.dim, config.hidden_dim),
    }
    if config.qk_norm:
        raise ConfigError("model.qk_norm=true cannot be exported: Meta's LLaMA has no norm on queries and keys")
    if scaling := config.rope_scaling:
        if not isinstance(scaling, Llama3Scaling):
            raise ConfigError(
                f"model.rope_scaling.rope_type={scaling.rope_type} cannot be exported: Meta's code has no other"
                " scaling than that of rope_type=llama3; use --format hf or headrace"
            )
        built_in = (scaling.low_freq_factor, scaling.original_max_position_embeddings)
        if built_in != (_LOW_FREQ_FACTOR, _ORIGINAL_LENGTH):
            raise ConfigError(
                f"model.rope_scaling cannot be exported: Meta's code has low_freq_factor={_LOW_FREQ_FACTOR} and"
                f" original_max_position_embeddings={_ORIGINAL_LENGTH} built in, not {built_in[0]} and {built_in[1]}"
            )
        values |= {"use_scaled_rope": True, "rope_scaling_factor": scaling.factor}
        values |= {"rope_high_freq_factor": scaling.high_freq_factor}
    write_json(folder / PARAMS, values)


def _width(dim: int, hidden_dim: int) -> dict[str, object]:
    """Return the keys from which Meta's code computes SwiGLU's width: 8/3 dim times a factor, rounded up."""
    multiple_of = 256 if hidden_dim % 256 == 0 else hidden_dim
    third = int(2 * (4 * dim) / 3)
    if -(-third // multiple_of) * multiple_of == hidden_dim:
        return {"multiple_of": multiple_of}
    # The middle of the last multiple, so that rounding cannot cross its ends.
    return {"multiple_of": multiple_of, "ffn_dim_multiplier": (hidden_dim - multiple_of / 2) / third}


def write_weights(
    folder: Path, weights: Weights, specs: Mapping[str, WeightSpec], head_dim: int, dtype: torch.dtype, tp_size: int
) -> None:
    """Write consolidated.XX.pth for each of `tp_size` ranks in turn, with only one in memory at a time.

    The embedding is split along the vocabulary, as in Llama 3; a tied output projection is written out.
    """
    for rank in range(tp_size):
        part = {}
        for name, spec in specs.items():
            weight = weights.read(name)[spec.bounds(rank, tp_size)].to(dtype)
            if name.endswith(("attention.wq.weight", "attention.wk.weight")):
                weight = interleaved(weight, head_dim)
            part[meta_name(name)] = weight.contiguous().clone()  # a view would be saved with its whole storage
        part.setdefault("output.weight", part["tok_embeddings.weight"])
        with (folder / f"consolidated.{rank:02d}.pth").open("wb") as file:
            torch.save(part, file)
