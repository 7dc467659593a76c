"""A model without optimizer or engine, for weights of any origin.

weights -> forward_model -> {scoring, harness}. Every dp rank holds the whole model, or its tensor-parallel slices, so
any number of ranks works.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pretrain.model.architecture import Cache, ModelConfig, Precision
from pretrain.model.attention_choice import attention_backend
from pretrain.model.loss import Scores, Targets, target_scores
from pretrain.model.prefill import next_logits
from pretrain.model.weights import Weights, fill
from pretrain.parallel_config import ParallelConfig
from pretrain.topology import Topology


class ForwardModel:
    """The forward pass of a model.

    Args:
        precision: type of the weights; a bf16 run's weights are rounded to those of its training steps.
    """

    def __init__(self, config: ModelConfig, parallel: ParallelConfig, precision: Precision, topology: Topology) -> None:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        attention = attention_backend(parallel, topology, config.heads, dtype)
        model = config.make(ParallelConfig(), attention)
        self._model = model.to(topology.device, dtype).eval()
        self.config = config
        self._topology = topology

    def adopt(self, config: ModelConfig) -> None:
        """Compute positions from now on as another config of the model says."""
        self._model.adopt(config)
        self.config = config

    def set_weights(self, weights: Weights) -> None:
        """Load other weights of the same architecture into the model."""
        fill(self._model, weights, self._topology.tp_rank, self._topology.tp_size)

    @torch.no_grad()
    def score(self, tokens: Tensor, segment_ids: Tensor, targets: Targets) -> Scores:
        """Score targets that follow positions of tokens [B, T]."""
        return self._model(tokens, segment_ids, functools.partial(target_scores, targets=targets))

    @torch.no_grad()
    def next_logits(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Return this rank's slice of the logits after tokens [1, T] that follow those in the cache."""
        return next_logits(self._model, tokens, cache)
