"""An evaluation suite: sources, divided into domains, divided into documents. folder, YAML -> suite -> evaluation.

A suite is recognised by its layout. A folder holds, for a split such as `val`,

    <source>/<split>/*.jsonl.gz    as Paloma is published; a record's `subdomain` names its domain
    <domain>/<split>.jsonl.zst     one or several files per domain
    <split>/*.jsonl, <split>.jsonl a single source, named after the folder
    *.jsonl                        one domain per file, named after the file

in any of a shard's formats; those that a glob takes only by name, Parquet among them, where a folder has no other. A
YAML file lists its sources, which may be data sets. A document's domain is
`source/subdomain`, or the source if the record names no subdomain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Self

import msgspec
import xxhash
import yaml
from pydantic import Field, ValidationError, model_validator

from shards.config import DEFAULT_TEXT_KEY, Config, Name, SourceConfig
from shards.errors import ConfigError
from shards.index.shard_index import content_hash
from shards.records import hf_datasets
from shards.records.forms import Part as TextPart
from shards.records.texts import texts_of
from shards.storage import files

_SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test")  # a file with such a name is no domain
_YAML_SUFFIXES = (".yaml", ".yml")


class SuiteSource(Config):
    """One source of a suite."""

    name: Name  # the first part of its domains' names
    path: str | None = None  # a file, or a folder in one of the layouts of docs/evaluation.md; relative to this file
    dataset: str | None = None  # in place of a path: an HF data set, as in data.sources
    dataset_config: str | None = None  # the data set's configuration, if it has several
    revision: str | None = None  # revision of a data set on the hub; None = the newest
    split: str | None = None  # None = the split that the suite is read with
    text_key: Name = DEFAULT_TEXT_KEY  # key of the text in a record, or the column of a data set
    # In place of text_key, as in data.sources: a text with keys of the record in braces; the last one's value and what
    # follows it are the response
    template: str | None = None
    messages_key: Name | None = None  # in place of text_key: key of a conversation
    chat_format: Literal["chatml"] | None = None  # how the conversation under messages_key is spelled
    chat_template: Path | None = None  # in place of chat_format: a tokenizer_config.json; relative to this file
    loss_on: Literal["response", "all"] | None = None  # the tokens to score, where there are responses
    domain_from: str | None = "subdomain"  # key of the domain within the source, may be dotted; None = one domain

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.path is None) == (self.dataset is None):
            raise ValueError(f"source {self.name!r}: needs either path or dataset")
        try:
            _as_training_source(self, "")
        except ValidationError as error:  # what the form of its documents lacks
            message = error.errors()[0]["msg"]
            raise ValueError(message.partition(", ")[2] or message) from None
        return self


class SuiteFile(Config):
    """The content of a suite's YAML file."""

    name: Name | None = None  # as shown in evals.jsonl; None = the file's name without its suffix
    sources: tuple[SuiteSource, ...] = Field(min_length=1)


class SuiteDocument(NamedTuple):
    """A document of a suite."""

    source: str
    domain: str  # source or source/subdomain
    text: str
    parts: list[TextPart] | None = None  # what the text is joined of, if it is no single value of a record
    only_responses: bool = False  # whether only the parts that are responses are scored

    @property
    def key(self) -> int:
        """Return a hash that identifies the text and puts texts in a random order that is the same on every machine."""
        scored = self.text.encode() if self.parts is None else msgspec.json.encode([self.parts, self.only_responses])
        return xxhash.xxh3_64_intdigest(scored)


class Part(NamedTuple):
    """A source and the shards that hold its documents."""

    source: SuiteSource
    shards: tuple[str, ...]  # files, or columns of Arrow and Parquet files

    def as_training_source(self) -> SourceConfig:
        """Return the source in the form of `data.sources`, which readers expect."""
        return _as_training_source(self.source, self.source.split or "train")


