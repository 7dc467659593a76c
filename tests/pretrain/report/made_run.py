"""Run folders as a training leaves them, made up in milliseconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml

from pretrain.evaluation.needles import NeedleScores
from pretrain.evaluation.scores import DocumentScores, record_scores
from pretrain.evaluation.task_scores import GREEDY, TaskItems, TaskScores
from pretrain.run.history import History
from pretrain.run.run_folder import RunFolder

SUITE = "suite.seq64.fp32@12345678"


def make_run(
    root: Path,
    learning_rate: float = 1e-3,
    seed: int = 0,
    steps: int = 40,
    evals: tuple[int, ...] = (0, 20, 40),
    length: int | None = None,
) -> RunFolder:
    """Write a run's config, records and scores; the loss falls faster with a higher learning rate.

    Args:
        length: train.steps, if it is more than the steps that were made.
    """
    root.mkdir(parents=True)
    folder = RunFolder(root)
    config = {
        "run": {"name": root.name, "dir": str(root.parent), "seed": seed},
        "model": {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 64, "vocab_size": 4096},
        "data": {
            "seq_len": 64,
            "tokenizer": "shards/sample/tokenizer-4k.model",
            "sources": [
                {"name": "pile", "paths": ["pile/*"], "weight": 1.0},
                {"name": "dolma", "paths": ["dolma/*"], "weight": 3.0},
            ],
        },
        "train": {"steps": length or steps, "global_batch_size": 8},
        "optim": {"learning_rate": learning_rate},
        "precision": "fp32",
    }
    folder.config.write_text(yaml.safe_dump(config))
    generator = np.random.default_rng(seed)
    for step in range(1, steps + 1):
        folder.metrics.append(
            {
                "step": step, "loss": 8 - 100 * learning_rate * step + generator.normal(0, 0.1), "grad_norm": 1 / step,
                "learning_rate": learning_rate, "tokens": 512 * step, "tokens_per_second": 1000.0 + step,
                "batch_hash": f"{step:016x}", "step_seconds": 0.5, "data_wait_seconds": 0.1,
                "forward_backward_seconds": 0.3, "optimizer_seconds": 0.05, "peak_memory_bytes": 1 << 30,
                "tokens_per_source": {"pile": 112, "dolma": 400}, "epoch_per_source": {"pile": 0.1, "dolma": 0.2},
                "skipped_records": 3,
            }
        )  # fmt: skip
    for step in evals:
        record_scores(folder, step, scores_at(step, learning_rate, seed))
    start = {
        "time": "2026-01-01T00:00:00+00:00", "program": "0.1.0", "commit": "abc", "config_hash": "0123456789abcdef",
        "tp_size": 1, "dp_size": 2, "zero_stage": 1, "hosts": ["node1"],
        "environment": {"devices": ["a CPU"], "threads": 1, "packages": {"torch": "2"}, "attention": "sdpa"},
    }  # fmt: skip
    folder.starts.append({"step": 0, **start})
    folder.starts.append({"step": 25, **start})
    return folder


def add_tasks(folder: RunFolder, steps: tuple[int, ...] = (0, 20, 40), label: str = "seq64.fp32@12345678") -> None:
    """Write the scores of two tasks, which get better with the steps."""
    choices = TaskItems(np.full(4, 2), np.zeros(4, np.int64), np.full(8, 2), np.full(8, 6), np.full(8, 6))
    single = TaskItems(np.full(4, 1), np.zeros(4, np.int64), np.full(4, 2), np.full(4, 6), np.full(4, 6))
    for step in steps:
        nll = np.full(8, 7.0)
        nll[::2] = np.array([11.5, 10.5, 8.5, 6.5]) - step / 10
        record_scores(
            folder,
            step,
            TaskScores(f"choice.{label}", "choice", "acc_raw", choices, nll, np.zeros(8), 3),
            TaskScores(f"words.{label}", "words", GREEDY, single, nll[::2], np.array([2, 0, 0, 1]), 0),
        )


def add_needles(folder: RunFolder, step: int) -> None:
    """Write the scores of needles: of 64 tokens half are found at the beginning and all at the end, of 1,024 none."""
    ones = np.ones(4, np.int64)
    items = TaskItems(ones, 0 * ones, 5 * ones, 6 * ones, 6 * ones)
    for length, found in ((64, [1, 0, 1, 1]), (1024, [0, 1, 0, 0])):
        label = f"needles_{length}"
        correct = 4 + np.array(found, np.float64)
        scores = NeedleScores(f"{label}@1", label, GREEDY, items, np.ones(4), correct, 0, length, (0.0, 1.0))
        record_scores(folder, step, scores)


def scores_at(step: int, learning_rate: float, seed: int) -> DocumentScores:
    """Return scores of 30 documents of three domains, which fall with the steps."""
    generator = np.random.default_rng(1000 * seed + step)
    domain = np.repeat(np.arange(3, dtype=np.int32), 10)
    nll = 300 - 500 * learning_rate * step + 10 * domain + generator.normal(0, 2, 30)
    return DocumentScores(
        suite=SUITE,
        domains=("books", "code", "wiki"),
        sources=("books", "code", "wiki"),
        domain=domain,
        key=np.arange(30).astype(np.uint64),
        nll=nll,
        tokens=np.full(30, 40),
        correct=np.full(30, 4),
        text_bytes=np.full(30, 160),
    )


def read_run(folder: RunFolder) -> History:
    """Read a run's records."""
    history = History(folder.root)
    history.refresh()
    return history
