"""How long a run trains, in which batches, and what becomes of steps that go wrong. train_config -> config."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from pretrain.ema import EmaConfig
from pretrain.faults.patience import StopRule
from shards import Config


class TrainConfig(Config):
    """The length of a training and the size of its batches. A row is data.seq_len + 1 tokens."""

    # Exactly one of the two is set; it ends the run
    steps: int | None = Field(None, ge=1)  # optimizer steps, or a text such as "20e9 tokens" or "20B tokens"
    epochs: int | None = Field(None, ge=1)  # passes over every source; the schedule spans the steps that they take
    global_batch_size: int = Field(ge=1)  # rows of one optimizer step, over all ranks
    # Rows of one forward pass on one dp rank: it changes memory, not results. None: all rows of a rank
    micro_batch_size: int | None = Field(None, ge=1)
    # A step whose loss or gradient norm is not finite changes nothing. The run then continues (skip), or ends without
    # saving (stop); the step's documents are listed in the run's folder, under nonfinite/
    on_nonfinite: Literal["skip", "stop"] = "skip"
    # A step or evaluation batch that takes longer ends the process with exit code 75 and its stacks in the log
    stall_timeout: float | None = Field(900.0, gt=0)  # seconds; null: never
    # This many such steps in a row end the run even if they are skipped; so do batches without a target, and spikes
    max_nonfinite: int = Field(10, ge=1)
    # A step whose loss or gradient norm stands out against those before is marked in metrics.jsonl, and an event tells.
    # skip: its update is not made; rewind: the run goes back to a checkpoint before it and passes its batches over
    on_spike: Literal["mark", "skip", "rewind"] = "mark"
    spike_window: int = Field(128, ge=4)  # steps that a step is compared with
    # Deviations above the median at which a step stands out; the deviation is 1.4826 times the median absolute one
    spike_score: float = Field(8.0, gt=0)
    rewind_steps: int = Field(10, ge=1)  # steps that a rewind passes over, of which the spike is the last
    max_rewinds: int = Field(3, ge=0)  # how often a run goes back; afterwards spikes are only marked
    stop: StopRule | None = None  # ends the run before its last step, by its evaluations; null: never
    ema: EmaConfig | None = None  # keeps a moving average of the weights and scores it too; null: no
    # Optimizer steps between hashes of all weights and moments in metrics.jsonl; steps with a checkpoint have one too.
    # An audit compares them. null: never
    weight_hash_every: int | None = Field(100, ge=1)

    @model_validator(mode="after")
    def _one_end(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("train: needs either steps (optimizer steps) or epochs (passes over the data), not both")
        return self

    @property
    def nonfinite_limit(self) -> int:
        """Return the number of steps in a row without a finite loss and gradient that ends the run."""
        return 1 if self.on_nonfinite == "stop" else self.max_nonfinite
