"""Which steps stand out follows from the last records alone, by median and median absolute deviation."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config import load_config
from pretrain.faults.spikes import SpikeWatch, figures_of, last_figures, spike_event, unapplied_in_a_row
from pretrain.run.run_folder import Rewind, RunFolder
from pretrain.run.step_log import StepLog
from pretrain.step_stats import Limits, StepStats
from tests.tiny_run import write_config

WINDOW, SCORE = 8, 5.0


def decide(watch: SpikeWatch, stage: int, loss: float, norm: float) -> tuple[Limits, bool, dict[str, object]]:
    """Make a step whose update is skipped if it stands out; return its limits, whether it is told, and its record."""
    limits = watch.limits(stage)
    stats = StepStats(loss, 0.0, norm, applied=math.isfinite(loss + norm))
    spike = stats.exceeds(limits)
    told = watch.note(stage, stats, limits, passed_over=False)
    record = {"loss": loss, "grad_norm": norm, "stage": stage, "spike": spike or None, "skipped_update": spike or None}
    return limits, told, record | {"nonfinite": None if stats.applied else True}


def test_limits_are_those_of_numpy() -> None:
    drawn = np.random.default_rng(1)
    losses, norms = 3 + 0.1 * drawn.standard_normal(40), np.exp(0.3 * drawn.standard_normal(40))
    losses[20], norms[30] = 9.0, 50.0
    watch, spikes = SpikeWatch(WINDOW, SCORE, []), []
    for step, (loss, norm) in enumerate(zip(losses.tolist(), norms.tolist(), strict=True)):
        limits, _, record = decide(watch, 0, loss, norm)
        before = slice(max(0, step - WINDOW), step)
        if step >= WINDOW / 2:
            for values, least, found in (
                (losses[before], 2e-3 * np.median(losses[before]), limits.loss),
                (np.log(norms[before]), 2e-2, math.log(limits.grad_norm)),
            ):
                deviation = 1.4826 * np.median(np.abs(values - np.median(values)))
                assert found == pytest.approx(np.median(values) + SCORE * max(deviation, least))
        else:
            assert limits == Limits()
        spikes += [step] if record["spike"] else []
    assert {20, 30} <= set(spikes)
    assert len(spikes) <= 4, "a window of 8 estimates a deviation badly, but not that badly"


figure = st.one_of(st.floats(0.5, 9.0), st.sampled_from([3.0, 3.01, 3.02, 40.0, math.nan, math.inf]))


@given(st.lists(st.tuples(st.integers(0, 1), figure, figure), min_size=1, max_size=40), st.data())
def test_a_run_that_is_killed_anywhere_decides_as_if_it_had_not_been(
    steps: list[tuple[int, float, float]], data: st.DataObject
) -> None:
    killed_after = data.draw(st.integers(0, len(steps)))
    watch = SpikeWatch(WINDOW, SCORE, [])
    whole = [decide(watch, *step) for step in steps]
    lines = [{"step": number, **record} for number, (*_, record) in enumerate(whole, 1)]
    # As they are read back: what is None is left out, and what is not finite is null.
    read = [
        {key: None if isinstance(value, float) and not math.isfinite(value) else value
         for key, value in line.items() if value is not None}
        for line in lines[:killed_after]
    ]  # fmt: skip
    figures = figures_of(read)
    resumed = SpikeWatch(WINDOW, SCORE, figures[-WINDOW:])
    assert repr([decide(resumed, *step) for step in steps[killed_after:]]) == repr(whole[killed_after:])  # NaN as NaN


def test_figures_are_read_from_the_last_records(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "metrics.jsonl")
    for step in range(1, 8):
        kind = {5: {"passed_over": True}, 6: {"skipped_update": True, "spike": True}, 7: {"nonfinite": True}}.get(
            step, {}
        )
        log.append({"step": step, "loss": math.nan if step == 5 else step / 3, "grad_norm": 0.1, **kind})
    found = last_figures(RunFolder(tmp_path), 7, 4)
    assert [step.loss for step in found if step.applied is not None] == [4 / 3, 6 / 3, 7 / 3]
    assert [step.applied for step in found] == [True, None, False, False]
    assert unapplied_in_a_row(found) == 2
    assert unapplied_in_a_row(found[:1]) == 0


def test_a_stage_is_compared_with_itself_and_a_new_level_is_accepted() -> None:
    watch = SpikeWatch(WINDOW, SCORE, [])
    for _ in range(WINDOW):
        decide(watch, 0, 3.0, 1.0)
    assert watch.limits(1) == Limits()
    told = [decide(watch, 0, 4.0, 1.0)[1] for _ in range(WINDOW)]
    assert told == [True] + [False] * (WINDOW - 1), "told once"
    assert watch.limits(0).loss > 4.0


def test_an_event_names_what_stands_out_and_the_command_that_lists_the_documents(tmp_path: Path) -> None:
    stats = StepStats(5.25, 0.0, 1.0, applied=True)
    event = spike_event(7, stats, Limits(3.5, 2.0), RunFolder(tmp_path / "a"), "training goes on")
    assert "loss 5.25, above 3.5; training goes on" in event.text
    assert "gradient norm" not in event.text
    assert event.text.endswith(f"provenance.py --run {tmp_path / 'a'} --step 7 --by-loss")


def test_steps_that_a_run_passes_over_join_those_of_its_config(tmp_path: Path) -> None:
    plain = load_config(write_config(tmp_path, "a", train={"steps": 99}))
    config = load_config(tmp_path / "config.yaml", ["data.skip_steps=[[3,4],[5,6],[40,50]]"])
    assert config.passing_over([]) == config
    rewinds = [Rewind(12, 8, (10, 12)), Rewind(14, 8, (12, 14)), Rewind(39, 30, (30, 39))]
    assert config.passing_over(rewinds).data.skip_steps == ((3, 6), (10, 14), (30, 50))
    assert plain.passing_over(rewinds[:1]).data.skip_steps == ((10, 12),)
    shorter = plain.model_copy(update={"train": plain.train.model_copy(update={"steps": 11})})
    assert shorter.passing_over(rewinds).data.skip_steps == ((10, 11),), "those past its end are none of its steps"
