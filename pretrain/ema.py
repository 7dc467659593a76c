"""How long the moving average of the weights remembers. config -> ema -> stepper."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from shards import Config


class EmaConfig(Config):
    """A moving average of the weights, kept beside them. Exactly one value is set, and says how long it remembers."""

    decay: float | None = Field(None, gt=0, lt=1)  # share of its weight that a step keeps when the next one comes
    half_life_steps: float | None = Field(None, gt=0)  # optimizer steps after which a step counts half
    half_life_tokens: float | None = Field(None, gt=0)  # tokens trained on after which a step counts half

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if [self.decay, self.half_life_steps, self.half_life_tokens].count(None) != 2:
            raise ValueError("needs exactly one of decay, half_life_steps and half_life_tokens")
        return self

    def total_after(self, total: float, n_tokens: int) -> float:
        """Return the sum of the weights of all steps in the average after one more, whose own weight is 1.

        So the average moves to the new weights by the share 1 / total; it is the weighted mean of the steps' weights
        from the first on, and holds nothing of the initial ones.

        Args:
            total: the sum before the step; 0 before the first.
            n_tokens: tokens of the step.
        """
        if self.decay is not None:
            return total * self.decay + 1
        if self.half_life_steps is not None:
            return total * 0.5 ** (1 / self.half_life_steps) + 1
        assert self.half_life_tokens is not None
        return total * 0.5 ** (n_tokens / self.half_life_tokens) + 1
