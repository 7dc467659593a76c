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
from typing import Any, Literal, NamedTuple, Self

import msgspec
import xxhash
import yaml
from pydantic import Field, ValidationError, model_validator

from shards.arrays import Ints
from shards.config import DEFAULT_TEXT_KEY, SourceConfig
from shards.config_base import Config, HashRange, Name, Take
from shards.errors import ConfigError
from shards.index.shard_index import content_hash
from shards.records import hf_datasets
from shards.records.forms import Part as TextPart
from shards.records.forms import identity_of
from shards.records.json_lines import bad_record_error
from shards.records.selection import are_disjoint, bytes_of
from shards.records.texts import ADVICE, misfit, parts_of, records_of_source
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
    # Key of the text in a record, or the column of a data set; beside input_ids_key, of the texts whose bytes are
    # counted; None = text, and beside input_ids_key none
    text_key: Name | None = None
    # In place of the text, as in data.sources: column of token ids in a data set or in Parquet files
    input_ids_key: Name | None = None
    # In place of text_key, as in data.sources: a text with keys of the record in braces; the last one's value and what
    # follows it are the response
    template: str | None = None
    messages_key: Name | None = None  # in place of text_key: key of a conversation
    chat_format: Literal["chatml"] | None = None  # how the conversation under messages_key is spelled
    chat_template: Path | None = None  # in place of chat_format: a tokenizer_config.json; relative to this file
    loss_on: Literal["response", "all"] | None = None  # the tokens to score, where there are responses
    # Records to score, first and end, as in data.sources: numbered from 0 over the shards in order, the end not
    # included; null as the end = all that follow; None = all
    take: Take | None = None
    # The documents to score, as in data.sources: those with a hash of their content, a number from 0 to 1, from the
    # first bound to below the second; None = all
    hash_range: HashRange | None = None
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
    text: str | None  # None = unknown, as beside token ids it may be
    place: str  # its shard and line, for messages
    token_ids: Ints | None = None  # what is scored, if the source holds token ids
    parts: list[TextPart] | None = None  # what the text is joined of, if it is no single value of a record
    only_responses: bool = False  # whether only the parts that are responses are scored

    @property
    def key(self) -> int:
        """Return a hash of what is scored, which puts documents in a random order, the same on every machine."""
        if self.token_ids is not None:
            return xxhash.xxh3_64_intdigest(bytes_of(self.token_ids))
        assert self.text is not None
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
            beside = None if source.input_ids_key is None else source.text_key
            for shard, records in records_of_source(part.shards, reading, beside):
                if records.bad:
                    raise bad_record_error(shard, records.bad[0], ADVICE)
                texts: Sequence[str | None]
                texts = records.texts if source.input_ids_key is None or beside else [None] * len(records.texts)
                ids: Sequence[Ints | None] = records.token_ids or [None] * len(texts)
                columns = records.lines, records.sub_sources, texts, ids, parts_of(records)
                for line, sub_source, text, token_ids, parts in zip(*columns, strict=True):
                    domain = f"{source.name}/{sub_source}" if sub_source is not None else source.name
                    only_responses = not reading.learns_prompts
                    place = f"{shard}, line {line}"
                    yield SuiteDocument(source.name, domain, text, place, token_ids, parts, only_responses)

    def content_hashes(self) -> dict[str, str]:
        """Map shard -> content hash, as in an index; what the sources choose of a shard is not in it."""
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


def training_shards(suite: Suite, fingerprint: Mapping[str, Any]) -> list[str]:
    """List the shards of a suite that are trained on, each with the source and shard that it equals.

    A shard of which the training and the suite read parts that have nothing in common is not among them.

    Args:
        fingerprint: a loader's.
    """
    hashes, found = suite.content_hashes(), []
    configs = {config["name"]: config for config in fingerprint["config"]["sources"]}
    for part in suite.parts:
        ours = [hashes[shard] for shard in part.shards]
        for name, pairs in fingerprint["shards"].items():
            theirs = [digest for _, digest in pairs]
            for shard, digest in zip(part.shards, ours, strict=True):
                if digest in theirs and not _is_divided(part, ours, configs[name], theirs, digest):
                    found.append(f"{shard} is {pairs[theirs.index(digest)][0]} of source {name!r}")
    return found


def _is_divided(part: Part, ours: Sequence[str], config: Mapping[str, Any], theirs: Sequence[str], digest: str) -> bool:
    """Return whether a suite's source and a training source read no record in common of a shard that both have.

    Args:
        ours, theirs: content hashes of the shards of each.
        config: the training source's, in a fingerprint.
        digest: the shard's content hash.
    """
    reading = part.as_training_source()
    content = {"text_key": reading.text_key, "input_ids_key": reading.input_ids_key}
    content |= {key: identity_of(reading).get(key) for key in SourceConfig.FORM_KEYS}
    of_same_content = content == {key: config.get(key) for key in content}
    hashes, taken = config.get("hash_range"), config.get("take")
    if of_same_content and reading.hash_range and hashes and are_disjoint(reading.hash_range, hashes):
        return True
    # Numbers mean the same in both if the same shards come before
    before, their_before = (list(shards[: shards.index(digest)]) for shards in (ours, theirs))
    is_single = ours.count(digest) == theirs.count(digest) == 1
    return bool(reading.take and taken and is_single and before == their_before and are_disjoint(reading.take, taken))


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
        shards = tuple(files.with_columns([str(path)], read.column))
    elif not path.is_dir():
        raise ConfigError(f"{key}: source {source.name!r}: {path} is neither a folder nor a file")
    elif not (shards := _of_split(path, split, read.column)):
        raise ConfigError(_not_found(path, split, key, [path]))
    if wrong := misfit(read, shards):
        raise ConfigError(f"{key}: source {source.name!r}: {wrong}")
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
        text_key=source.text_key or DEFAULT_TEXT_KEY,
        input_ids_key=source.input_ids_key,
        take=source.take,
        hash_range=source.hash_range,
        template=source.template,
        messages_key=source.messages_key,
        chat_format=source.chat_format,
        chat_template=source.chat_template,
        loss_on=source.loss_on,
        source_from=source.domain_from,
    )


def _of_split(folder: Path, split: str, column: str = DEFAULT_TEXT_KEY) -> tuple[str, ...]:
    """List a folder's shards of one split, sorted: <split>/*.jsonl.gz, else <split>.jsonl.gz and the like.

    Args:
        column: that of Parquet files.
    """
    inside = _shards_in(folder / split) if (folder / split).is_dir() else []
    found = inside or [path for path in _shards_in(folder) if _stem(path) == split]
    return tuple(files.with_columns(map(str, found), column))


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
