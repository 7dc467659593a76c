"""Small models on the bundled text, of any width and depth, for experiments with the parametrization."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pretrain.deepspeed_keys import deepspeed_config
from pretrain.engine import Engine
from pretrain.model.transformer import LlamaConfig
from pretrain.optim import OptimConfig
from pretrain.parallel_config import ParallelConfig
from pretrain.topology import Topology
from shards import DataConfig, Loader

BASE_DIM, BASE_LAYERS, HEAD = 64, 2, 16
SAMPLE = Path(__file__).resolve().parents[1] / "shards" / "sample"
TOKENIZER = SAMPLE / "tokenizer-4k.model"
PARAMETRIZATIONS = ("standard", "mup")


def model_config(dim: int, n_layers: int, parametrization: str) -> LlamaConfig:
    """Return a model with heads of 16; mup's base is 64 wide and 2 layers deep."""
    values = {"dim": dim, "n_layers": n_layers, "n_heads": dim // HEAD, "ffn_dim": 8 * dim // 3, "vocab_size": 4096}
    if parametrization == "mup":
        values |= {"parametrization": "mup", "base": {"dim": BASE_DIM, "n_layers": BASE_LAYERS}}
    return LlamaConfig.model_validate(values)


def make_engine(config: LlamaConfig, optim: OptimConfig, rows: int, topology: Topology, seed: int) -> Engine:
    """Return an engine in fp32 for steps of one forward pass."""
    parallel = ParallelConfig()
    ds_config = deepspeed_config(parallel, optim, "fp32", {"zero_optimization": {"reduce_bucket_size": 10_000_000}})
    return Engine(config, optim, parallel, ds_config, rows, 1, topology, seed)


def batches(
    rows: int, seq_len: int, seed: int, index: Path, tokenizer: Path = TOKENIZER
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield the tokens, segment ids and number of targets of batches of the bundled training text, without end."""
    config = DataConfig.parse(
        {
            "tokenizer": str(tokenizer), "seq_len": seq_len, "lanes": 8, "num_workers": 0,
            "window_bytes": 131072, "index_dir": str(index),
            "sources": [{"name": "pile", "paths": [str(SAMPLE / "train" / "pile-*")]}],
        }
    )  # fmt: skip
    with Loader(config, rows, seed) as loader:
        for batch in loader:
            yield torch.from_numpy(batch.tokens).long(), torch.from_numpy(batch.segment_ids).long(), batch.n_targets


class Kept:
    """Losses of models that were trained, in a file of JSON lines, so that a command that was killed can go on.

    Args:
        path: the file; None: nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path and path.exists() else []
        self._losses = {json.dumps(what): loss for what, loss in map(json.loads, lines)}

    def get(self, what: Sequence[object], train: Callable[[], float]) -> float:
        """Return the loss of what is named, which is trained unless it was before."""
        key = json.dumps(list(what))
        if key not in self._losses:
            self._losses[key] = train()
            if self._path:
                with self._path.open("a") as file:
                    file.write(json.dumps([what, self._losses[key]]) + "\n")
        return self._losses[key]
