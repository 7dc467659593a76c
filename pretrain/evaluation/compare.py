"""Compare models on the same documents: how their losses differ, and how much of that may be chance.

DocumentScores -> compare -> table, picture. The interval is a paired bootstrap: documents are resampled with
replacement within each domain, the same for both models, and the differences of these draws are sorted.

Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13 (percentile interval).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from pretrain.evaluation.scores import DocumentScores
from pretrain.run.eval_figure import UNIT_OF
from pretrain.run.run_folder import RunFolder
from shards import ConfigError

_CHUNK = 1 << 22  # random numbers drawn at once
_MAX_BARS = 60  # bars in a picture; with more domains, only the largest differences are shown

Floats = npt.NDArray[np.float64]

LossFigure = Literal["bits_per_byte", "nll_per_token"]  # what is compared, as evals.jsonl calls it


@dataclass(frozen=True)
class Difference:
    """The difference of two models in one domain or average, on the documents that both were scored on.

    Attributes:
        name: of the domain; `macro` and `micro` as in evals.jsonl.
        a, b: bits per byte of each model, or nats per token where bytes are unknown.
        low, high: bounds of 95 % of the bootstrap's differences b - a; None for a domain of a single document.
        documents: number of documents that both have.
        figure: what all of them are.
    """

    name: str
    a: float
    b: float
    low: float | None
    high: float | None
    documents: int
    figure: LossFigure = "bits_per_byte"

    @property
    def unit(self) -> str:
        """Return the unit of all these figures."""
        return UNIT_OF[self.figure]

    @property
    def difference(self) -> float:
        """Return the difference b - a, which is below zero if b is better."""
        return self.b - self.a

    @property
    def is_clear(self) -> bool:
        """Return whether the interval excludes zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def compare(a: DocumentScores, b: DocumentScores, draws: int = 2000, seed: int = 0) -> list[Difference]:
    """Compare every domain that both have, in a's order, then `macro` and `micro` over these.

    They are compared by bits per byte or, if one of them has documents of token ids alone, by nats per token.

    Raises:
        ConfigError: if they have no document in common, or nats per token are of different tokens.
    """
    kind: LossFigure = "bits_per_byte" if a.knows_bytes and b.knows_bytes else "nll_per_token"
    common = [domain for domain in a.domains if domain in b.domains]
    generator = np.random.default_rng(seed)
    found, means = [], []
    sums = np.zeros((3, draws))  # over all domains: a's nll, b's nll, bytes or tokens
    wholes = np.zeros(3)
    for domain in common:
        ours, theirs = _paired(a, b, domain)
        if not len(ours):
            continue
        if kind == "nll_per_token" and (a.tokens[ours] != b.tokens[theirs]).any():
            raise ConfigError(
                f"{a.suite} and {b.suite} do not know the bytes of all documents, and the same texts of {domain} "
                "have other tokens in each; score both on texts"
            )
        sizes = a.text_bytes if kind == "bits_per_byte" else a.tokens
        columns = np.stack([a.nll[ours], b.nll[theirs], sizes[ours].astype(np.float64)])
        drawn = _resampled(columns, draws, generator)
        differences = _figure(drawn[1], drawn[2], kind) - _figure(drawn[0], drawn[2], kind)
        found.append(_difference(domain, columns.sum(axis=1), differences if len(ours) > 1 else None, len(ours), kind))
        means.append(differences)
        sums += drawn
        wholes += columns.sum(axis=1)
    if not found:
        raise ConfigError(
            f"the suites {a.suite} and {b.suite} have no document in common; compare evaluations of one suite"
        )
    count = sum(item.documents for item in found)
    macro = [sum(getattr(item, side) for item in found) / len(found) for side in ("a", "b")]
    spread = _figure(sums[1], sums[2], kind) - _figure(sums[0], sums[2], kind)
    return [
        *found,
        Difference("macro", macro[0], macro[1], *_interval(np.mean(means, axis=0)), count, kind),
        _difference("micro", wholes, spread, count, kind),
    ]


def only_in_one(a: DocumentScores, b: DocumentScores) -> tuple[list[str], list[str]]:
    """Return the domains that only a has, and those that only b has."""
    return sorted(set(a.domains) - set(b.domains)), sorted(set(b.domains) - set(a.domains))


def chosen_suites(folders: Sequence[RunFolder], wanted: str | None) -> list[str]:
    """Choose the label to compare in each folder: a label common to all, otherwise each folder's only one.

    Args:
        wanted: a label, or its beginning up to a dot or `@`; None: any.
    Raises:
        ConfigError: if there is none or several, listing those of each folder.
    """
    suites = [{path.parent.name for path in (folder.root / "evals").glob("*/*.npz")} for folder in folders]
    fitting = [{suite for suite in names if _is_called(suite, wanted)} for names in suites]
    common = set.intersection(*fitting)
    if len(common) == 1:
        return [*common] * len(folders)
    if not common and all(len(names) == 1 for names in fitting):
        return [name for names in fitting for name in names]
    have = "; ".join(
        f"{folder.root} has {', '.join(sorted(names)) or 'none'}" for folder, names in zip(folders, suites, strict=True)
    )
    raise ConfigError(f"--compare: name one suite that both were scored on with --suite ({have})")


