"""Export a run's model: `headrace export --run runs/x --to models/x`.

    hf      what `transformers.AutoModelForCausalLM` and `AutoTokenizer` load: safetensors, config.json, tokenizer
    meta    Meta's layout: consolidated.XX.pth for each of --tp ranks, params.json, tokenizer.model
    headrace    our own, for every architecture: safetensors, config.json, tokenizer; the only one of some
    peft    of a run with model.lora, the adapters alone, which `peft.PeftModel` loads onto the model in init_from:
            adapter_model.safetensors, adapter_config.json. The other layouts get weights with the updates added

The checkpoint may have any topology; it is read weight by weight, on the CPU, after its files have been verified. The
run may be training meanwhile. The folder appears once it is complete.

`--describe DIR` prints the `model:` section of a config for a model in any layout, for use with `init_from: DIR`.

Exit codes: 0 done, 2 no such run, step or model, or the layout cannot represent it, 1 anything else.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from pretrain import log
from pretrain.checkpoint.state import check_tokenizer
from pretrain.checkpoint.store import Checkpoint, wanted_step
from pretrain.checkpoint.weights import CheckpointWeights
from pretrain.commands.arguments import at_least
from pretrain.commands.begun_run import open_run
from pretrain.config import RunConfig
from pretrain.exchange.base import Base, open_base, run_weights
from pretrain.exchange.export import DTYPES, export, export_adapters
from pretrain.exchange.folder import describe
from pretrain.model.architecture import Layout
from pretrain.model.weights import Weights, trained_specs
from shards import CheckpointError, ConfigError, Tokenizer

_FORMATS = get_args(Layout)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--describe", type=Path, metavar="DIR", help="print the `model:` section for a model and export nothing"
    )
    parser.add_argument("--run", type=Path, help="the run's folder, e.g. runs/quickstart")
    parser.add_argument("--step", type=wanted_step, help="the checkpoint's step, or best; default: the newest")
    parser.add_argument(
        "--weights", choices=("trained", "ema"), default="trained", help="ema: their moving average (train.ema)"
    )
    add_output_arguments(parser, required=False, formats=(*_FORMATS, "peft"))


def add_output_arguments(parser: argparse.ArgumentParser, required: bool, formats: Sequence[str] = _FORMATS) -> None:
    """Add the arguments that say where a model is written, if that is required, and how, and the overrides."""
    parser.add_argument("--to", type=Path, required=required, metavar="DIR", help="a folder that does not exist yet")
    parser.add_argument("--format", choices=formats, help="default: hf, or headrace for an architecture of our own")
    parser.add_argument("--tp", type=at_least(1), default=1, metavar="K", help="number of files in the meta layout")
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), help="fp32: the optimizer's exact weights; default: the run's precision"
    )
    parser.add_argument(
        "--max-shard-gb", type=float, default=5.0, help="maximum size of a safetensors file, in 10^9 bytes"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides for the run's config.yaml")


def export_run(arguments: argparse.Namespace) -> None:
    """Export a checkpoint of a run. Raises HeadraceError if there is none, or it cannot be exported."""
    folder, config, checkpoints = open_run(arguments.run, arguments.overrides)
    checkpoint = checkpoints.find(arguments.step)
    averaged = arguments.weights == "ema"
    if arguments.format == "peft":
        written = write_adapters(checkpoint, config, arguments)
    else:
        base = open_base(config.init_from, config.model)
        written = write(open_weights(checkpoint, config, base, averaged), config, checkpoint.step, arguments)
    of = "the average of the weights up to " if averaged else ""
    print(f"{arguments.to}: {of}step {checkpoint.step} of {folder.root}, {written}")


def open_weights(checkpoint: Checkpoint, config: RunConfig, base: Base | None, averaged: bool = False) -> Weights:
    """Open a checkpoint's weights, with the updates of adapters added.

    Args:
        base: the model under the adapters, as `open_base` returned it.
        averaged: whether to open their moving average.
    Raises: HeadraceError if a file is damaged, there is no average, or the tokenizer or the base is not the run's.
    """
    check(checkpoint, config)
    return run_weights(checkpoint, config.stage_of(checkpoint.step).model, base, averaged, merged=True)


def check(checkpoint: Checkpoint, config: RunConfig) -> None:
    """Check a checkpoint's files and tokenizer. Raises HeadraceError if one is damaged, or it is not the run's."""
    if broken := checkpoint.broken_files():
        raise CheckpointError("; ".join(broken))
    check_tokenizer(checkpoint, Tokenizer.of(config.data), config.data.tokenizer)


def write_adapters(checkpoint: Checkpoint, config: RunConfig, arguments: argparse.Namespace) -> str:
    """Write the adapters in a checkpoint for peft, without reading their model; return their type and the layout.

    Raises: ConfigError if the run has none; HeadraceError as `open_weights`.
    """
    if config.model.adapters is None:
        raise ConfigError(
            "--format peft: the run trains all weights, and has no adapters; use --format"
            f" {' or '.join(config.model.LAYOUTS)}"
        )
    if (positions := config.stage_of(checkpoint.step).model.positions) != config.model.positions:
        raise ConfigError(
            f"--format peft: a stage has trained the adapters with {positions}, which the model in"
            f" init_from={config.init_from} has not, and adapters cannot say so; use --format hf or headrace"
        )
    check(checkpoint, config)
    weights = CheckpointWeights(checkpoint, trained_specs(config.model), arguments.weights == "ema")
    dtype = DTYPES[arguments.dtype or config.precision]
    export_adapters(weights, config.model, str(config.init_from), arguments.to, dtype)
    return f"{dtype}, peft layout"


def write(weights: Weights, config: RunConfig, step: int, arguments: argparse.Namespace) -> str:
    """Write a model as the arguments of `add_output_arguments` say; return the weights' type and the layout.

    Args:
        step: of the checkpoint that it is of, whose stage says how long its rows are and how positions are computed.
    """
    dtype, stage = DTYPES[arguments.dtype or config.precision], config.stage_of(step)
    layout = export(
        weights,
        stage.model,
        stage.data,
        arguments.to,
        arguments.format,
        dtype,
        arguments.tp,
        int(arguments.max_shard_gb * 1e9),
    )
    return f"{dtype}, {layout} layout"


def run(arguments: argparse.Namespace) -> int:
    """Export a run's model, or describe another model. Raises HeadraceError if it cannot be done."""
    log.set_up(0)
    if arguments.describe:
        print(describe(arguments.describe), end="")
    elif arguments.run and arguments.to:
        export_run(arguments)
    else:
        raise ConfigError("give --run and --to, or --describe")
    return 0
