"""The tools that make windows from shards, the same in all processes of a run. tokenizer -> recipe -> window.

A worker that starts late, in place of a lost one, may find that files have been replaced since the run began. Its
windows would belong to another run, so it compares before it makes any.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import sentencepiece
import xxhash

from shards.config import DataConfig
from shards.errors import ConfigError, ShardError
from shards.suites.decontaminate import Decontaminator
from shards.tokenize.tokenizer import Tokenizer

_PACKAGE = Path(__file__).parents[1]  # shards/


class Tools(NamedTuple):
    """The tools with which one process makes windows."""

    tokenizer: Tokenizer
    decontaminator: Decontaminator | None

    def recipe(self) -> Recipe:
        """Describe the tools of this process for others."""
        filtered = self.decontaminator
        return Recipe(
            tokenizer=self.tokenizer.content_hash,
            program=program(),
            filter_file=None if filtered is None else str(filtered.path),
            filter_hash=None if filtered is None else filtered.content_hash,
        )


class Recipe(msgspec.Struct, frozen=True):
    """A description of the loading process's tools, with which others compare theirs."""

    tokenizer: str  # content hash
    program: dict[str, str]  # as returned by `program`
    filter_file: str | None = None  # the decontamination's filter, if there is one
    filter_hash: str | None = None  # hash of its content

    def open(self, config: DataConfig) -> Tools:
        """Open the same tools in this process.

        Raises: ConfigError if the files of tokenizer or filter are missing, or differ from the loading process's.
        """
        tokenizer = Tokenizer(config.tokenizer, config.bos, config.eos)
        if tokenizer.content_hash != self.tokenizer:
            raise ConfigError(
                f"data.tokenizer={config.tokenizer}: the file was replaced while the run was going on; put the old one "
                "back, or start again"
            )
        if not (config.decontaminate and self.filter_file):
            return Tools(tokenizer, None)
        decontaminator = Decontaminator(config.decontaminate, Path(self.filter_file))
        if decontaminator.content_hash != self.filter_hash:
            raise ConfigError(
                f"data.decontaminate: {self.filter_file} was replaced while the run was going on; put the old file "
                "back, or start again"
            )
        return Tools(tokenizer, decontaminator)

    def check_program(self) -> None:
        """Check that this process runs the same program as the loading process. Raises: ShardError if it does not."""
        found = program()
        for what, value in self.program.items():
            if found.get(what) != value:
                raise ShardError(
                    f"a worker runs another program than the loading process, which began with {what} {value}; "
                    f"the worker, from {_PACKAGE}, has {found.get(what)}; put the old one back, or start again"
                )


def program() -> dict[str, str]:
    """Identify what, besides data and config, decides the windows that a process makes, as found on disk.

    That is this package's code and the libraries that parse, tokenize and pack.
    """
    code = xxhash.xxh3_128()
    for path in sorted(_PACKAGE.rglob("*.py")):
        code.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    libraries = (msgspec, np, sentencepiece)
    return {"the code of shards/": code.hexdigest()} | {one.__name__: one.__version__ for one in libraries}