def _is_called(suite: str, wanted: str | None) -> bool:
    return wanted is None or suite == wanted or suite.startswith((f"{wanted}.", f"{wanted}@"))


def scored_step(folder: RunFolder, suite: str, wanted: int | None) -> int:
    """Return the wanted step, or the last one scored. Raises ConfigError if the wanted step was not scored."""
    scored = sorted(int(path.stem.partition("_")[2]) for path in folder.document_scores(0, suite).parent.glob("*.npz"))
    if wanted is not None and wanted not in scored:
        raise ConfigError(f"--steps {wanted}: {folder.root} was scored on {suite} at {scored}")
    return scored[-1] if wanted is None else wanted


def _paired(a: DocumentScores, b: DocumentScores, domain: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the numbers, in a and in b, of a domain's documents, paired by equal text."""
    places = []
    for scores in (a, b):
        numbers = np.flatnonzero(scores.domain == scores.domains.index(domain))
        numbers = numbers[np.argsort(scores.key[numbers], kind="stable")]
        keys = scores.key[numbers]
        # Of several documents with the same text, the i-th in a is paired with the i-th in b.
        repeated = np.arange(len(keys)) - np.searchsorted(keys, keys)
        places.append({(int(k), int(i)): int(n) for k, i, n in zip(keys, repeated, numbers, strict=True)})
    both = [place for place in places[0] if place in places[1]]
    ours, theirs = ([found[place] for place in both] for found in places)
    return np.array(ours, np.int64), np.array(theirs, np.int64)


def _resampled(columns: Floats, draws: int, generator: np.random.Generator) -> Floats:
    """Sum columns [3, documents] over documents drawn with replacement: [3, draws]."""
    count = columns.shape[1]
    parts = []
    for start in range(0, draws, max(1, _CHUNK // count)):
        size = min(draws - start, max(1, _CHUNK // count))
        times = generator.multinomial(count, np.full(count, 1 / count), size=size)  # [size, documents]
        parts.append(columns @ times.T)
    return np.concatenate(parts, axis=1)


def _figure(nll: Floats, sizes: Floats, kind: LossFigure) -> Floats:
    """Return bits per byte or nats per token. Args: sizes: bytes or tokens."""
    return nll / (np.log(2) if kind == "bits_per_byte" else 1.0) / np.maximum(sizes, 1)


def _difference(name: str, sums: Floats, differences: Floats | None, documents: int, kind: LossFigure) -> Difference:
    """Return the difference of what is summed over documents: a's nll, b's nll, and their bytes or tokens."""
    low, high = (None, None) if differences is None else _interval(differences)
    a, b = _figure(sums[:2], sums[2], kind).tolist()
    return Difference(name, a, b, low, high, documents, kind)


def _interval(differences: Floats) -> tuple[float, float]:
    low, high = np.percentile(differences, [2.5, 97.5])
    return float(low), float(high)


def check_can_draw() -> None:
    """Check that matplotlib is installed. Raises ConfigError if it is not."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("a picture needs matplotlib: pip install matplotlib") from None


def draw(differences: Sequence[Difference], names: tuple[str, str], path: Path) -> None:
    """Draw the differences with their intervals as a PNG: one row per domain, averages at the bottom.

    It needs matplotlib; see `check_can_draw`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    domains, averages = list(differences[:-2]), list(differences[-2:])
    left_out = len(domains) - _MAX_BARS
    if left_out > 0:
        domains = sorted(domains, key=lambda item: -abs(item.difference))[:_MAX_BARS]
    shown = [*averages, *sorted(domains, key=lambda item: -item.difference)]  # matplotlib counts from the bottom
    figure = Figure(figsize=(8, 1.6 + 0.26 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, item in enumerate(shown):
        color = "#888888" if not item.is_clear else ("#1a7f37" if item.difference < 0 else "#b3261e")
        if item.low is not None and item.high is not None:
            axes.plot([item.low, item.high], [place, place], color=color, linewidth=2, solid_capstyle="butt")
        axes.plot(item.difference, place, "o", color=color, markersize=5)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.axhline(1.5, color="#cccccc", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [item.name for item in shown])
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.set_xlabel(f"{differences[0].unit}, {names[1]} minus {names[0]} (95 % bootstrap interval over documents)")
    title = f"{names[1]} against {names[0]}: green is better, red worse, grey unclear"
    if left_out > 0:
        title += f"\nthe {_MAX_BARS} largest differences of {left_out + _MAX_BARS} domains"
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=150)
