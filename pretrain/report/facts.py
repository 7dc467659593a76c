"""What one run was, in words and tables. history, checkpoints -> facts -> {page, side_by_side}."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pretrain.checkpoint.state import read_data
from pretrain.checkpoint.store import CheckpointConfig, CheckpointStore
from pretrain.evaluation.compare import Difference
from pretrain.model.architectures import parse_model
from pretrain.model.size import parameter_count, trained_count
from pretrain.report.chart import short
from pretrain.report.curves import parts_of
from pretrain.report.figures import duration, final_loss, last_eval, number, usual_speed
from pretrain.run.eval_figure import AVERAGES
from pretrain.run.history import History
from pretrain.stages import recorded_stages
from pretrain.topology import named_layout
from shards import CheckpointError, ConfigError

Cell = str | float | int | None | Difference


@dataclass(frozen=True)
class Table:
    """A table of a page.

    Attributes:
        head: the columns' names.
        rows: texts are written to the left; numbers to the right, and None as a dash; a Difference as its interval.
        bars: numbers of the columns whose values, from 0 to 1, are shown as bars and percentages.
        note: a sentence below.
        strong: numbers of the rows that are averages of others.
    """

    title: str  # empty where the section's says it
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    bars: frozenset[int] = frozenset()
    note: str = ""
    strong: frozenset[int] = frozenset()


def headlines(history: History) -> Iterator[tuple[str, str]]:
    """Yield the figures that one wants to see first: what it is, and its value."""
    loss = final_loss(history)
    if math.isfinite(loss):
        yield "training loss, last 5 %", f"{loss:.4f}"
    if found := last_eval(history):
        yield f"{found.unit}, held out, step {found.step:,}", f"{found.loss:.4f}"
    tokens = number(history.metrics.last.get("tokens"))
    if math.isfinite(tokens):
        yield "tokens", short(tokens)
    speed = usual_speed(history)
    if math.isfinite(speed):
        yield "tokens per second, median", short(speed)
    seconds = float(np.nansum(history.metrics["step_seconds"]))
    if seconds:
        yield "in steps", duration(seconds)


def facts_of(history: History) -> list[tuple[str, str]]:
    """Say what was trained on what: pairs of a name and a text."""
    return [(name, text) for name, text in _facts(history) if text]


def _facts(history: History) -> Iterator[tuple[str, str]]:
    value = history.value
    yield "Model", _model(history)
    sources = value("data.sources")
    if isinstance(sources, list):
        named = [f"{source.get('name')} ({source.get('weight', 1)})" for source in sources if isinstance(source, dict)]
        yield "Sources (weight)", ", ".join(named)
    yield "Tokenizer", str(value("data.tokenizer") or "")
    rows, seq_len = value("train.global_batch_size"), value("data.seq_len")
    if isinstance(rows, int) and isinstance(seq_len, int):
        yield "Batch", f"{rows:,} rows of {seq_len:,} tokens, {rows * seq_len:,} in a step"
    epochs = f"{value('train.epochs')} epochs" if value("train.epochs") else ""
    steps = f"{history.foreseen_length:,} steps" if history.foreseen_length else ""
    yield "Length", ", ".join(filter(None, (epochs, steps)))
    optim = value("optim")
    if isinstance(optim, dict):
        names = ("name", "learning_rate", "schedule", "warmup_steps", "floor", "betas", "weight_decay", "grad_clip")
        yield "Optimizer", ", ".join(f"{key} {optim[key]}" for key in names if optim.get(key) is not None)
    stages = value("stages")
    if isinstance(stages, list) and stages:
        yield "Stages", f"{len(stages) + 1}, from steps 0, " + ", ".join(str(stage.get("step")) for stage in stages)
    yield "Seed", str(value("run.seed") if value("run.seed") is not None else "")
    if history.starts:
        yield from _hardware(history)


def _model(history: History) -> str:
    model = history.value("model")
    if not isinstance(model, dict):
        return ""
    try:
        config = parse_model(model, at="")
    except ConfigError:  # another version of this program wrote it
        return ", ".join(f"{key} {value}" for key, value in model.items())
    lora = config.adapters
    adapters = f"; trained are adapters of rank {lora.r}, {trained_count(config):,} parameters" if lora else ""
    return (
        f"{parameter_count(config):,} parameters: {config.describe()},"
        f" vocabulary of {config.vocab_size:,}; {history.value('precision')}{adapters}"
    )


def _hardware(history: History) -> Iterator[tuple[str, str]]:
    start = history.starts[-1]
    environment = start.get("environment") or {}
    sizes = _layout_sizes(start)
    ranks = math.prod(sizes) if all(isinstance(size, int) for size in sizes) else "?"
    yield "Layout", f"{ranks} ranks: {named_layout(*sizes)}, ZeRO-{start.get('zero_stage')}"
    threads = f", {environment['threads']} threads a rank" if environment.get("threads") else ""
    yield "Devices", ", ".join(environment.get("devices") or []) + threads
    yield "Hosts", ", ".join(start.get("hosts") or [])
    packages = environment.get("packages") or {}
    libraries = ", ".join(f"{name} {version}" for name, version in packages.items())
    yield "Program", f"Headrace {start.get('program')}, commit {start.get('commit') or 'unknown'}; {libraries}"


def evaluation_table(history: History) -> Table | None:
    """Show the first and the last evaluation of each domain; None without one."""
    label = history.suite()
    if label is None:
        return None
    rows: list[tuple[Cell, ...]] = []
    strong = set()
    domains = history.evals[label]
    for domain, of_steps in domains.items():
        first, last = of_steps[min(of_steps)], of_steps[max(of_steps)]
        strong |= {len(rows)} if domain in AVERAGES else set()
        figures = [number(record.get(key)) for key in ("bits_per_byte", "perplexity") for record in (first, last)]
        rows.append((domain, *figures, number(last.get("accuracy")), max(of_steps), _whole(last.get("tokens"))))
    head = ("domain", "bits per byte, first", "last", "perplexity, first", "last", "accuracy", "last step", "tokens")
    firsts = {min(of_steps) for of_steps in domains.values()}
    note = f"{label}; the first evaluation is of step {', '.join(map(str, sorted(firsts)))}."
    others = [other for other in history.evals if other != label]
    if others:
        note += f" Not shown are the evaluations labelled {', '.join(others)}."
    return Table("Held-out text", head, tuple(rows), note=note, strong=frozenset(strong))


def task_table(history: History) -> Table | None:
    """Show the first and the last evaluation of each task; None without one."""
    tasks = history.tasks()
    rows: list[tuple[Cell, ...]] = []
    for name, of_steps in tasks.items():
        first, last = of_steps[min(of_steps)], of_steps[max(of_steps)]
        figures = [number(record.get(key)) for key in ("accuracy", "bits_per_byte") for record in (first, last)]
        rows.append((name, str(last.get("metric")), *figures, max(of_steps), *map(_whole, _sizes(last))))
    head = (
        "task", "compared by", "accuracy, first", "last", "bits per byte, first", "last", "last step", "questions",
        "contexts cut",
    )  # fmt: skip
    note = "Bits per byte are those of the right answer."
    shown = {str(record["suite"]) for of_steps in tasks.values() for record in of_steps.values()}
    if others := sorted(history.task_evals.keys() - shown):
        note += f" Not shown are the evaluations labelled {', '.join(others)}."
    return Table("Tasks", head, tuple(rows), note=note) if rows else None


def _sizes(record: Mapping[str, object]) -> tuple[object, object]:
    return record.get("instances"), record.get("contexts_cut")


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) else None


def time_table(history: History) -> Table | None:
    """Show where the seconds of all recorded steps went; None without a step."""
    if not len(history.metrics):
        return None
    parts = {name: float(seconds.sum()) for name, seconds in parts_of(history).items()}
    total = sum(parts.values()) or 1.0
    rows: list[tuple[Cell, ...]] = [(name, duration(seconds), seconds / total) for name, seconds in parts.items()]
    pauses = float(np.nansum(history.metrics["checkpoint_seconds"]))
    saves = int(np.isfinite(history.metrics["checkpoint_seconds"]).sum())
    note = f"Beside the steps, training paused {duration(pauses)} for {saves} saves." if saves else ""
    note += " Evaluations, starts and what was trained twice are not in it."
    if history.superseded:
        note += f" {history.superseded:,} steps were trained again after a restart or a return to a checkpoint."
    return Table(
        "Where the time went", ("part of a step", "time", "share"), tuple(rows), bars=frozenset({2}), note=note.strip()
    )


def source_table(history: History) -> Table | None:
    """Show the tokens of each source against the wished mix; None without a step."""
    names = history.metrics.names_of("tokens_per_source")
    if not names:
        return None
    tokens = {name: float(np.nansum(history.metrics[f"tokens_per_source/{name}"])) for name in names}
    total = sum(tokens.values()) or 1.0
    try:
        wished, note = _wished_tokens(history), ""
    except ConfigError as error:
        wished, note = {}, f"The wished mix is unknown: {error}"
    rows: list[tuple[Cell, ...]] = []
    for name in names:
        share = tokens[name] / total
        wish = wished[name] / total if name in wished else None
        off = None if wish is None else 100 * (share - wish)
        epochs = history.metrics[f"epoch_per_source/{name}"]
        rows.append((name, int(tokens[name]), share, wish, off, float(epochs[-1])))
    if not note:
        note = (
            "The mix is wished in rows; a source whose rows have more padding gets fewer tokens than its weight says."
        )
    head = ("source", "tokens", "share", "wished share", "off by, points", "epochs")
    return Table("Tokens by source", head, tuple(rows), bars=frozenset({2, 3}), note=note)


def _wished_tokens(history: History) -> dict[str, float]:
    """Deal the tokens of each stretch of steps by the weights that it had. Raises ConfigError for an odd config."""
    stages = recorded_stages(history.config, "config.yaml")
    periods: list[tuple[int, dict[str, float]]] = []  # steps done when the weights come into force
    ends = [*(stage.step for stage in stages[1:]), math.inf]
    for stage, end in zip(stages, ends, strict=True):
        names = [source.name for source in stage.data.sources]
        for step, in_order in stage.data.weightings():
            if step >= end:
                break  # the next stage comes before that
            periods.append((max(stage.step, step), dict(zip(names, in_order, strict=True))))
    wished: dict[str, float] = {}
    steps = history.steps
    sources = history.metrics.names_of("tokens_per_source")
    of_step = sum(np.nan_to_num(history.metrics[f"tokens_per_source/{name}"]) for name in sources)
    for i, (begin, weights) in enumerate(periods):
        end = periods[i + 1][0] if i + 1 < len(periods) else math.inf
        tokens = float(np.asarray(of_step)[(steps > begin) & (steps <= end)].sum())
        total = sum(weights.values()) or 1.0
        for name, weight in weights.items():
            wished[name] = wished.get(name, 0.0) + tokens * weight / total
    return wished


def provenance_of(history: History) -> tuple[list[tuple[str, str]], list[Table]]:
    """Say by what hashes a run's past can be checked: facts, and tables of starts, checkpoints and shards."""
    facts = []
    for key, what in (
        ("batch_hash", "Batches read"),
        ("trained_hash", "Batches trained on"),
        ("weight_hash", "Weights"),
        ("optimizer_hash", "Optimizer's moments"),
    ):
        if found := history.metrics.texts.get(key):
            facts.append((what, f"{found[1]} at step {found[0]:,}"))
    if history.starts:
        facts.append(("Config", str(history.starts[-1].get("config_hash"))))
    try:
        facts += [("Forked from", f"{a.name} at step {a.step:,}, {a.batch_hash}") for a in history.folder.ancestors()]
        facts.append(("wandb run", history.folder.run_id()))
    except (OSError, ValueError):
        pass  # most runs have neither
    skipped = number(history.metrics.last.get("skipped_records"))
    facts.append(("Bad records passed over", f"{int(skipped):,}" if math.isfinite(skipped) else "unknown"))
    tables = [*_start_tables(history), *_checkpoint_tables(history, facts)]
    return facts, tables


