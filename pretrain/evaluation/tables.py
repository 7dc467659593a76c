"""Evaluations as tables for the terminal. evals.jsonl, compare, harness -> tables -> launch/{pretrain,evaluate}.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Column, Table

from pretrain.evaluation.compare import Difference
from pretrain.run.eval_figure import AVERAGES, contexts_of, depths_of


def domain_table(before: Sequence[Mapping[str, object]], after: Sequence[Mapping[str, object]]) -> Table:
    """Show the perplexity and bits per byte of each domain at two steps.

    Args:
        before, after: lines of evals.jsonl; rows are in the order of `after`.
    """
    table = Table("domain", title="Held-out text, before and after")
    for head in ("perplexity before", "after", "bits per byte before", "after"):
        table.add_column(head, justify="right")
    old = {str(record["domain"]): record for record in before}
    for record in after:
        domain = str(record["domain"])
        figures = [
            _figure(figures, key)
            for key in ("perplexity", "bits_per_byte")
            for figures in (old.get(domain, {}), record)
        ]
        table.add_row(domain, *figures, style="bold" if domain in AVERAGES else None)
    return table


def step_table(records: Sequence[Mapping[str, object]]) -> Table:
    """Show all figures of each domain. `records` are the lines of evals.jsonl of one step and suite, at least one."""
    table = Table(Column("domain", overflow="fold"), title=f"{records[0]['suite']}, step {records[0]['step']}")
    for head in ("perplexity", "bits per byte", "accuracy", "tokens"):
        table.add_column(head, justify="right")
    for record in records:
        figures = f"{record['perplexity']:,.2f}", _digits(record["bits_per_byte"]), f"{record['accuracy']:.3f}"
        style = "bold" if record["domain"] in AVERAGES else None
        table.add_row(str(record["domain"]), *figures, f"{record['tokens']:,}", style=style)
    return table


def difference_table(suite: str, names: tuple[str, str], differences: Sequence[Difference]) -> Table:
    """Show two models side by side, with clear differences in colour: green if the second is better."""
    table = Table(
        Column("domain", overflow="fold"),
        title=f"{suite}: {differences[0].unit}, and 95 % intervals of the difference over documents",
    )
    for head in (*names, "difference", "from", "to", "documents"):
        table.add_column(head, justify="right")
    for item in differences:
        spread = ("-", "-") if item.low is None else (f"{item.low:+.4f}", f"{item.high:+.4f}")
        figures = (f"{item.a:.4f}", f"{item.b:.4f}", f"{item.difference:+.4f}", *spread, f"{item.documents:,}")
        style = None if not item.is_clear else "green" if item.difference < 0 else "red"
        table.add_row(item.name, *figures, style=style)
    return table


def task_table(records: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]] = ()) -> Table:
    """Show the figures of tasks at a step, and how they have changed.

    Args:
        records: lines of evals.jsonl of tasks, of one step.
        before: those of an earlier step.
    """
    table = Table(Column("task", overflow="fold"), title=f"Tasks, step {records[0]['step']}")
    also = ["before"] if before else []
    for head in ("accuracy", *also, "by", "bits/byte", *also, "questions"):
        table.add_column(head, justify="left" if head == "by" else "right", no_wrap=True)
    old = {record["suite"]: record for record in before}
    for record in records:
        shown = [record, *([old.get(record["suite"], {})] if before else [])]
        accuracies, bits = ([_digits(one.get(key)) for one in shown] for key in ("accuracy", "bits_per_byte"))
        table.add_row(record["domain"], *accuracies, record["metric"], *bits, f"{record['instances']:,}")
    return table


def needle_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Show how often needles were found. `records` are their lines of evals.jsonl of one step, one for each length."""
    depths = list(dict.fromkeys(depth for record in records for depth in depths_of(record)))
    table = Table("tokens", title=f"Needles found by depth, step {records[0]['step']}")
    for head in (*depths, "all", "nats/token"):
        table.add_column(head, justify="right")
    for record in records:
        found = [depths_of(record).get(depth, {}).get("accuracy") for depth in depths]
        shown = map(_digits, (*found, record["accuracy"], record["nll_per_token"]))
        table.add_row(f"{record['length']:,}", *shown)
    return table


def context_table(records: Sequence[Mapping[str, Any]]) -> Table | None:
    """Show the averages' figures by the tokens of context; None if there are none.

    Args:
        records: lines of evals.jsonl of one step and suite.
    """
    by_domain = {record["domain"]: contexts_of(record) for record in records if record["domain"] in AVERAGES}
    contexts = by_domain.get("micro", {})
    if len(contexts) < 2:
        return None
    table = Table("tokens of context", title=f"{records[0]['suite']}, step {records[0]['step']}")
    for head in ("nats/token, macro", "micro", "perplexity, macro", "micro", "targets"):
        table.add_column(head, justify="right")
    for name, figures in contexts.items():
        both = by_domain["macro"][name], figures
        losses = [_digits(one["nll_per_token"]) for one in both]
        table.add_row(name, *losses, *(_figure(one, "perplexity") for one in both), f"{figures['tokens']:,}")
    return table


def _digits(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "-"


def harness_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """Show the harness's results by task and figure."""
    table = Table("task", "figure", "value")
    for task, figures in results.items():
        for name, value in figures.items():
            if isinstance(value, float):
                table.add_row(task, name, f"{value:.4f}")
    return table


def _figure(record: Mapping[str, object], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, int | float):
        return "-"
    return f"{value:.3f}" if key == "bits_per_byte" else f"{value:,.1f}"