class Suite(NamedTuple):
    """A suite as `find` returns it."""

    name: str
    parts: tuple[Part, ...]

    def documents(self) -> Iterator[SuiteDocument]:
        """Yield all documents, ordered by source, shard and line. Raises: ShardError for a damaged shard."""
        for part in self.parts:
            source, reading = part.source, part.as_training_source()
            for shard in part.shards:
                for sub_source, text, parts in texts_of(shard, reading):
                    domain = f"{source.name}/{sub_source}" if sub_source is not None else source.name
                    yield SuiteDocument(source.name, domain, text, parts, not reading.learns_prompts)

    def content_hashes(self) -> dict[str, str]:
        """Map shard -> content hash, as in an index: two suites with equal hashes hold the same documents."""
        return {shard: content_hash(shard) for part in self.parts for shard in part.shards}


def find(path: Path, split: str, key: str = "evaluation.suite") -> Suite:
    """Find the suite at a path.

    Args:
        path: a folder or a YAML file.
        split: the documents to read if there are several splits.
        key: config key, for messages.
    Raises: ConfigError saying what was looked for and which splits or domains exist instead.
    """
    if path.suffix in _YAML_SUFFIXES:
        return _from_yaml(path, split, key)
    if not path.is_dir():
        raise ConfigError(
            f"{key}={path} is not a folder; name one that holds <domain>/{split}.jsonl.zst or "
            f"<source>/{split}/*.jsonl.gz, or a .yaml file that lists sources"
        )
    parts = []
    without: list[Path] = []  # folders that have shards, but of other splits only
    for folder in sorted(child for child in path.iterdir() if child.is_dir() and child.name != split):
        if shards := _of_split(folder, split):
            parts.append(Part(SuiteSource.parse({"name": folder.name, "path": str(folder)}, key), shards))
        elif folder.name not in _SPLITS and _splits_in(folder):
            without.append(folder)
    if shards := _of_split(path, split):
        parts.append(Part(SuiteSource.parse({"name": path.resolve().name, "path": str(path)}, key), shards))
    if not parts and not without:
        parts = _file_each(path, key)
    if not parts or without:
        raise ConfigError(_not_found(path, split, key, without))
    return Suite(path.resolve().name, tuple(parts))


def training_shards(suite: Suite, shards: Mapping[str, Sequence[Sequence[str]]]) -> list[str]:
    """List the shards of a suite that are trained on, each with the source and shard that it equals.

    Args:
        shards: source -> (path, content hash) of each of its shards, as in a loader's fingerprint.
    """
    trained = {digest: f"{path} of source {source!r}" for source, pairs in shards.items() for path, digest in pairs}
    return [f"{shard} is {trained[digest]}" for shard, digest in suite.content_hashes().items() if digest in trained]


def _from_yaml(path: Path, split: str, key: str) -> Suite:
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{key}={path}: cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}={path}: not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{key}={path}: needs a key `sources` with a list")
    listed = SuiteFile.parse(tree, key)
    names = [source.name for source in listed.sources]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{key}={path}: the source {twice!r} is listed twice; names must differ")
    base = path.parent
    parts = tuple(Part(_from(base, source), _shards_of(source, split, base, key)) for source in listed.sources)
    return Suite(listed.name or path.stem, parts)


def _from(base: Path, source: SuiteSource) -> SuiteSource:
    """Return a source whose chat template is found from the current folder."""
    found = source.chat_template and base / source.chat_template.expanduser()
    return source.model_copy(update={"chat_template": found})


