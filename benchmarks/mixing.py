"""Measure how well rows are mixed: `python benchmarks/mixing.py --plot mixing.png`.

For several numbers of lanes, compute the share of each source in every global batch and in every lane's prefix from the
plan's own rule, without reading a shard, and print the worst deviations.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import numpy.typing as npt

from shards.config import PLAN_VERSIONS
from shards.plan.mixing import mix_of

WEIGHTS = (0.5, 0.3, 0.15, 0.05)
LANES = (8, 64, 256, 1024)
ROWS = 2000  # per lane
SHOWN = 60  # rows shown in the picture

Figures = npt.NDArray[np.float64]


def draws(lanes: int) -> npt.NDArray[np.int32]:
    """Return int32 [ROWS, lanes]: the source of each lane's rows; a line is a global batch of `lanes` rows."""
    mix = mix_of(WEIGHTS, PLAN_VERSIONS[-1])
    assert mix is not None
    return np.array([[mix.source_of(lane, row) for lane in range(lanes)] for row in range(ROWS)], np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="PNG to write")
    arguments = parser.parse_args()
    shares_of: dict[int, Figures] = {}
    errors_of: dict[int, Figures] = {}
    print(
        "| lanes = batch | worst share in a batch, points off | worst lane prefix, rows off | batches of one source |"
    )
    print("| ---: | ---: | ---: | ---: |")
    for lanes in LANES:
        drawn = draws(lanes)
        hot = drawn[..., None] == np.arange(len(WEIGHTS))  # [rows, lanes, sources]
        shares_of[lanes] = hot.mean(axis=1)
        batch_error = 100 * np.abs(shares_of[lanes] - WEIGHTS).max()
        expected = np.arange(1, ROWS + 1)[:, None, None] * np.array(WEIGHTS)
        errors_of[lanes] = hot.cumsum(axis=0) - expected  # [rows, lanes, sources]
        single = int((shares_of[lanes].max(axis=1) == 1).sum())
        print(f"| {lanes} | {batch_error:.2f} | {np.abs(errors_of[lanes]).max():.2f} | {single} |")
    if arguments.plot:
        plot(shares_of, errors_of, arguments.plot)


def plot(shares_of: dict[int, Figures], errors_of: dict[int, Figures], path: Path) -> None:
    """Plot, per number of lanes, sources' shares in each global batch and the deviations of lanes' prefixes."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(shares_of), figsize=(14, 6.5), sharex=True, sharey="row", layout="constrained")
    for column, lanes in enumerate(shares_of):
        above, below = axes[:, column]
        for source, weight in enumerate(WEIGHTS):
            color = f"C{source}"
            above.plot(shares_of[lanes][:SHOWN, source], linewidth=0.7, color=color)
            above.axhline(weight, linewidth=1.2, linestyle="--", color=color, label=f"weight {weight}")
            errors = errors_of[lanes][:SHOWN, :, source]
            below.fill_between(range(SHOWN), errors.min(axis=1), errors.max(axis=1), color=color, alpha=0.2)
            below.plot(errors.min(axis=1), linewidth=0.9, color=color)
            below.plot(errors.max(axis=1), linewidth=0.9, color=color)
        for bound in (-2, 2):
            below.axhline(bound, linewidth=1, linestyle=":", color="black")
        above.set_title(f"{lanes} lanes, batches of {lanes} rows")
        below.set_xlabel("global batch = row of each lane")
    axes[0, 0].set_ylabel("share of the batch's rows")
    axes[1, 0].set_ylabel("rows drawn so far, minus the share\n(from the lowest lane to the highest)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(WEIGHTS))
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
