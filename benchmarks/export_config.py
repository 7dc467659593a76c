"""Export the model of a config with drawn weights, and compare what `transformers` makes of it with ours.

    python benchmarks/export_config.py configs/llama-1b-dolma.yaml FOLDER --tokenizer T.model

The model is never held whole while it is exported, in bf16. Afterwards it is loaded in fp32, first by `transformers`,
then by us: 1.1B parameters take 7 GB.
"""

from __future__ import annotations

import argparse
import gc
import resource
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from pretrain.exchange.export import export
from pretrain.exchange.folder import open_model
from pretrain.inference.forward_model import ForwardModel
from pretrain.model.loss import next_token_targets
from pretrain.model.transformer import LlamaConfig
from pretrain.model.weights import weight_specs
from pretrain.parallel_config import ParallelConfig
from pretrain.rng import derive_seed
from pretrain.topology import started
from shards import DataConfig

TEXT = "A headrace is the channel that carries water to the mill wheel, and Headrace carries text to a model."


class Drawn:
    """Weights that are drawn when they are read: matrices around 0, norms around 1."""

    def __init__(self, config: LlamaConfig) -> None:
        self._specs = weight_specs(config)

    def read(self, name: str, index: int = 0, count: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(0, "drawn", name))
        shape = self._specs[name].shape
        drawn = torch.randn(shape, generator=generator)
        return 1 + 0.1 * drawn if len(shape) == 1 else 0.02 * drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("folder", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--tokenizer", type=Path, required=True, help="with as many tokens as the config's vocab_size")
    arguments = parser.parse_args()
    sections = yaml.safe_load(arguments.config.read_text())
    config = LlamaConfig.parse(sections["model"], at="model")
    data = DataConfig.parse(
        {
            "seq_len": sections["data"]["seq_len"],
            "tokenizer": str(arguments.tokenizer),
            "sources": [{"name": "none", "paths": ["none"]}],
        }
    )
    export(Drawn(config), config, data, arguments.folder, dtype=torch.bfloat16)
    size = sum(file.stat().st_size for file in arguments.folder.iterdir())
    print(f"exported {size / 1e9:.2f} GB; memory at most {peak_gb():.2f} GB", flush=True)
    tokens = torch.tensor([AutoTokenizer.from_pretrained(arguments.folder)(TEXT).input_ids])
    theirs, found = AutoModelForCausalLM.from_pretrained(
        arguments.folder, dtype=torch.float32, output_loading_info=True
    )
    count = sum(parameter.numel() for parameter in theirs.parameters())
    print(f"{type(theirs).__name__}: {count:,} parameters, missing or unknown keys: {sum(map(len, found.values()))}")
    with torch.no_grad():
        logits = theirs(tokens[:, :-1]).logits[0].double()
    expected = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
    del theirs
    gc.collect()
    with started(ParallelConfig()) as here:
        weights = open_model(arguments.folder)
        ours = ForwardModel(weights.description.config, ParallelConfig(), "fp32", here)
        ours.set_weights(weights)
        pieces = torch.ones_like(tokens)
        nll = ours.score(tokens[:, :-1], pieces[:, :-1], next_token_targets(tokens, pieces)).nll.double()
    difference = float((nll - expected).abs().max())
    print(f"largest difference of a token's loss: {difference:.1e} of {float(expected.mean()):.2f} nats")
    print(f"memory at most {peak_gb():.2f} GB")


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