def _shards_of(source: SuiteSource, split: str, base: Path, key: str) -> tuple[str, ...]:
    """List the shards of one source of a YAML file; paths are relative to the file's folder."""
    split = source.split or split
    read = _as_training_source(source, split)
    if source.dataset is not None:
        return tuple(hf_datasets.shards_of(read))
    path = base / Path(source.path or "").expanduser()
    if path.is_file():
        shards = tuple(files.with_columns([str(path)], source.text_key))
    elif not path.is_dir():
        raise ConfigError(f"{key}: source {source.name!r}: {path} is neither a folder nor a file")
    elif not (shards := _of_split(path, split, source.text_key)):
        raise ConfigError(_not_found(path, split, key, [path]))
    if read.form and any(map(files.is_column, shards)):
        raise ConfigError(
            f"{key}: source {source.name!r}: {read.content_key} reads JSON lines, and of the Parquet files in {path} a"
            " single column is read; write their rows as JSON lines"
        )
    return shards


def _as_training_source(source: SuiteSource, split: str) -> SourceConfig:
    """Return a source in the form of `data.sources`, which readers expect."""
    return SourceConfig(
        name=source.name,
        paths=() if source.path is None else (source.path,),
        dataset=source.dataset,
        dataset_config=source.dataset_config,
        revision=source.revision,
        split=split,
        text_key=source.text_key,
        template=source.template,
        messages_key=source.messages_key,
        chat_format=source.chat_format,
        chat_template=source.chat_template,
        loss_on=source.loss_on,
        source_from=source.domain_from,
    )


def _of_split(folder: Path, split: str, text_key: str = DEFAULT_TEXT_KEY) -> tuple[str, ...]:
    """List a folder's shards of one split, sorted: <split>/*.jsonl.gz, else <split>.jsonl.gz and the like.

    Args:
        text_key: the column of Parquet files.
    """
    inside = _shards_in(folder / split) if (folder / split).is_dir() else []
    found = inside or [path for path in _shards_in(folder) if _stem(path) == split]
    return tuple(files.with_columns(map(str, found), text_key))


def _shards_in(folder: Path) -> list[Path]:
    """List a folder's shards: those of `SHARD_SUFFIXES`, or if there are none, of `NAMED_SUFFIXES`.

    The same texts often lie beside each other as JSON lines and as Parquet, and scores of suites that were read before
    there was a choice stay comparable.
    """
    there = sorted(path for path in folder.iterdir() if path.is_file())
    kinds = (files.SHARD_SUFFIXES, files.NAMED_SUFFIXES)
    return next(filter(None, ([path for path in there if path.name.endswith(kind)] for kind in kinds)), [])


def _stem(path: Path) -> str:
    return path.name.partition(".")[0]


def _whole_stem(path: Path) -> str:
    suffixes = files.SHARD_SUFFIXES + files.NAMED_SUFFIXES
    return next(path.name.removesuffix(suffix) for suffix in suffixes if path.name.endswith(suffix))


def _splits_in(folder: Path) -> list[str]:
    """List the names that could be given as a split of a folder."""
    below = [child.name for child in folder.iterdir() if child.is_dir() and _shards_in(child)]
    return sorted({*below, *(_stem(path) for path in _shards_in(folder))})


def _file_each(folder: Path, key: str) -> list[Part]:
    """Make a domain of each shard of a folder, unless any is named after a split."""
    shards = _shards_in(folder)
    if any(_stem(path) in _SPLITS for path in shards):
        return []
    return [
        Part(
            SuiteSource.parse({"name": _whole_stem(path), "path": str(path)}, key),
            tuple(files.with_columns([str(path)], DEFAULT_TEXT_KEY)),
        )
        for path in shards
    ]


def _not_found(path: Path, split: str, key: str, without: Sequence[Path]) -> str:
    looked_for = f"<source>/{split}/*.jsonl.gz, <domain>/{split}.jsonl.zst, {split}/*.jsonl, *.jsonl"
    if without:
        there = "; ".join(f"{folder.name} has {', '.join(_splits_in(folder)[:5]) or 'none'}" for folder in without[:5])
        return f"{key}={path}: no split {split!r} in {len(without)} of its domains ({there}); set evaluation.split"
    found = ", ".join(_splits_in(path)[:5])
    return f"{key}={path} has no {looked_for}" + (f"; there is {found}: set evaluation.split" if found else "")
