"""Score a suite on every rank with several batch sizes and ZeRO stages; rank 0 writes the sums per document.

Usage: python -m tests.distributed.evaluation TP_SIZE SUITE FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pretrain.deepspeed_keys import deepspeed_config
from pretrain.engine import Engine
from pretrain.evaluation.eval_set import EvaluationConfig, load_suite
from pretrain.evaluation.scoring import evaluate
from pretrain.model.transformer import ModelConfig
from pretrain.optim import OptimConfig
from pretrain.topology import ParallelConfig, Topology, started
from shards import Tokenizer
from tests.distributed.ranks import ROOT
from tests.reference_model import Shape

TOKENIZER = ROOT / "shards/sample/tokenizer-4k.model"
SEQ_LEN = 32
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


def engine_of(topology: Topology, zero_stage: int) -> Engine:
    config = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=4096, init_std=0.15)
    parallel = ParallelConfig.model_validate({"tp_size": topology.tp_size, "zero_stage": zero_stage})
    derived = deepspeed_config(parallel, OptimConfig(), "fp32", {})
    return Engine(config, OptimConfig(), parallel, derived, 1, 1, topology, seed=0)


def main() -> None:
    tp_size, suite, folder = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    with started(ParallelConfig(tp_size=tp_size)) as topology:
        own = (topology.dp_rank, topology.dp_size)
        eval_set = load_suite(EvaluationConfig(suite=suite), Tokenizer(TOKENIZER), SEQ_LEN, "fp32", *own)
        assert eval_set is not None
        for zero_stage, batch_size in ((1, 1), (1, 7), (3, 3)):
            scores = evaluate(engine_of(topology, zero_stage).score, eval_set, topology, batch_size)
            if topology.is_main:
                scores.save(folder / f"zero{zero_stage}-rows{batch_size}.npz")


if __name__ == "__main__":
    main()
