"""Estimates of signal and variance are right on average, and the noise scale follows from the records alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pretrain.gradient_noise import GradientNoise, NoiseScale, estimate, last_noise
from pretrain.run.run_folder import RunFolder


def test_estimates_are_right_on_average_for_parts_of_any_size() -> None:
    generator = np.random.default_rng(0)
    gradient, deviations = np.array([0.3, -0.1, 0.0]), np.array([1.0, 2.0, 0.5])  # of a single target
    counts = [1, 5, 2, 8]
    n_targets, trials, squared = sum(counts), 20_000, sum(count**2 for count in counts)
    drawn = generator.normal(gradient, deviations, (trials, n_targets, 3))
    parts = np.add.reduceat(drawn, [0, 1, 6, 8], axis=1) / n_targets
    wholes, of_parts = (parts.sum(1) ** 2).sum(1), (parts**2).sum((1, 2))
    found = [estimate(*norms, n_targets, squared) for norms in zip(wholes, of_parts, strict=True)]
    mean, error = np.mean(found, axis=0), np.std(found, axis=0) / trials**0.5
    true = np.array([(gradient**2).sum(), (deviations**2).sum()])
    assert np.all(np.abs(mean - true) < 4 * error)
    assert np.all(error < 0.05 * true), "or the line above says nothing"


def test_nothing_follows_from_one_part() -> None:
    assert estimate(2.0, 2.0, 5, 25) is None


def test_a_killed_run_goes_on_with_the_same_figures(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    generator, whole, figures = np.random.default_rng(1), NoiseScale(), []
    for step in range(1, 1201):
        noise = GradientNoise(*generator.normal([1.0, 50.0], 3.0).tolist()) if step % 3 else None
        figures.append(whole.note(step, noise))
        record = {"gradient_signal": noise.signal, "gradient_variance": noise.variance} if noise else {}
        folder.metrics.append({"step": step, "loss": 1.0, **record})
    resumed, later = NoiseScale(last_noise(folder, 1000)), dict(last_noise(folder, 1200))
    assert [resumed.note(step, later.get(step)) for step in range(1001, 1201)] == figures[1000:]
    assert figures[-1] == pytest.approx(50.0, rel=0.3)


def test_the_noise_scale_is_the_ratio_of_the_means_and_nothing_without_a_signal() -> None:
    scale = NoiseScale()
    assert scale.note(1, None) is None
    assert scale.note(1, GradientNoise(-1.0, 4.0)) is None
    assert scale.note(65, GradientNoise(2.0, 4.0)) == pytest.approx((4 + 4 / 2) / (2 - 1 / 2))
