"""Grow a run's model: `headrace grow --run runs/small --config configs/large.yaml --to models/grown`.

Writes a larger model that computes what the run's does: wider, deeper, with more heads or a wider feed-forward network,
as the `model:` section of the config asks. A run with that config and `init_from: models/grown` then begins with the
smaller model's loss. Both models are run on a few random tokens, and their losses are printed.

The optimizer's state is not taken along: a new weight's moments would be zero, and its first updates several times the
learning rate. So give the new run a warm-up.

Exit codes: 0 done, 2 no such run or step, or the model cannot grow into the other one, 1 anything else.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import torch

from pretrain import log
from pretrain.checkpoint.store import wanted_step
from pretrain.commands.begun_run import open_run
from pretrain.commands.export import open_weights
from pretrain.config import load_config
from pretrain.exchange.base import open_base
from pretrain.exchange.export import export
from pretrain.exchange.growth import GrownWeights, growable
from pretrain.model.loss import next_token_targets, target_scores
from pretrain.model.transformer import LlamaConfig, Transformer
from pretrain.model.weights import Weights, fill
from pretrain.parallel_config import ParallelConfig
from pretrain.topology import started

_ROWS, _LENGTH = 2, 64  # of random tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, required=True, help="the smaller run's folder")
    parser.add_argument("--step", type=wanted_step, help="the checkpoint's step, or best; default: the newest")
    parser.add_argument("--config", type=Path, required=True, help="config of the larger model's run")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides for that config")


def run(arguments: argparse.Namespace) -> int:
    """Grow a model. Raises HeadraceError if it cannot be done."""
    log.set_up(0)
    folder, config, checkpoints = open_run(arguments.run)
    large = load_config(arguments.config, arguments.overrides)
    checkpoint = checkpoints.find(arguments.step)
    before, after = growable(config.stage_of(checkpoint.step).model.merged(), large.model.merged())
    weights = open_weights(checkpoint, config, open_base(config.init_from, config.model))
    grown = GrownWeights(weights, before, after, large.run.seed)
    with started(ParallelConfig()):
        losses = loss_of(before, weights), loss_of(after, grown)
    export(grown, after, config.stage_of(checkpoint.step).data, arguments.to)
    print(f"{arguments.to}: step {checkpoint.step} of {folder.root}, grown; loss on random tokens {losses[0]:.6f} nats")
    print(f"before, {losses[1]:.6f} after. To go on from it: init_from={arguments.to}")
    return 0


@torch.no_grad()
def loss_of(config: LlamaConfig, weights: Weights) -> float:
    """Return a model's mean loss on random tokens, in nats."""
    model = Transformer(config).eval()
    fill(model, weights, 0, 1)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (_ROWS, _LENGTH + 1), generator=generator)
    segments = torch.ones_like(tokens)
    targets = next_token_targets(tokens, segments)
    scores = model(tokens[:, :-1], segments[:, :-1], functools.partial(target_scores, targets=targets))
    return float(scores.nll.mean())
