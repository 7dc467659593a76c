"""How a model and its training are laid out over ranks. parallel_config -> {config, topology, model, engine}."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer

from shards import Config

Checkpointing = Literal["none", "selective", "full"]


def _former_flag(value: object) -> object:
    """Translate what older versions wrote for activation_checkpointing."""
    return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


Offload = Literal["optimizer", "parameters", "activations"]


def _several(value: object) -> object:
    """Translate one name, or none, into a sequence of names."""
    if value in ("none", ["none"], ("none",)):
        return ()
    return value if isinstance(value, list | tuple) else (value,)


def _in_one_order(names: tuple[Offload, ...]) -> tuple[Offload, ...]:
    """Return the same names for the same layout: in one order, without what another of them includes."""
    if len(set(names)) < len(names):
        raise ValueError("name each of optimizer, parameters and activations once, or write none alone")
    known: tuple[Offload, ...] = get_args(Offload)
    included = {"optimizer"} if "parameters" in names else set()
    return tuple(name for name in known if name in names and name not in included)


def _as_written(names: tuple[Offload, ...]) -> str | list[Offload]:
    """Write a single name as older versions did."""
    return names[0] if len(names) == 1 else [*names] or "none"


class ParallelConfig(Config):
    """The layout of the model and its training state over ranks, and what is traded for memory."""

    tp_size: int = Field(1, ge=1)  # ranks that share one copy of the model, each holding a slice of every matrix
    # Ranks that share the tokens of each row, for rows too long for one; in attention they divide the heads instead
    sp_size: int = Field(1, ge=1)
    # What ranks with the same weights divide: 1 optimizer state, 2 also gradients, 3 also weights
    zero_stage: Literal[0, 1, 2, 3] = 1
    # What lies in the host's memory: none, a name or a list of names. parameters: weights and the optimizer's state,
    # which needs zero_stage 3; activations: what activation_checkpointing=full keeps of each block
    offload: Annotated[
        tuple[Offload, ...], BeforeValidator(_several), AfterValidator(_in_one_order), PlainSerializer(_as_written)
    ] = ()
    sequence_parallel: bool = False  # tp ranks also divide the tokens between branches; needs tp_size > 1
    # What a block computes again in the backward pass instead of keeping it: selective: norms, rotations, products and
    # the like, which cost little; full: all but its input, which costs one more forward pass
    activation_checkpointing: Annotated[Checkpointing, BeforeValidator(_former_flag)] = "none"
    # Tokens that go through a feed-forward network at once, forward and backward, so that its hidden values exist of no
    # more; computed again in the backward pass. None: all tokens of a micro-batch
    feed_forward_tokens: int | None = Field(None, ge=1)
    compile: bool = False  # torch.compile each block; the first step then takes a minute
    attention: Literal["auto", "sdpa", "flex", "varlen"] = "auto"  # auto: on CUDA the fastest as measured at the start
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"  # type in which gradients are summed over dp ranks; bf16 sends half
    deterministic: bool = False  # on CUDA, use only kernels that give the same bits each time; slower
    timeout_minutes: float = Field(30.0, gt=0)  # how long a collective may wait for the slowest rank

    def problems(self) -> Iterator[str]:
        """Yield what is incompatible in this layout, for any number of ranks."""
        if self.sequence_parallel and self.tp_size == 1:
            yield "parallel.sequence_parallel=true divides tokens among tensor-parallel ranks; it needs tp_size > 1"
        if self.offloads_weights and self.zero_stage != 3:
            yield (
                f"parallel.offload=parameters needs parallel.zero_stage=3, not {self.zero_stage};"
                " offload=optimizer works with every stage"
            )
        if self.offloads_activations and self.activation_checkpointing != "full":
            yield (
                "parallel.offload=activations moves the input of each block, which is all that is kept of it with"
                f" parallel.activation_checkpointing=full, not {self.activation_checkpointing}; set full"
            )

    @property
    def offloads_weights(self) -> bool:
        """Return whether weights lie on the host between their uses."""
        return "parameters" in self.offload

    @property
    def offloads_optimizer(self) -> bool:
        """Return whether the optimizer's state lies on the host; where weights do, it does too."""
        return "optimizer" in self.offload or self.offloads_weights

    @property
    def offloads_activations(self) -> bool:
        """Return whether the blocks' inputs lie on the host from the forward pass to the backward pass."""
        return "activations" in self.offload

    @property
    def applied_zero_stage(self) -> Literal[1, 2, 3]:
        """Return the ZeRO stage that DeepSpeed is given.

        Stage 0 runs as 1, since DeepSpeed's own has no fp32 accumulation, a wrong norm at tp > 1, and checkpoints that
        cannot change topology.
        """
        return self.zero_stage or 1