def _layout_sizes(start: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Return tp_size, sp_size and dp_size as a start recorded them."""
    return start.get("tp_size"), start.get("sp_size", 1), start.get("dp_size")


def _start_tables(history: History) -> Iterator[Table]:
    rows = tuple(
        (
            int(start["step"]), str(start.get("time")), f"{start.get('program')} {start.get('commit') or ''}".strip(),
            str(start.get("config_hash")), named_layout(*_layout_sizes(start)),
            ", ".join(start.get("hosts") or []),
        )
        for start in history.starts
    )  # fmt: skip
    if rows:
        yield Table("Starts", ("after step", "time", "program", "config", "layout", "hosts"), rows)


def _checkpoint_tables(history: History, facts: list[tuple[str, str]]) -> Iterator[Table]:
    store = CheckpointStore(history.folder.checkpoints, CheckpointConfig())
    rows: list[tuple[Cell, ...]] = []
    newest = None
    problems = []
    for step in store.steps():
        try:
            newest = store.open(step)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        size = sum(file.size for file in newest.files)
        rows.append((step, len(newest.files), f"{size / 1e6:,.1f} MB", newest.seconds))
    if rows or problems:
        head = ("step", "files", "size", "seconds to save")
        yield Table("Checkpoints", head, tuple(rows), note="; ".join(problems))
    if newest is None:
        return
    try:
        fingerprint = read_data(newest).fingerprint
    except CheckpointError as error:
        facts.append(("Data", f"unknown: {error}"))
        return
    facts.append(("Tokenizer", str(fingerprint.get("tokenizer"))))
    shards = list(_shards_of(fingerprint))
    if shards:
        yield Table(f"Shards, as of step {newest.step:,}", ("source", "shard", "content hash"), tuple(shards))


def _shards_of(fingerprint: dict[str, object]) -> Iterator[tuple[Cell, ...]]:
    later = fingerprint.get("stages")  # which list only what each adds to the first
    for stage in [fingerprint, *(later if isinstance(later, list) else [])]:
        shards = stage.get("shards") if isinstance(stage, dict) else None
        for source, listed in shards.items() if isinstance(shards, dict) else ():
            for path, content_hash in listed:
                yield source, str(path), str(content_hash)
