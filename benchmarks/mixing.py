"""How well rows are mixed: `python benchmarks/mixing.py --plot mixing.png`.

For several numbers of lanes, the share of each source in every global batch and in every lane's prefix, from the plan's
own rule: no shard is read. Prints the worst deviations.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import numpy.typing as npt

from shards.plan import integer_weights, lane_phase, mixing_sequence

WEIGHTS = (0.5, 0.3, 0.15, 0.05)
LANES = (8, 64, 256, 1024)
ROWS = 2000  # per lane


def draws(lanes: int) -> npt.NDArray[np.int32]:
    """int32 [ROWS, lanes]: the source of each lane's rows; a line is a global batch of `lanes` rows."""
    shares = integer_weights(WEIGHTS)
    sequence = mixing_sequence(shares)
    phases = np.array([lane_phase(lane, len(sequence)) for lane in range(lanes)])
    return sequence[(phases + np.arange(ROWS)[:, None]) % len(sequence)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="a PNG to write")
    arguments = parser.parse_args()
    shares_of: dict[int, npt.NDArray[np.float64]] = {}
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
        lane_error = np.abs(hot.cumsum(axis=0) - expected).max()
        single = int((shares_of[lanes].max(axis=1) == 1).sum())
        print(f"| {lanes} | {batch_error:.2f} | {lane_error:.2f} | {single} |")
    if arguments.plot:
        plot(shares_of, arguments.plot)


def plot(shares_of: dict[int, npt.NDArray[np.float64]], path: Path) -> None:
    """For each number of lanes, each source's share in the first 200 batches."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(shares_of), figsize=(14, 3.5), sharey=True, layout="constrained")
    for axis, (lanes, shares) in zip(axes, shares_of.items(), strict=True):
        for source, weight in enumerate(WEIGHTS):
            axis.plot(shares[:200, source], linewidth=0.8, label=f"weight {weight}")
            axis.axhline(weight, color="gray", linewidth=0.5, linestyle="--")
        axis.set_title(f"{lanes} lanes")
        axis.set_xlabel("global batch")
    axes[0].set_ylabel("share of the batch's rows")
    axes[-1].legend(fontsize="small")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
