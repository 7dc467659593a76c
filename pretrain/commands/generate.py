"""Continue prompts with a model: `headrace generate --run runs/x --prompt "The "`; without a prompt, read lines.

A long prompt is the text of a file, --prompt-file, newlines and all.

The model is a run's checkpoint of any topology, or with --model a folder with an exported or downloaded one. If
`deepspeed`, `torchrun` or `srun` starts several ranks, they share one model by tensor parallelism.

The text goes to stdout as it is generated, without the prompt. Exit codes: 0 done, 2 bad input, 1 anything else.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pretrain.checkpoint.state import check_tokenizer
from pretrain.checkpoint.store import wanted_step
from pretrain.commands.begun_run import open_run
from pretrain.evaluation.checkpoints import load_checkpoint
from pretrain.exchange.base import open_base
from pretrain.exchange.folder import open_codec, open_exported
from pretrain.inference.forward_model import ForwardModel
from pretrain.inference.generate import Codec, Sampling, codec_of, generate
from pretrain.inference.memory import generation_memory
from pretrain.model.architecture import Cache, ModelConfig, Precision
from pretrain.model.weights import check_splits
from pretrain.parallel_config import ParallelConfig
from pretrain.topology import Topology, started, world_size_of
from shards import ConfigError, Tokenizer

_logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = Sampling()
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--run", type=Path, help="a run's folder, e.g. runs/quickstart")
    model.add_argument("--model", type=Path, help="a folder with an exported or downloaded model")
    parser.add_argument("--step", type=wanted_step, help="step of the run's checkpoint, or best; default: the newest")
    parser.add_argument("--prompt", action="append", default=[], help="may be repeated; without any, lines are read")
    parser.add_argument(
        "--prompt-file", action="append", default=[], type=Path, help="a file whose whole text is a prompt; repeatable"
    )
    parser.add_argument("--max-tokens", type=int, default=defaults.max_tokens)
    parser.add_argument("--temperature", type=float, default=defaults.temperature, help="0: the most likely token")
    parser.add_argument("--top-k", type=int, help="sample from this many of the most likely tokens")
    parser.add_argument(
        "--top-p", type=float, default=defaults.top_p, help="and from the fewest with this total probability"
    )
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--stop", action="append", default=[], help="end before this string; may be repeated")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: the run's; for --model fp32")
    parser.add_argument(
        "--bf16-cache", action="store_true", help="keep keys and values in bf16, which halves their memory in fp32"
    )


@dataclass(frozen=True)
class ChosenModel:
    """A model that has not been loaded yet, and what generating with it requires."""

    config: ModelConfig
    load: Callable[[ForwardModel, Topology], object]  # fills a model with its weights; every rank calls it
    codec: Codec
    context: int  # length of the rows that it was last trained on, in tokens
    precision: Precision


def find_model(arguments: argparse.Namespace) -> ChosenModel:
    """Find the model that the arguments name. Raises HeadraceError if there is none."""
    if arguments.model:
        model = open_exported(arguments.model)
        description, codec = model.description, open_codec(arguments.model)
        return ChosenModel(
            description.config,
            lambda forward, _: forward.set_weights(model),
            dataclasses.replace(codec, size=min(codec.size, description.config.vocab_size)),
            description.context,
            arguments.precision or "fp32",
        )
    _, config, checkpoints = open_run(arguments.run)
    tokenizer = Tokenizer.of(config.data)
    checkpoint = checkpoints.find(arguments.step)
    check_tokenizer(checkpoint, tokenizer, config.data.tokenizer)
    codec = codec_of(tokenizer, config.data.bos)

    def load(forward: ForwardModel, topology: Topology) -> None:
        base = open_base(config.init_from, config.model, topology)
        load_checkpoint(forward, checkpoints, arguments.step, topology, lambda step: config.stage_of(step).model, base)

    return ChosenModel(
        config.model,
        load,
        codec,
        config.stage_of(checkpoint.step).data.seq_len,
        arguments.precision or config.precision,
    )


def texts_of(paths: Sequence[Path]) -> list[str]:
    """Read files whose whole text is a prompt. Raises ConfigError if that is no text."""
    texts = []
    for path in paths:
        try:
            texts.append(path.read_bytes().decode())  # with its newlines as they are
        except OSError as error:
            raise ConfigError(f"--prompt-file={path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"--prompt-file={path} is not UTF-8 at byte {error.start:,}; a prompt is text") from None
    return texts


def prompts(given: Sequence[str], topology: Topology) -> Iterator[str]:
    """Yield the prompts given, or if there are none the lines that rank 0 reads until its input ends."""
    if given:
        yield from given
        return
    while True:
        line = None
        if topology.is_main:
            try:
                line = input("> " if sys.stdin.isatty() else "")
            except EOFError:
                line = None
        line = topology.broadcast_object(line)
        if line is None:
            return
        yield line


def print_continuations(arguments: argparse.Namespace) -> None:
    """Print the continuations of all prompts. Raises HeadraceError if the model or the arguments are wrong."""
    names = ("max_tokens", "temperature", "top_k", "top_p", "seed", "stop")
    sampling = Sampling.parse({name: getattr(arguments, name) for name in names}, at="--")
    tp_size = world_size_of(os.environ)
    chosen = find_model(arguments)
    config = chosen.config
    check_splits(config, tp_size, "the number of ranks")
    cache_type = torch.bfloat16 if arguments.bf16_cache else None
    if cache_type and not config.cached_numbers:
        _logger.warning("--bf16-cache changes nothing: this model keeps nothing of single tokens")
    with started(ParallelConfig(tp_size=tp_size)) as topology:
        texts = topology.together(lambda: texts_of(arguments.prompt_file) if topology.is_main else [])
        given = [*arguments.prompt, *topology.broadcast_object(texts)]
        memory = generation_memory(config, chosen.precision, arguments.bf16_cache, topology)
        topology.together(lambda: memory.check(length=0))
        model = ForwardModel(config, ParallelConfig(tp_size=tp_size), chosen.precision, topology)
        chosen.load(model, topology)

        def new_cache(length: int) -> Cache:
            topology.together(lambda: memory.check(length))
            return config.new_cache(length, cache_type)

        for prompt in prompts(given, topology):
            for part in generate(
                model.next_logits, new_cache, chosen.context, chosen.codec, prompt, sampling, topology
            ):
                if topology.is_main:
                    print(part, end="", flush=True)
            if topology.is_main:
                print(flush=True)


def run(arguments: argparse.Namespace) -> int:
    """Print continuations until there are no more prompts or Ctrl-C is pressed."""
    with contextlib.suppress(KeyboardInterrupt):
        print_continuations(arguments)
    return 0
