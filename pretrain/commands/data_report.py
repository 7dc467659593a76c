"""Show what a run's data is like: tables for a terminal, and a picture. description -> data_report -> index."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from pretrain.report import png
from pretrain.report.chart import Chart, Series
from shards.arrays import Ints
from shards.description import Description, SourceDescription

_BAR = 20  # characters of the longest bar


def print_report(console: Console, description: Description, seq_len: int) -> None:
    """Print tables of the sources, the documents' lengths and the packings."""
    console.print(_sources(description.sources))
    console.print(_quantiles(description.sources, seq_len))
    console.print(_lengths(np.concatenate([source.lengths for source in description.sources])))
    console.print(_packings(description))
    if chosen := [source.name for source in description.sources if "hash_range" in source.selection]:
        console.print(f"MB of text of {', '.join(chosen)} are those that hash_range chooses from.", soft_wrap=True)
    for source in description.sources:
        if len(source.left_out):
            console.print(_said_of_left_out(source), soft_wrap=True)
    sampled = [source for source in description.sources if source.is_sample]
    if sampled:
        read, of_all = (sum(getattr(each, key) for each in sampled) for key in ("read_bytes", "raw_bytes"))
        names = ", ".join(each.name for each in sampled)
        console.print(
            f"Of {names}, a sample was read: {read / 1e6:,.1f} of {of_all / 1e6:,.1f} MB, spread evenly; their tokens,"
            " and the documents of a part, are estimated from it (~). Decontamination is not applied.",
            soft_wrap=True,
        )


def _said_of_left_out(source: SourceDescription) -> str:
    """Say what a source's length bounds leave out of the documents that were looked at."""
    bounds = " and ".join(key for key in ("min_tokens", "max_tokens") if key in source.selection)
    counts = [(len(each), int(each.sum())) for each in (source.left_out, source.lengths)]
    (documents, tokens), (kept, kept_tokens) = counts
    return (
        f"{bounds} of {source.name}: of the documents that were read {documents / (documents + kept):.1%} are left out,"
        f" with {tokens / max(1, tokens + kept_tokens):.1%} of the tokens; MB of text are those that are chosen from."
    )


def _sources(sources: Sequence[SourceDescription]) -> Table:
    table = _table("Sources", "source", "weight", "shards", "documents", "MB of text", "tokens", "bad records")
    weights = sum(source.weight for source in sources)
    for source in sources:
        about = "~" if source.is_sample else ""
        documents = f"{about * bool(source.selection)}{source.num_documents:,}"
        table.add_row(
            source.name, f"{source.weight / weights:.1%}", f"{source.num_shards:,}", documents,
            f"{source.raw_bytes / 1e6:,.1f}", f"{about}{source.tokens:,}", f"{source.num_skipped:,}",
        )  # fmt: skip
    return table


def _quantiles(sources: Sequence[SourceDescription], seq_len: int) -> Table:
    table = _table("Tokens of a document", "source", "median", "90 %", "longest", f"longer than {seq_len + 1}")
    for source in sources:
        lengths = source.lengths if len(source.lengths) else np.zeros(1, np.int64)
        middle, high = np.quantile(lengths, (0.5, 0.9), method="lower").tolist()
        longer = float((lengths > seq_len + 1).mean())
        table.add_row(source.name, f"{middle:,}", f"{high:,}", f"{int(lengths.max()):,}", f"{longer:.1%}")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    return table


def histogram(lengths: Ints) -> tuple[Ints, Ints, Ints]:
    """Count documents, and their tokens, by lengths between powers of two.

    Args:
        lengths: int64 [documents], tokens of each.
    Returns: the bounds, 2^i in [bins + 1], and of each bin, from its lower bound to below the upper one, its documents
        and its tokens, int64 [bins].
    """
    bins = np.floor(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    first, last = (int(bins.min()), int(bins.max())) if len(bins) else (0, 0)
    documents = np.bincount(bins - first, minlength=last - first + 1)
    tokens = np.bincount(bins - first, lengths, last - first + 1).astype(np.int64)
    return 2 ** np.arange(first, last + 2), documents, tokens


def _lengths(lengths: Ints) -> Table:
    table = _table("Documents by their tokens", "from", "to", "documents", "tokens", "of all")
    table.add_column("", no_wrap=True)
    bounds, documents, tokens = histogram(lengths)
    shares = tokens / max(1, int(tokens.sum()))
    for i, share in enumerate(shares.tolist()):
        bar = "█" * round(_BAR * share / max(1e-9, float(shares.max())))
        ends = (f"{bounds[i]:,}", f"{bounds[i + 1] - 1:,}")
        table.add_row(*ends, f"{documents[i]:,}", f"{tokens[i]:,}", f"{share:.1%}", bar)
    return table


def _packings(description: Description) -> Table:
    title = "What each packing does to these documents"
    table = _table(title, "packing", "rows", "padding", "cut though fitting", "dropped tokens")
    for each in description.packings:
        table.add_row(each.name, f"{each.rows:,}", f"{each.padding:.2%}", f"{each.cut:.2%}", f"{each.dropped:.2%}")
    return table


def draw(description: Description, seq_len: int, path: Path) -> None:
    """Draw the share of each source's tokens by the length of their documents, as a PNG; it needs matplotlib."""
    series = []
    for number, source in enumerate(description.sources):
        bounds, _, tokens = histogram(source.lengths)
        middles = np.sqrt(bounds[:-1] * bounds[1:].astype(np.float64))
        shares = 100 * tokens / max(1, int(tokens.sum()))
        series.append(Series(source.name, middles, shares, color=number, style="dots"))
    limit = np.full(2, float(seq_len + 1))
    series.append(Series("a row", limit, np.array([0.0, max(float(each.y.max()) for each in series)]), color=7))
    chart = Chart(
        name=path.stem,
        title="Tokens by the length of their documents",
        x_label="tokens of a document",
        y_label="share of the source's tokens, %",
        series=tuple(series),
        note="Lengths are counted between powers of two.",
        log_x=True,
        from_zero=True,
    )
    png.draw(chart, path)
