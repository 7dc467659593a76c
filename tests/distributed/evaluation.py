"""Score a suite and tasks on every rank with several batch sizes and ZeRO stages; rank 0 writes what comes out.

Usage: python -m tests.distributed.evaluation TP_SIZE SP_SIZE SUITE TASKS FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from pretrain.deepspeed_keys import deepspeed_config
from pretrain.engine import Engine
from pretrain.evaluation.eval_set import EvaluationConfig, find_suite, load_suite
from pretrain.evaluation.needles import NeedlesConfig, load_needles
from pretrain.evaluation.scoring import evaluate
from pretrain.evaluation.tasks import TaskConfig, load_tasks
from pretrain.model.transformer import LlamaConfig
from pretrain.optim import OptimConfig
from pretrain.parallel_config import ParallelConfig
from pretrain.topology import Topology, started
from shards import Tokenizer
from tests.distributed.ranks import ROOT
from tests.reference_model import Shape

TOKENIZER = ROOT / "shards/sample/tokenizer-4k.model"
SEQ_LEN = 32
# Of 48 tokens with question and answer, so that rows are twice and four times as long as others
NEEDLES = NeedlesConfig(lengths=(60, 128), depths=3, count=2)
SHAPE = Shape(n_layers=2, n_heads=4, n_kv_heads=2)
TEXTS = {
    "long": ["word " * 150 + "end", "Ein Satz. " * 9, "x y " * 40, "\U0001f600" * 30],  # emoji: one token per byte
    "short": ["a", "", "two words", "漢字とかな \U0001f600", "x" * 31, "q" * 9],
}


def write_suite(folder: Path) -> Path:
    for domain, texts in TEXTS.items():
        folder.joinpath(domain).mkdir(parents=True)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        folder.joinpath(domain, "val.jsonl").write_text(lines)
    return folder


def request(doc: int, idx: int, label: object, context: str, continuation: str) -> dict[str, object]:
    return {"doc_id": doc, "idx": idx, "label": label, "request": {"context": context, "continuation": continuation}}


def write_tasks(folder: Path) -> list[str]:
    """Write a multiple choice with unconditional requests, and a completion; some of their texts are too long."""
    folder.mkdir(parents=True)
    questions = [
        ("Question: two and two?\nAnswer:", [" four", " five or so", " 漢字とかな"], 0),
        ("Long " * 60 + "\nAnswer:", [" yes", " no, not at all"], 1),
        ("Which\nAnswer:", [" word " * 50, " x"], 0),
        ("What is a cat?\nAnswer:", [" an animal", " a town in the north", " a"], 2),
    ]
    lines = [
        request(doc + offset, idx, gold, "Answer:" if offset else context, choice)
        for offset in (0, 1_000_000)
        for doc, (context, choices, gold) in enumerate(questions)
        for idx, choice in enumerate(choices)
    ]
    texts = [("The cat sat", " on the mat"), ("x" * 9, "y\n\n  z"), ("", " begins"), ("It", " " + "goes on " * 40)]
    completions = [request(doc, 0, None, *text) for doc, text in enumerate(texts)]
    files = {"choice.jsonl": lines, "completion.jsonl": completions}
    for name, requests in files.items():
        folder.joinpath(name).write_text("".join(json.dumps(line) + "\n" for line in requests))
    return [str(folder / name) for name in files]


def nearly(line: Mapping[str, object]) -> dict[str, object]:
    """Return what a line of evals.jsonl is to equal up to the order of sums."""
    return {
        key: nearly(value) if isinstance(value, Mapping) else pytest.approx(value, rel=1e-5) if isinstance(value, float)
        else value
        for key, value in line.items()
    }  # fmt: skip


def engine_of(topology: Topology, zero_stage: int) -> Engine:
    config = LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=4096, init_std=0.15)
    layout = {"tp_size": topology.tp_size, "sp_size": topology.sp_size, "zero_stage": zero_stage}
    parallel = ParallelConfig.model_validate(layout)
    derived = deepspeed_config(parallel, OptimConfig(), "fp32", {})
    return Engine(config, OptimConfig(), parallel, derived, 1, 1, topology, seed=0)


def main() -> None:
    tp_size, sp_size = map(int, sys.argv[1:3])
    suite, tasks, folder = map(Path, sys.argv[3:])
    configs = [TaskConfig(requests=str(path)) for path in sorted(tasks.glob("*.jsonl"))]
    with started(ParallelConfig(tp_size=tp_size, sp_size=sp_size)) as topology:
        tokenizer, own = Tokenizer(TOKENIZER), (topology.dp_rank, topology.dp_size)
        config = EvaluationConfig(suite=suite)
        found = find_suite(config)
        assert found is not None
        eval_set = load_suite(found, config, tokenizer, SEQ_LEN, "fp32", *own)
        how = (tokenizer, SEQ_LEN, "fp32", *own)
        loaded = [*load_tasks(configs, 0, *how), *load_needles(NEEDLES, *how)]
        for zero_stage, batch_size in ((1, 1), (1, 7), (3, 3)):
            score = engine_of(topology, zero_stage).score
            scores = evaluate(score, eval_set, topology, batch_size)
            lines = [line for task in loaded for line in evaluate(score, task, topology, batch_size).records(0)]
            if topology.is_main:
                scores.save(folder / f"zero{zero_stage}-rows{batch_size}.npz")
                folder.joinpath(f"zero{zero_stage}-rows{batch_size}.json").write_text(json.dumps(lines))


if __name__ == "__main__":
    main()
