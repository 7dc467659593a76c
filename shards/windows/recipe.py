"""The tools that make windows from shards, the same in all processes of a run. tokenizer -> recipe -> window.

A worker that starts late, in place of a lost one, may find that files have been replaced since the run began. Its
windows would belong to another run, so it compares before it makes any.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import sentencepiece
import xxhash

from shards.config import DataConfig, SourceConfig
from shards.errors import ConfigError, ShardError
from shards.records.document_list import DocumentList
from shards.records.forms import identity_of
from shards.suites.decontaminate import Decontaminator
from shards.tokenize.tokenizer import Tokenizer, describe

_PACKAGE = Path(__file__).parents[1]  # shards/


class ToolFile(NamedTuple):
    """A file that decides what windows hold."""

    path: str
    content_hash: str


class Tools(NamedTuple):
    """The tools with which one process makes windows."""

    tokenizer: Tokenizer
    # Of each stage of the run:
    filters: tuple[Decontaminator | None, ...] = (None,)
    forgotten: tuple[DocumentList | None, ...] = (None,)
    templates: tuple[ToolFile, ...] = ()  # chat templates, which parsers of records read

    def recipe(self) -> Recipe:
        """Describe the tools of this process for others."""
        return Recipe(
            tokenizer=self.tokenizer.content_hash,
            libraries=self.tokenizer.libraries,
            program=program(),
            filters=tuple(_file_of(found) for found in self.filters),
            forgotten=tuple(_file_of(found) for found in self.forgotten),
            templates=self.templates,
        )


class Recipe(msgspec.Struct, frozen=True):
    """A description of the loading process's tools, with which others compare theirs."""

    tokenizer: str  # content hash
    program: dict[str, str]  # as returned by `program`
    # Of each stage of the run:
    filters: tuple[ToolFile | None, ...] = (None,)  # the decontamination's
    forgotten: tuple[ToolFile | None, ...] = (None,)  # lists of data.forget
    libraries: dict[str, str] = {}  # versions of those that compute the tokenizer's ids
    templates: tuple[ToolFile, ...] = ()  # of the sources that have chat templates

    def open(self, stages: Sequence[DataConfig]) -> Tools:
        """Open the same tools in this process.

        Args:
            stages: the data config of each stage of the run.
        Raises: ConfigError if files are missing, or differ from the loading process's.
        """
        data = stages[0]
        tokenizer = Tokenizer.of(data)
        _check_file("data.tokenizer", str(data.tokenizer), tokenizer.content_hash, self.tokenizer)
        if tokenizer.libraries != self.libraries:
            raise ConfigError(
                f"data.tokenizer={data.tokenizer}: its ids are computed by {describe(tokenizer.libraries)} here, but "
                f"the loading process began with {describe(self.libraries)}; put the old versions back, or start again"
            )
        filters = {
            file: Decontaminator(stage.decontaminate, Path(file.path))
            for stage, file in zip(stages, self.filters, strict=True)
            if file and stage.decontaminate
        }
        forgotten = {file: DocumentList(Path(file.path), "data.forget") for file in self.forgotten if file}
        for file, decontaminator in filters.items():
            _check_file("data.decontaminate", file.path, decontaminator.content_hash, file.content_hash)
        for file, listed in forgotten.items():
            _check_file("data.forget", file.path, listed.content_hash, file.content_hash)
        templates = template_files(stages[-1].sources)
        for begun, found in zip(self.templates, templates, strict=True):
            _check_file("chat_template", found.path, found.content_hash, begun.content_hash)
        return Tools(
            tokenizer,
            tuple(filters[file] if file else None for file in self.filters),
            tuple(forgotten[file] if file else None for file in self.forgotten),
            templates,
        )

    def check_program(self) -> None:
        """Check that this process runs the same program as the loading process. Raises: ShardError if it does not."""
        found = program()
        for what, value in self.program.items():
            if found.get(what) != value:
                raise ShardError(
                    f"a worker runs another program than the loading process, which began with {what} {value}; "
                    f"the worker, from {_PACKAGE}, has {found.get(what)}; put the old one back, or start again"
                )


def template_files(sources: Sequence[SourceConfig]) -> tuple[ToolFile, ...]:
    """Return the chat templates of sources. Raises: ConfigError if one cannot be read."""
    return tuple(
        ToolFile(str(source.chat_template), identity_of(source)["chat_template"])
        for source in sources
        if source.chat_template
    )


def _file_of(tool: Decontaminator | DocumentList | None) -> ToolFile | None:
    return None if tool is None else ToolFile(str(tool.path), tool.content_hash)


def _check_file(key: str, path: str, found: str, begun_with: str) -> None:
    if found != begun_with:
        raise ConfigError(
            f"{key}={path}: the file was replaced while the run was going on; put the old file back, or start again"
        )


@functools.cache  # the code that this process runs does not change when its files do
def program() -> dict[str, str]:
    """Identify what, besides data and config, decides the windows that a process makes, as first found on disk.

    That is this package's code and the libraries that parse, tokenize and pack.
    """
    code = xxhash.xxh3_128()
    for path in sorted(_PACKAGE.rglob("*.py")):
        code.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    libraries = (msgspec, np, sentencepiece)
    return {"the code of shards/": code.hexdigest()} | {one.__name__: one.__version__ for one in libraries}
