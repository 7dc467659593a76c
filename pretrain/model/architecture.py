"""What a model is asked for by all that trains, saves, scores and runs it, whatever its architecture.

architecture -> {transformer, recurrent} -> architectures. docs/own-model.md shows how to write one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, Self, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from pretrain.model.activations import ActivationMeasurement
from pretrain.model.attention import AttentionBackend
from pretrain.model.lora import LoraConfig
from pretrain.model.loss import all_logits
from pretrain.model.parallel import slice_bounds, slice_size
from pretrain.parallel_config import ParallelConfig
from pretrain.parametrization import Scale
from pretrain.topology import Topology
from shards import Config, ConfigError

T = TypeVar("T")

# What to make of the final hidden states [B, T, dim] and this rank's slice [vocab_size / tp_size, dim] of the output
# projection, rounded up: logits, a loss, scores.
Head = Callable[[Tensor, Tensor], T]

Use = Literal["training", "scoring", "uncompiled"]  # of a forward pass

Precision = Literal["bf16", "fp32"]  # type of the weights in the forward and backward pass

Layout = Literal["hf", "meta", "headrace"]  # of a model's folder: Hugging Face's, Meta's, our own


@dataclass(frozen=True)
class WeightSpec:
    """A weight's full shape, and how tensor-parallel ranks split it.

    Attributes:
        shard_dim: the dimension along which they do; None if it is replicated.
        multiple: what their slices are rounded up to a multiple of.
    """

    shape: tuple[int, ...]
    shard_dim: int | None = None
    multiple: int = 1

    def bounds(self, index: int, count: int) -> tuple[slice, ...]:
        """Return an index into the whole weight: the slice of rank `index` of `count`, without its padding."""
        bounds = [slice(0, size) for size in self.shape]
        if self.shard_dim is not None:
            size = self.shape[self.shard_dim]
            bounds[self.shard_dim] = slice(*slice_bounds(size, index, count, self.multiple))
        return tuple(bounds)

    def joined(self, parts: Sequence[Tensor]) -> Tensor | None:
        """Return the whole weight, given all ranks' slices with their padding; None if they are not of this shape."""
        dim = self.shard_dim
        whole = parts[0] if dim is None else torch.cat(list(parts), dim)
        stored = list(self.shape)
        if dim is not None:
            stored[dim] = slice_size(stored[dim], len(parts), self.multiple) * len(parts)
        return whole[self.bounds(0, 1)] if list(whole.shape) == stored else None


@dataclass(frozen=True)
class Heads:
    """The heads of a layer's attention, over all tensor-parallel ranks."""

    n_heads: int  # of queries
    n_kv_heads: int
    head_dim: int
    dropout: float = 0.0  # share of the attention's weights that is dropped in training


@dataclass(frozen=True)
class BlockCosts:
    """The costs of a block for one tensor-parallel rank in training, in bytes per token.

    Memory and speed are estimated from it.

    Attributes:
        kept: what it keeps of its forward pass for the backward pass.
        backward: what its backward pass takes beside that: what it computes again, and gradients.
        moved: what a fused forward pass reads and writes outside of matrix products and attention; None if the time of
            a block does not follow from it.
        of_tile: with parallel.feed_forward_tokens, what the backward pass takes for each of so many tokens beside that.
        sums: bytes, whatever the tokens, of the gradients that it sums over those.
        repeated: multiplications per token of the forward pass that are made again for them, without checkpointing.
    """

    kept: float
    backward: float
    moved: float | None
    of_tile: float = 0.0
    sums: float = 0.0
    repeated: float = 0.0


class Cache(Protocol):
    """The memory of a model of the tokens that it has seen of documents that it continues.

    Attributes:
        length: number of tokens of each document that it has seen.
    """

    length: int


