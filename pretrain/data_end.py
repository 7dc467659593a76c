"""Forecast the end of a run's data at the start, and log when it has come. loader -> data_end -> {assembly, trainer}.

A run has either a number of steps, for which its data may not suffice, or a number of epochs, which end it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pretrain.optim import SchedulePart, learning_rate_of_run
from pretrain.topology import Topology
from shards import Forecast, Loader

_logger = logging.getLogger(__name__)


def foresee(loader: Loader | None, steps: int | None, topology: Topology) -> int:
    """Return the steps of the whole run: those requested, or about as many as the data has. Every rank calls it.

    Args:
        steps: None means as many as the sources' max_epochs yield.
    """
    forecast = None
    if loader and topology.is_main:
        forecast = loader.forecast(steps)
        log_forecast(steps, forecast)
    forecast = topology.broadcast_object(forecast)
    assert forecast is not None
    foreseen = steps or forecast.last_step
    assert foreseen is not None, "each epoch of a source ends"
    return max(1, foreseen)


def log_forecast(steps: int | None, forecast: Forecast) -> None:
    """Log at which step the data will end, and which sources run out before the run does."""
    last = "" if forecast.last_step is None else f"{'' if forecast.is_exact else 'about '}{forecast.last_step}"
    if steps is None:
        guess = "" if forecast.is_exact else " (estimated from a sample; beyond it the schedule keeps its last rate)"
        _logger.info("the epochs will end at step %s%s", last, guess)
    elif forecast.last_step is not None and forecast.last_step < steps:
        _logger.warning(
            "the data will end at step %s of train.steps=%d (%.0f %%), when all sources have been read max_epochs"
            " times; so will the run, before its schedule does: set train.epochs instead, lower train.steps or raise"
            " max_epochs",
            last, steps, 100 * forecast.last_step / steps,
        )  # fmt: skip
    elif forecast.share_read is not None:
        share = 100 * forecast.share_read
        _logger.info("train.steps=%d will read about %.3g %% of the rows that max_epochs allows", steps, share)
    if forecast.unreached is not None:
        _logger.warning(
            "the sources in use will have run out before the stage at step %d begins, and the run will end there with"
            " an error: let it begin earlier, or raise max_epochs", forecast.unreached,
        )  # fmt: skip
    for short in forecast.shortfalls:
        _logger.warning(
            "source %r runs out at about step %d, when it has been read max_epochs times: it gives %.3g %% of the run's"
            " rows, not the %.3g %% that its weight asks for",
            short.source, short.step, 100 * short.met, 100 * short.wished,
        )  # fmt: skip


def log_end(step: int, steps: int | None, foreseen: int, schedule: Sequence[SchedulePart]) -> None:
    """Log that the data, and with it the run, has ended.

    Args:
        step: the last step.
        steps: as in `foresee`.
        foreseen: steps of the whole run, on which the schedule is based.
    """
    if steps is None:
        _logger.info("all epochs are done at step %d; %d steps were forecast", step, foreseen)
        return
    rate = learning_rate_of_run(max(0, step - 1), schedule, foreseen)
    _logger.warning(
        "the data ends at step %d of train.steps=%d (%.0f %%), all sources having been read max_epochs times, and the"
        " run with it; its last learning rate was %.3g", step, steps, 100 * step / steps, rate,
    )  # fmt: skip
