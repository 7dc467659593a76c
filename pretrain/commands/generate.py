"""Continues prompts with a model: `python launch/generate.py --run runs/x --prompt "The "`; without --prompt, it asks.

The model is a run's checkpoint, of whatever topology, or with --model a folder in the layout of Hugging Face or Meta.
Started by `deepspeed`, `torchrun` or `srun`, all ranks share one model tensor-parallel, each with its slices.

The text goes to stdout as it comes, without the prompt. Exit codes: 0 done, 2 bad input, 1 anything else.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    # Python puts launch/ first, where `pretrain` is the script of that name
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # where DeepSpeed has to look for a device, it reports on stdout

from pretrain import log
from pretrain.checkpoint.state import check_tokenizer
from pretrain.checkpoint.store import CheckpointStore
from pretrain.config import load_config
from pretrain.evaluation.checkpoints import take_checkpoint
from pretrain.exchange.folder import open_codec, open_model
from pretrain.inference.forward_model import ForwardModel
from pretrain.inference.generate import Codec, Sampling, codec_of, generate
from pretrain.model.transformer import ModelConfig, Precision
from pretrain.model.weights import check_splits
from pretrain.run.run_folder import RunFolder
from pretrain.topology import ParallelConfig, Topology, slurm_environment, started, world_size_of
from shards import HeadraceError, Tokenizer


def parse_arguments() -> argparse.Namespace:
    defaults = Sampling()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="a run's folder, e.g. runs/quickstart")
    source.add_argument("--model", type=Path, help="a folder with an exported or downloaded model")
    parser.add_argument("--step", type=int, help="of the run's checkpoint; default: the newest")
    parser.add_argument("--prompt", action="append", help="may be repeated; without it, lines are read")
    parser.add_argument("--max-tokens", type=int, default=defaults.max_tokens)
    parser.add_argument("--temperature", type=float, default=defaults.temperature, help="0: the most likely token")
    parser.add_argument("--top-k", type=int, help="sample among so many tokens")
    parser.add_argument("--top-p", type=float, default=defaults.top_p, help="and the fewest that reach this sum")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument(
        "--stop", action="append", default=[], help="end before this string; may be given several times"
    )
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: the run's; for --model fp32")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser.parse_args()


@dataclass(frozen=True)
class Speaker:
    """Where a model comes from, and how it speaks."""

    config: ModelConfig
    fill: Callable[[ForwardModel, Topology], object]  # with its weights; every rank calls it
    codec: Codec
    context: int  # tokens that it was trained with
    precision: Precision


def opened(arguments: argparse.Namespace) -> Speaker:
    """Raises: HeadraceError if there is no such model."""
    if arguments.model:
        model = open_model(arguments.model)
        description = model.description
        return Speaker(
            description.config,
            lambda forward, _: forward.set_weights(model),
            open_codec(arguments.model),
            description.context,
            arguments.precision or "fp32",
        )
    folder = RunFolder(arguments.run)
    folder.check_there()
    config = load_config(folder.config, begun=True)
    store = CheckpointStore(folder.checkpoints, config.checkpoint)
    tokenizer = Tokenizer(config.data.tokenizer, config.data.bos, eos=False)
    check_tokenizer(store.choose(arguments.step), tokenizer, config.data.tokenizer)
    codec = codec_of(tokenizer, config.data.bos)
    return Speaker(
        config.model,
        lambda forward, here: take_checkpoint(forward, store, arguments.step, here),
        codec,
        config.data.seq_len,
        arguments.precision or config.precision,
    )


def prompts(arguments: argparse.Namespace, here: Topology) -> Iterator[str]:
    """The prompts given, or the lines that rank 0 reads until its input ends."""
    if arguments.prompt:
        yield from arguments.prompt
        return
    while True:
        line = None
        if here.is_main:
            try:
                line = input("> " if sys.stdin.isatty() else "")
            except EOFError:
                line = None
        line = here.broadcast_object(line)
        if line is None:
            return
        yield line


def speak(arguments: argparse.Namespace) -> None:
    """Prints the continuations. Raises: HeadraceError if the model or the arguments are not right."""
    names = ("max_tokens", "temperature", "top_k", "top_p", "seed", "stop")
    sampling = Sampling.parse({name: getattr(arguments, name) for name in names}, at="--")
    tp_size = world_size_of(os.environ)
    speaker = opened(arguments)
    check_splits(speaker.config, tp_size, "the number of ranks")
    with started(ParallelConfig(tp_size=tp_size)) as here:
        model = ForwardModel(speaker.config, ParallelConfig(tp_size=tp_size), speaker.precision, here)
        speaker.fill(model, here)
        for prompt in prompts(arguments, here):
            given = (speaker.codec, prompt, sampling, here)
            for part in generate(model.next_logits, speaker.config.n_layers, speaker.context, *given):
                if here.is_main:
                    print(part, end="", flush=True)
            if here.is_main:
                print(flush=True)


def main() -> int:
    arguments = parse_arguments()
    os.environ.update(slurm_environment(os.environ))
    log.set_up(int(os.environ.get("RANK", "0")))
    try:
        speak(arguments)
    except HeadraceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
