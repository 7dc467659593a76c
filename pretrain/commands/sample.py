"""Write the sample into a folder: `headrace sample .`, then `headrace train --config configs/quickstart.yaml` there.

DIR/configs gets the configs that come with Headrace, DIR/shards/sample the text, the tokenizer and the suite of the
quickstart. A clone has both in its root.

Exit codes: 0 written, 2 the folder already has files of these names, 1 anything else.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from shards import ConfigError, installation

_PRETRAIN = Path(__file__).parents[1]
_SHARDS = Path(installation.__file__).parent
_MADE_BY_RUNS = ("*.index.json", "*.windows", "*.manifest")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="created if it does not exist")


def run(arguments: argparse.Namespace) -> int:
    """Copy the sample. Raises ConfigError if anything of the same name exists already."""
    parts = {
        arguments.folder / "configs": _PRETRAIN / "configs",
        arguments.folder / "shards" / "sample": _SHARDS / "sample",
    }
    for target in parts:
        if target.exists():
            raise ConfigError(f"{target} exists already; name another folder")
    for target, original in parts.items():
        shutil.copytree(original, target, ignore=shutil.ignore_patterns(*_MADE_BY_RUNS))
    command = installation.typed("train", "--config", "configs/quickstart.yaml")
    print(f"{' and '.join(map(str, parts))} written; in {arguments.folder}, `{command}` trains on them")
    return 0
