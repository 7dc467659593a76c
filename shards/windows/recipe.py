"""What windows are made with beside their shards, the same in all processes of a run. loader -> recipe -> window.

A worker that is started late, for one that was lost, finds files that may have been replaced since the run began. What
it would make from them is another run's, so it compares before it makes anything.
"""

from pathlib import Path

import msgspec
import numpy as np
import sentencepiece
import xxhash

from shards.errors import ConfigError, ShardError
from shards.suites.decontaminate import Decontaminator
from shards.tokenize.tokenizer import Tokenizer

PACKAGE = Path(__file__).parents[1]  # shards/


class Recipe(msgspec.Struct, frozen=True):
    """What the loading process has, as its workers compare it with what they find."""

    tokenizer: str  # content hash
    program: dict[str, str]  # as `program` gives it
    filter_file: str | None = None  # of the decontamination, where there is one
    filter_hash: str | None = None  # of its content

    @classmethod
    def of(cls, tokenizer: Tokenizer, decontaminator: Decontaminator | None) -> "Recipe":
        """The recipe of this process."""
        if decontaminator is None:
            return cls(tokenizer.content_hash, program())
        return cls(tokenizer.content_hash, program(), str(decontaminator.path), decontaminator.content_hash)

    def check_tokenizer(self, path: Path, found: Tokenizer) -> None:
        """Raises: ConfigError if `found` is not the loading process's."""
        if found.content_hash != self.tokenizer:
            raise ConfigError(
                f"data.tokenizer={path}: the file was replaced while the run goes on; put the old one back, or "
                "start again"
            )

    def check_filter(self, found: Decontaminator) -> None:
        """Raises: ConfigError if `found` is not the loading process's."""
        if found.content_hash != self.filter_hash:
            raise ConfigError(
                f"data.decontaminate: {found.path} was replaced while the run goes on; put the old file back, or "
                "start again"
            )

    def check_program(self) -> None:
        """Raises: ShardError if this process runs another program than the loading process."""
        found = program()
        for what, value in self.program.items():
            if found.get(what) != value:
                raise ShardError(
                    f"a worker runs another program than the loading process, which began with {what} {value}; "
                    f"the worker, from {PACKAGE}, has {found.get(what)}; put the old one back, or start "
                    "again"
                )


def program() -> dict[str, str]:
    """What decides, beside data and config, which windows a process makes, as it stands on the disk.

    That is this package's code, and the libraries that parse, tokenize and pack.
    """
    code = xxhash.xxh3_128()
    for path in sorted(PACKAGE.rglob("*.py")):
        code.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    libraries = (msgspec, np, sentencepiece)
    return {"the code of shards/": code.hexdigest()} | {one.__name__: one.__version__ for one in libraries}
