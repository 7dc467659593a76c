"""A larger model that computes what a smaller one does, to go on from. {checkpoint, config} -> growth -> export.

**Wider.** The residual stream is continued by zeros: what the smaller model writes goes to its own places, and nothing
is written to the new ones. RMSNorm divides by the root of a mean over all places, which the zeros make smaller, so its
weight is multiplied by the root of the widths' ratio, and `norm_eps` has to shrink by the ratio. New heads and hidden
units read what they like and write nothing.

**Deeper.** A new block writes nothing to the residual stream.

All other new weights are drawn as those of a new model are. So the new parts learn from the first step on: what reads a
new place has weights to pass a gradient on to what writes to it, and what writes has an input.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from torch import Tensor

from pretrain.model.architecture import ModelConfig
from pretrain.model.transformer import LlamaConfig, initial_weight
from pretrain.model.weights import Weights, weight_specs
from shards import ConfigError

_SAME = ("vocab_size", "head_dim", "qk_norm", "tie_embeddings", "rope_theta", "rope_scaling")
_NO_SMALLER = ("dim", "n_layers", "kv_heads", "hidden_dim")
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_WRITES = ("attention.wo.weight", "feed_forward.w2.weight", "embedding.weight")  # to the residual stream


def growable(small: ModelConfig, large: ModelConfig) -> tuple[LlamaConfig, LlamaConfig]:
    """Check that a model can grow into another one; return both configs.

    Raises:
        ConfigError: with a line for each key that does not fit.
    """
    if not isinstance(small, LlamaConfig) or not isinstance(large, LlamaConfig):
        raise ConfigError(f"model.architecture: only a llama grows, not {small.architecture} to {large.architecture}")
    if problems := list(_problems(small, large)):
        raise ConfigError("\n".join(problems))
    return small, large


def _problems(small: LlamaConfig, large: LlamaConfig) -> Iterator[str]:
    for key in _SAME:
        ours, theirs = getattr(small, key), getattr(large, key)
        if ours != theirs:
            yield f"model.{key}={theirs}, but the smaller model has {ours}, and what it computes depends on that"
    for key in _NO_SMALLER:
        ours, theirs = getattr(small, key), getattr(large, key)
        if theirs < ours:
            name = {"kv_heads": "n_kv_heads", "hidden_dim": "ffn_dim"}.get(key, key)
            yield f"model.{name}={theirs} is less than the smaller model's {ours}"
    if large.n_heads * small.kv_heads < small.n_heads * large.kv_heads:
        yield (
            f"model.n_heads={large.n_heads} gives each of n_kv_heads={large.kv_heads} fewer query heads than the"
            f" smaller model's {small.n_heads // small.kv_heads}; add query heads, or fewer key and value heads"
        )
    eps = small.norm_eps * small.dim / large.dim
    if not math.isclose(large.norm_eps, eps, rel_tol=1e-3):
        yield (
            f"model.norm_eps={large.norm_eps} would change what the norms do; it is added to a mean over"
            f" {large.dim} places of which {large.dim - small.dim} are 0, so set model.norm_eps={eps:.6g}"
        )


class GrownWeights:
    """The weights of a larger model that computes what a smaller one does; a `pretrain.model.weights.Weights`.

    Args:
        source: the smaller model's weights.
        small, large: the models' configs, as `growable` accepts them.
        seed: weights that are drawn are those of a new run with this seed.
    """

    def __init__(self, source: Weights, small: LlamaConfig, large: LlamaConfig, seed: int) -> None:
        self._source, self._small, self._large, self._seed = source, small, large, seed
        self._specs = weight_specs(large)
        # Old blocks lie evenly among the new ones, the first of them first
        places = (layer * large.n_layers // small.n_layers for layer in range(small.n_layers))
        self._old_layer = {place: layer for layer, place in enumerate(places)}

    def read(self, name: str, index: int = 0, count: int = 1) -> Tensor:
        """Read a weight, or its slice for tensor-parallel rank `index` of `count`, in fp32."""
        spec, match = self._specs[name], _BLOCK.fullmatch(name)
        part = match[2] if match else name
        layer = self._old_layer.get(int(match[1])) if match else None
        whole = initial_weight(name, spec.shape, self._large, self._seed)
        if part in _WRITES or (part == "output.weight" and self._large.tie_embeddings):
            whole.zero_()
        if match is None or layer is not None:
            old = self._source.read(name if match is None else f"blocks.{layer}.{part}")
            self._put(part, whole, old.float())
        return whole[spec.bounds(index, count)]

    def _put(self, part: str, whole: Tensor, old: Tensor) -> None:
        """Put the smaller model's values of a weight into the larger one's, in place."""
        if old.dim() == 1 and not part.endswith(("q_norm.weight", "k_norm.weight")):  # those are of heads, as large
            share = (self._small.dim / self._large.dim) ** 0.5
            whole *= share
            old = old * share
        old = _by_heads(part, old, self._small)
        _by_heads(part, whole, self._large)[tuple(slice(size) for size in old.shape)] = old


def _by_heads(part: str, weight: Tensor, config: LlamaConfig) -> Tensor:
    """Return a view of a weight in which each axis that grows is an axis of its own."""
    kv_heads, of_each, size = config.kv_heads, config.n_heads // config.kv_heads, config.head_dim
    shape = {
        "attention.wq.weight": (kv_heads, of_each, size, config.dim),
        "attention.wk.weight": (kv_heads, size, config.dim),
        "attention.wv.weight": (kv_heads, size, config.dim),
        "attention.wo.weight": (config.dim, kv_heads, of_each, size),
    }.get(part)
    return weight.view(shape) if shape else weight