class ModelConfig(Config, ABC):
    """The config of one architecture. Models with equal configs compute the same function of their weights."""

    # Keys that decide what a model computes from its weights; the others concern initialization and training
    COMPUTES: ClassVar[tuple[str, ...]] = ("architecture", "dim", "n_layers", "vocab_size", "tie_embeddings")
    # What its folder can be written and read as, first what is written unless another is asked for
    LAYOUTS: ClassVar[tuple[Layout, ...]] = ("headrace",)
    # Keys that a stage may change, which decide how positions are computed. They are read in each forward pass, outside
    # of blocks; what is read once, or compiled, does not belong here
    POSITIONS: ClassVar[tuple[str, ...]] = ()
    SPLITS: ClassVar[bool] = False  # whether tensor-parallel ranks can share a model
    SPLITS_ROWS: ClassVar[bool] = False  # whether sequence-parallel ranks can divide the tokens of a row
    TILES: ClassVar[bool] = False  # whether parallel.feed_forward_tokens can go through its networks at once

    architecture: str  # a Literal of its name, as the default, in every config class
    dim: int = Field(ge=1)  # width of the embedding and of what layers pass on
    n_layers: int = Field(ge=1)  # number of layers
    vocab_size: int = Field(ge=1)  # number of the tokenizer's pieces; tp_size need not divide it
    # Each tp rank's rows of embedding and output are rounded up to a multiple of it, by padding that no token has; GPUs
    # multiply some sizes faster, such as multiples of 64 or 128
    vocab_multiple: int = Field(1, ge=1)
    tie_embeddings: bool = False  # the output projection is the embedding
    dropout: float = Field(0.0, ge=0, lt=1)  # on the embedding and on what each layer adds to it

    @abstractmethod
    def make(self, parallel: ParallelConfig, attention: AttentionBackend) -> Model:
        """Make this rank's part of the model on the CPU, with weights that have not been drawn.

        Args:
            parallel: how it is trained; only memory and speed depend on it.
            attention: the backend that computes attention, where the model has some.
        """

    @abstractmethod
    def layer_specs(self) -> dict[str, WeightSpec]:
        """List all weights between embedding and output, by name, in the order in which the layers use them."""

    @abstractmethod
    def new_cache(self, max_length: int, dtype: torch.dtype | None = None) -> Cache:
        """Make an empty cache for documents of at most so many tokens, prompt and continuation together.

        Args:
            dtype: type of what it keeps of each token; None: the type in which that is computed.
        """

    @property
    def cached_numbers(self) -> int:
        """Return how many numbers a cache keeps of each token, divided among the tp ranks; 0: its size is fixed."""
        return 0

    @property
    @abstractmethod
    def logit_variance(self) -> float | None:
        """Return the variance of a logit of a model that was just drawn; None if it is not known."""

    @property
    def heads(self) -> Heads | None:
        """Return the heads of a layer's attention; None if it has none."""
        return None

    @property
    def dropouts(self) -> Mapping[str, float]:
        """Return the shares that are dropped in training, by key; an audit of a run with any needs the run's ranks."""
        return {"dropout": self.dropout}

    @property
    def positions(self) -> dict[str, Any]:
        """Return the keys that decide how positions are computed, with their values as JSON has them."""
        return self.model_dump(mode="json", include=set(self.POSITIONS), exclude_none=True)

    def with_positions(self, changes: Mapping[str, object], at: str) -> Self:
        """Return the config of the same model with positions that are computed otherwise.

        Args:
            changes: new values, already validated, by key.
            at: the key that holds them, for messages.
        Raises: ConfigError if this architecture has no such key.
        """
        if unknown := [key for key in changes if key not in self.POSITIONS]:
            has = f"only {', '.join(self.POSITIONS)}" if self.POSITIONS else "nothing, since it computes no positions"
            raise ConfigError(f"{at}.{unknown[0]}: of model.architecture={self.architecture} a stage may change {has}")
        return self.model_copy(update=dict(changes))

    @property
    def adapters(self) -> LoraConfig | None:
        """Return what is trained in place of the weights, which then stay as they are in init_from; None: the weights.

        A model with adapters has called `attach_adapters`.
        """
        return None

    def merged(self) -> Self:
        """Return the config of the model whose weights have the adapters' updates added."""
        return self

    @property
    def split_sizes(self) -> Mapping[str, int]:
        """Return the sizes, by key, that tensor parallelism divides: tp_size must divide each of them."""
        return {}

    def problems(self) -> Iterator[str]:
        """Yield what cannot work in this config, beyond the bounds of single keys."""
        yield from ()

    def scale_of(self, name: str) -> Scale:
        """Return how a weight begins and learns relative to the standard parametrization, by its name."""
        return Scale()

    def products_of(self, squared_lengths: int) -> int:
        """Count the multiplications of a forward pass other than those by weights.

        Args:
            squared_lengths: sum over the documents of their length in tokens, squared.
        """
        return 0

    def block_costs(self, parallel: ParallelConfig, seq_len: int, bytes_per_weight: int) -> BlockCosts | None:
        """Return what a block costs; None if it is not known, so that there are no estimates of memory and speed.

        Args:
            seq_len: tokens per row.
            bytes_per_weight: 2 for bf16, 4 for fp32.
        """
        return None

    def spelled_out(self) -> dict[str, Any]:
        """Return all values as JSON has them, with defaults filled in that follow from other keys."""
        return self.model_dump(mode="json")

    def describe(self) -> str:
        """Describe the model's shape for a reader, in a few words."""
        return f"{self.architecture}, {self.n_layers} layers of dim {self.dim}"

    def gives_each_rank_tokens(self, tp_size: int) -> bool:
        """Return whether every one of `tp_size` equal slices of the vocabulary, rounded up, has a token."""
        start, end = slice_bounds(self.vocab_size, tp_size - 1, tp_size, self.vocab_multiple)
        return start < end


