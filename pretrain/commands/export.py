"""Writes a run's model for other programs: `python launch/export.py --run runs/x --to models/x`.

    hf      what `transformers.AutoModelForCausalLM` and `AutoTokenizer` load: safetensors, config.json, tokenizer
    meta    Meta's layout: consolidated.XX.pth for each of --tp ranks, params.json, tokenizer.model

The checkpoint may be of any topology; it is read weight by weight, on the CPU, after its files are compared with their
hashes. The run may be training meanwhile. The folder appears when it is complete.

`--describe DIR` prints the `model:` section of a config for a model in either layout, to be used with `init_from: DIR`.

Exit codes: 0 done, 2 no such run, step or model, or one that the layout cannot hold, 1 anything else.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts launch/ first, where other modules of the same names could be found
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # where DeepSpeed has to look for a device, it reports on stdout

from pretrain import log
from pretrain.checkpoint.state import check_tokenizer
from pretrain.checkpoint.store import CheckpointStore
from pretrain.checkpoint.weights import CheckpointWeights
from pretrain.config import load_config
from pretrain.exchange.export import DTYPES, export
from pretrain.exchange.folder import describe
from pretrain.model.weights import weight_specs
from pretrain.run.run_folder import RunFolder
from shards import CheckpointError, HeadraceError, Tokenizer


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--describe", type=Path, metavar="DIR", help="print the `model:` section for a model; no export"
    )
    parser.add_argument("--run", type=Path, help="the run's folder, e.g. runs/quickstart")
    parser.add_argument("--step", type=int, help="of its checkpoint; default: the newest")
    parser.add_argument("--to", type=Path, metavar="DIR", help="a folder that is not there yet")
    parser.add_argument("--format", choices=("hf", "meta"), default="hf")
    parser.add_argument("--tp", type=int, default=1, metavar="K", help="files of the meta layout")
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), help="fp32: the optimizer's exact weights; default: the run's precision"
    )
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="of a safetensors file, in 10^9 bytes")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="over the run's own config.yaml")
    arguments = parser.parse_intermixed_args()
    if not arguments.describe and not (arguments.run and arguments.to):
        parser.error("--run and --to are needed, or --describe")
    return arguments


def export_run(arguments: argparse.Namespace) -> None:
    """Raises: HeadraceError if there is no such run or checkpoint, or it cannot be exported."""
    folder = RunFolder(arguments.run)
    folder.check_there()
    config = load_config(folder.config, arguments.overrides, begun=True)
    checkpoint = CheckpointStore(folder.checkpoints, config.checkpoint).choose(arguments.step)
    if broken := checkpoint.broken_files():
        raise CheckpointError("; ".join(broken))
    tokenizer = Tokenizer(config.data.tokenizer, config.data.bos, config.data.eos)
    check_tokenizer(checkpoint, tokenizer, config.data.tokenizer)
    weights = CheckpointWeights(checkpoint, weight_specs(config.model))
    dtype = DTYPES[arguments.dtype or config.precision]
    export(
        weights,
        config.model,
        config.data,
        arguments.to,
        arguments.format,
        dtype,
        arguments.tp,
        int(arguments.max_shard_gb * 1e9),
    )
    print(f"{arguments.to}: step {checkpoint.step} of {folder.root}, {dtype}, {arguments.format} layout")


def main() -> int:
    arguments = parse_arguments()
    log.set_up(0)
    try:
        if arguments.describe:
            print(describe(arguments.describe), end="")
        else:
            export_run(arguments)
    except HeadraceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
