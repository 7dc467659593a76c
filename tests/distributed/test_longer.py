"""A run resumed with another schedule says how the learning rate changes; following its own advice, it does not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.distributed.ranks import run_starts
from tests.tiny_run import PEAK_RATE, write_config


def rates(folder: Path) -> list[float]:
    return [json.loads(line)["learning_rate"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.distributed
@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_a_longer_schedule_is_logged_and_the_closing_advice_works(schedule: str, tmp_path: Path) -> None:
    config = write_config(tmp_path, "elastic")
    first = ["train.steps=4", f"optim.schedule={schedule}", "optim.floor=0.2"]
    codes, output = run_starts(config, [(1, first, "")])
    assert codes == [[0]], output
    hint = output[output.index("Next ") :]
    same_run = re.search(r"with (train\S+ optim\S+ optim\S+) this one continues", hint)
    new_run = re.search(r"with (run\S+ train\S+) is a run", hint)
    assert same_run, hint
    assert new_run, hint

    codes, output = run_starts(config, [(1, same_run[1].split(), ""), (1, [*first, *new_run[1].split()], "")])
    assert codes == [[0], [0]], output
    assert "the learning rate of step" not in output
    ended = rates(tmp_path / "elastic")
    assert len(ended) == 8
    assert ended[3:] == pytest.approx([0.2 * PEAK_RATE] * 5)
    longer = rates(tmp_path / "elastic-8")
    assert len(longer) == 8
    assert longer == sorted(longer, reverse=True)
    assert longer[0] == pytest.approx(PEAK_RATE)

    codes, output = run_starts(config, [(1, [*first, "train.steps=16"], "")])
    assert codes == [[0]], output
    jumped = rates(tmp_path / "elastic")[8]
    assert (
        f"the learning rate of step 9 is {jumped:.4g}; the run's previous schedule gave {0.2 * PEAK_RATE:.4g}" in output
    )

    offered = re.search("add (.*) to stages", output)
    assert offered
    stage = offered[1].replace("step: 8", "step: 16").replace("100", "4")
    gradually = [f"stages=[{stage}]", "train.steps=24"]
    codes, output = run_starts(config, [(1, [*first, *gradually], "")])
    assert codes == [[0]], output
    assert rates(tmp_path / "elastic")[16:20] == pytest.approx([PEAK_RATE * part / 4 for part in (1, 2, 3, 4)])