class Model(nn.Module, ABC):
    """A model, of which each tensor-parallel rank holds its slices.

    Its weights are named as its config's `layer_specs` lists them, besides "embedding.weight", a `VocabEmbedding`, and
    "output.weight", an `Output`.

    Attributes:
        config: the architecture.
        blocks: its layers, all of one class. The last argument of their forward is a `Use`, as `use_with` returns it,
            and their result what they pass on, [B * T, dim]. ZeRO-3 gathers the weights of one at a time.
    """

    config: ModelConfig
    blocks: nn.ModuleList

    @abstractmethod
    def forward(
        self, tokens: Tensor, segment_ids: Tensor | None = None, head: Head[Any] = all_logits, cache: Any = None
    ) -> Any:
        """Predict each next token.

        Args:
            tokens: [B, T] int64.
            segment_ids: [B, T] int64 on the host; neighbours that are equal but for their sign belong to one piece, 0
                is padding. Needed without a cache.
            head: what to make of the predictions; the default makes this rank's slice of the logits,
                [B, T, vocab_size / tp_size], in the weights' type.
            cache: one of `config.new_cache`, of the preceding tokens, to which these are added; each row is then one
                piece.
        Returns:
            The head's result. Under sequence parallelism, which needs `SPLITS_ROWS`, every rank is given whole rows,
            and without a cache the head is given this rank's T / sp_size of the positions.
        """

    def adopt(self, config: ModelConfig) -> None:
        """Compute from now on as another config says, which differs in keys of `POSITIONS` alone."""
        self.config = config

    def use_with(self, cache: object) -> Use:
        """Return what a forward pass is for, given the cache that it is called with; None: it has none."""
        return "training" if self.training else "scoring" if cache is None else "uncompiled"

    @abstractmethod
    def initialize(self, seed: int) -> None:
        """Draw all weights, in place; the same in every layout."""

    def measurement(self, topology: Topology) -> ActivationMeasurement:
        """Return what measures the layers of a model that is not sharded by tokens."""
        return ActivationMeasurement(self.blocks, topology)
