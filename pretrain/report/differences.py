"""Intervals of how far runs differ from one of them on held-out text. side_by_side -> differences -> page.

The statistics are those of `headrace evaluate --compare`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pretrain.evaluation import compare
from pretrain.evaluation.compare import Difference
from pretrain.evaluation.scores import DocumentScores
from pretrain.report.facts import Cell, Table
from pretrain.report.side_by_side import names_of
from pretrain.run.eval_figure import UNIT_OF
from pretrain.run.history import History
from shards import ConfigError, HeadraceError


@dataclass(frozen=True)
class Compared:
    """A run compared with the reference, or why it cannot be."""

    name: str
    step: int
    differences: tuple[Difference, ...]
    problem: str = ""


def compared_with_first(histories: Sequence[History]) -> list[Compared]:
    """Compare the last evaluation of every run with that of the first, document by document."""
    names, found = names_of(histories), []
    for name, history in zip(names[1:], histories[1:], strict=True):
        try:
            pair = [_last_scores(histories[0]), _last_scores(history)]
            differences = compare.compare(pair[0].scores, pair[1].scores)
        except HeadraceError as error:
            found.append(Compared(name, 0, (), str(error)))
            continue
        doubts = []
        if pair[0].step != pair[1].step:
            doubts.append(f"{names[0]} is of step {pair[0].step}, {name} of step {pair[1].step}")
        labels = [one.scores.suite for one in pair]
        if labels[0] != labels[1]:
            doubts.append(
                f"{names[0]} was scored as {labels[0]}, {name} as {labels[1]}: differences in seq_len, precision or"
                " text affect the comparison"
            )
        common = differences[-1].documents
        doubts += [
            f"{len(one.scores.key) - common} documents of {which} are not in both and are not counted"
            for which, one in zip((names[0], name), pair, strict=True)
            if len(one.scores.key) > common
        ]
        found.append(Compared(name, pair[1].step, tuple(differences), "; ".join(doubts)))
    return found


class _Scored(NamedTuple):
    step: int
    scores: DocumentScores


def _last_scores(history: History) -> _Scored:
    """Read the sums of each document of the evaluation that the page shows. Raises HeadraceError if there are none."""
    suite = history.suite()
    if suite is None:
        raise ConfigError("it has no evaluation")
    step = max(max(of_steps) for of_steps in history.evals[suite].values())
    return _Scored(step, DocumentScores.load(history.folder.document_scores(step, suite)))


def difference_tables(histories: Sequence[History]) -> list[Table]:
    """Show how the runs differ from the first on held-out text, with intervals: averages, then domain by domain."""
    first, found = names_of(histories)[0], compared_with_first(histories)
    rows: list[tuple[Cell, ...]] = []
    for one in found:
        if one.differences:
            macro, micro = one.differences[-2:]
            better = sum(item.is_clear and item.difference < 0 for item in one.differences[:-2])
            worse = sum(item.is_clear and item.difference > 0 for item in one.differences[:-2])
            verdict = f"{better} better, {worse} worse, {len(one.differences) - 2 - better - worse} unclear"
            rows.append((one.name, one.step, macro.b, macro, micro, verdict, macro.documents))
    problems = [f"{one.name}: {one.problem}" for one in found if one.problem]
    units = dict.fromkeys(one.differences[0].unit for one in found if one.differences)
    unit = " or ".join(units) or UNIT_OF["bits_per_byte"]
    note = (
        f"{unit.capitalize()} of each run minus those of {first}; below zero is better. An interval holds 95 % of the"
        " differences when documents are drawn again, so it tells what is chance of the documents, not of the seed;"
        " where many runs were tried, the best of them looks better than it is. "
    )
    head = ("run", "step", f"{unit}, macro", "macro", "micro", "domains", "documents")
    tables = [Table(f"Differences from {first}", head, tuple(rows), note=note + ". ".join(problems))] if found else []
    for one in found if len(found) == 1 else ():
        of_domains = tuple((item.name, item.a, item.b, item, item.documents) for item in one.differences)
        last = len(of_domains)
        heads = ("domain", first, one.name, "difference", "documents")
        tables.append(Table("Domain by domain", heads, of_domains, strong=frozenset({last - 2, last - 1})))
    return tables
