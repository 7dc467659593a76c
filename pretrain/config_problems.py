"""What a model, its optimizer and its layout have in them that cannot work together. config -> config_problems."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from pretrain.model.architecture import ModelConfig
from pretrain.model.attention import MASK_LIMIT, mask_bytes
from pretrain.model.weights import trained_specs
from pretrain.optim import OptimConfig, is_named
from pretrain.stages import RunStage
from pretrain.topology import ParallelConfig
from shards import ConfigError
from shards.config_errors import not_divisible


def model_problems(model: ModelConfig, parallel: ParallelConfig | None, optim: OptimConfig) -> Iterator[str]:
    """Yield what cannot work of a model, by itself and with the others.

    Args:
        parallel: None if that section of the config is not valid.
    """
    yield from model.problems()
    yield from _pattern_problems(model, optim)
    if model.adapters:
        yield from _adapter_problems(model, parallel, optim)
    if parallel:
        yield from _layout_problems(model, parallel)
        for key, value in model.split_sizes.items():
            yield from not_divisible(f"model.{key}", value, "parallel.tp_size", parallel.tp_size)
        if not model.gives_each_rank_tokens(parallel.tp_size):
            yield (
                f"model.vocab_size={model.vocab_size} leaves some of parallel.tp_size={parallel.tp_size} ranks without"
                f" a token; make parallel.tp_size or model.vocab_multiple={model.vocab_multiple} smaller"
            )


def length_problems(key: str, seq_len: int, parallel: ParallelConfig) -> Iterator[str]:
    """Yield why rows of this length cannot be divided among ranks.

    Args:
        key: what says how long they are.
    """
    if parallel.sequence_parallel and parallel.sp_size > 1:
        both = parallel.tp_size * parallel.sp_size
        yield from not_divisible(key, seq_len, "parallel.tp_size times parallel.sp_size", both)
    elif parallel.sequence_parallel:
        yield from not_divisible(key, seq_len, "parallel.tp_size", parallel.tp_size)
    else:
        yield from not_divisible(key, seq_len, "parallel.sp_size", parallel.sp_size)


def check_masks(stages: Sequence[RunStage], model: ModelConfig, parallel: ParallelConfig) -> None:
    """Check, before training starts, that no stage's rows need an attention mask that is too large to be made.

    Raises:
        ConfigError: naming each stage whose rows do.
    """
    heads = model.heads
    if heads is None or not (heads.dropout or parallel.attention == "sdpa"):
        return
    asked = f"model.attention_dropout={heads.dropout}" if heads.dropout else "parallel.attention=sdpa"
    right = "model.attention_dropout=0" if heads.dropout else "parallel.attention=auto"
    problems = [
        f"{f'stages.{i - 1}.' if i else ''}data.seq_len={stage.data.seq_len}: {asked} needs a whole mask, which grows"
        f" with the square of a row's length, here {mask_bytes(stage.data.seq_len) / 1e9:.1f} GB a row; set {right}, or"
        f" rows of at most {math.isqrt(MASK_LIMIT)}"
        for i, stage in enumerate(stages)
        if mask_bytes(stage.data.seq_len) > MASK_LIMIT
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _layout_problems(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    """Yield what of a layout an architecture knows nothing of."""
    named = f"model.architecture={model.architecture}"
    if parallel.tp_size > 1 and not model.SPLITS:
        yield f"parallel.tp_size={parallel.tp_size}: {named} cannot be split over ranks; set parallel.tp_size=1"
    if parallel.sp_size > 1 and not model.SPLITS_ROWS:
        yield f"parallel.sp_size={parallel.sp_size}: {named} cannot divide a row over ranks; set parallel.sp_size=1"
    if parallel.feed_forward_tokens and not model.TILES:
        asked = f"parallel.feed_forward_tokens={parallel.feed_forward_tokens}"
        yield f"{asked}: {named} does not compute a few tokens at a time; set it to null"
    if model.SPLITS_ROWS and model.heads and model.heads.n_heads % parallel.tp_size == 0:
        of_rank = model.heads.n_heads // parallel.tp_size
        key = "model.n_heads" if parallel.tp_size == 1 else f"model.n_heads / parallel.tp_size ({parallel.tp_size})"
        yield from not_divisible(key, of_rank, "parallel.sp_size", parallel.sp_size)
    if parallel.attention != "auto" and model.heads is None:
        yield f"parallel.attention={parallel.attention}: {named} has no attention; leave it out"
    if model.heads and model.heads.dropout and parallel.attention in ("flex", "varlen"):
        yield (
            f"parallel.attention={parallel.attention} has no dropout of the attention's weights, which"
            f" model.attention_dropout={model.heads.dropout} asks for; use sdpa or auto"
        )


def _adapter_problems(model: ModelConfig, parallel: ParallelConfig | None, optim: OptimConfig) -> Iterator[str]:
    """Yield what cannot go together with adapters."""
    assert model.adapters is not None
    if optim.name == "muon":
        yield "model.lora: optim.name=muon orthogonalizes matrices, not factors of an update; set optim.name: adamw"
    of_swiglu = [name for name in ("w1", "w2", "w3") if model.adapters.adapts(name)]
    if parallel and parallel.feed_forward_tokens and of_swiglu:
        yield (
            f"model.lora.targets: parallel.feed_forward_tokens={parallel.feed_forward_tokens} computes feed-forward"
            f" networks without adapters; leave {', '.join(of_swiglu)} out, or set one of the two to null"
        )
    if parallel and parallel.sequence_parallel and model.adapters.dropout:
        yield (
            f"model.lora.dropout={model.adapters.dropout}: with parallel.sequence_parallel each tensor-parallel rank"
            " draws masks of its own, but all of them read the same inputs here; set one of the two to 0 or false"
        )


def _pattern_problems(model: ModelConfig, optim: OptimConfig) -> Iterator[str]:
    """Yield patterns that match no weight that is trained."""
    names = trained_specs(model)
    for pattern in optim.learning_rate_groups:
        if not any(is_named(name, pattern) for name in names):
            kinds = dict.fromkeys(re.sub(r"^blocks\.\d+\.", "blocks.*.", name) for name in names)
            yield (
                f"optim.learning_rate_groups: no weight's name matches {pattern!r}; the names are {', '.join(kinds)},"
                " with the number of a block, from 0, in place of *"
            )
