"""Start on every rank from a model's folder at each ZeRO stage, and leave what DeepSpeed saves of it.

Usage: python -m tests.distributed.exchange TP_SIZE MODEL FOLDER CASE...; a case is zero1-bf16 and the like. FOLDER/text
receives a continuation by the last engine, which must be fp32 so that its text does not depend on tp_size.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from pretrain.deepspeed_keys import deepspeed_config
from pretrain.engine import Engine
from pretrain.exchange.folder import open_codec, open_model
from pretrain.inference.generate import Sampling, generate
from pretrain.model import prefill
from pretrain.model.kv_cache import KVCache
from pretrain.optim import OptimConfig
from pretrain.parallel_config import ParallelConfig
from pretrain.run.metrics import Meter
from pretrain.topology import Topology, started

PROMPT, SAMPLING = "Once upon", Sampling(max_tokens=12, temperature=0)
OPTIM = OptimConfig()


def engine_with(topology: Topology, model: Path, zero_stage: int, precision: str) -> Engine:
    source = open_model(model)
    parallel = ParallelConfig.model_validate({"tp_size": topology.tp_size, "zero_stage": zero_stage})
    derived = deepspeed_config(parallel, OPTIM, precision, {})
    engine = Engine(source.description.config, OPTIM, parallel, derived, 1, 1, topology, seed=3)
    engine.set_weights(source)
    return engine


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)


def main() -> None:
    tp_size, model, folder = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    with started(ParallelConfig(tp_size=tp_size)) as topology:
        for case in sys.argv[4:]:
            stage, precision = case.removeprefix("zero").split("-")
            engine = engine_with(topology, model, int(stage), precision)
            layers = engine.model.config.n_layers
            engine.save(folder / case, write)
            # A step without a learning rate leaves the masters unchanged, and remakes the weights from them.
            tokens = torch.arange(9)[None].expand(1, -1)
            before = engine.next_logits(tokens, KVCache(layers, 9))
            engine.train_step(tokens, torch.ones_like(tokens), 8 * topology.dp_size, 0, 0.0, Meter())
            assert torch.equal(engine.next_logits(tokens, KVCache(layers, 9)), before), case
        prefill.CHUNK_TOKENS = 2  # the one rank that the text is compared with reads the prompt in one pass
        codec = open_codec(model)
        text = "".join(
            generate(engine.next_logits, engine.model.config.new_cache, 32, codec, PROMPT, SAMPLING, topology)
        )
        if topology.is_main:
            (folder / "text").write_text(text)


if __name__ == "__main__":
    main()
