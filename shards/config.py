"""The user's data settings: sources, row length, packing, workers. config -> loader."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from shards.config_base import Config, HashRange, Name, Take
from shards.config_errors import listed, multiples_near
from shards.errors import ConfigError

Step = Annotated[int, Field(ge=1)]  # of an optimizer: the first is step 1

# What rank files are made like: shards/tokenize/rank_file.py says what each is
RankEncoding = Literal["llama3", "r50k_base", "cl100k_base", "o200k_base"]

MIB = 1 << 20
_DEFAULT_MAX_LANES = 1024
_LANE_BYTES = 64 * MIB  # minimum raw bytes of all sources per lane when the number of lanes is not given
PLAN_VERSIONS = (1, 2)  # versions of the rules by which data is dealt; the newest last
DEFAULT_MAX_DECODER_WINDOW = 128 * MIB
DEFAULT_TEXT_KEY = "text"  # as in the Pile and Dolma


class OverflowTolerance(Config):
    """One document per row; what overflows the last full row gets a row of its own only if it is long enough."""

    overflow_tolerance: int = Field(ge=1)  # tokens; a shorter overflow is dropped


class MaxOverflow(Config):
    """One document per row; what overflows it gets rows of its own or, if that is too much, the document is dropped."""

    max_overflow: int = Field(ge=0)  # tokens beyond seq_len + 1 that a document may have


def _check_packing(value: object) -> object:
    if isinstance(value, Mapping) and sorted(value) not in (["max_overflow"], ["overflow_tolerance"]):
        raise ValueError(
            f"{dict(value)} must be {{overflow_tolerance: n}} or {{max_overflow: n}}, with a number of tokens"
        )
    return value


def _kind_of_packing(value: object) -> str:
    """Return the name of the packing's class, so that an error is about that one alone; of the others "str"."""
    if isinstance(value, Mapping):
        return "MaxOverflow" if "max_overflow" in value else "OverflowTolerance"
    return type(value).__name__ if isinstance(value, OverflowTolerance | MaxOverflow) else "str"


Packing = Annotated[
    Annotated[Literal["best_fit", "concat", "truncate", "pad"], Tag("str")]
    | Annotated[OverflowTolerance, Tag("OverflowTolerance")]
    | Annotated[MaxOverflow, Tag("MaxOverflow")],
    Discriminator(_kind_of_packing),
    BeforeValidator(_check_packing),
]


class SourceConfig(Config):
    """A named list of shards, or a data set, with a weight."""

    # Keys that may change when a run resumes: contents are compared instead, or no token depends on them
    MAY_CHANGE: ClassVar = frozenset(
        {"paths", "dataset", "dataset_config", "split", "revision", "id_key", "source_from", "chat_template"}
    )
    # Keys that say how a document is spelled
    FORM_KEYS: ClassVar = ("template", "messages_key", "chat_format", "chat_template")
    # Keys that choose a part of the records
    SELECTION_KEYS: ClassVar = ("take", "hash_range", "min_tokens", "max_tokens")

    name: Name  # as shown in metrics; unique
    paths: tuple[str, ...] = ()  # files or globs, sorted after expansion; relative to the current folder
    dataset: str | None = None  # in place of paths: an HF data set, either a local file or folder or a name on the hub
    dataset_config: str | None = None  # the data set's configuration, if it has several
    split: str = "train"  # split of the data set
    revision: str | None = None  # revision of a data set on the hub; None = the newest
    weight: float = Field(default=1.0, ge=0)  # share of the rows, relative to the other sources' weights
    # Passes over the source before it leaves the mix; None = no limit
    max_epochs: int | None = Field(default=None, ge=1)
    text_key: Name = DEFAULT_TEXT_KEY  # key of the text in a record, dotted for one in an object
    # In place of text_key: a text with keys of the record in braces, as in "Q: {question}\nA: {answer}"; the last one's
    # value and what follows it are the response
    template: str | None = None
    # In place of text_key: key of a conversation, whose responses are the assistant's messages
    messages_key: Name | None = None
    chat_format: Literal["chatml"] | None = None  # how the conversation under messages_key is spelled
    # In place of chat_format: the tokenizer_config.json with a chat template, for which jinja2 must be installed
    chat_template: Path | None = None
    # The tokens to learn, where there are responses; None = those of the responses
    loss_on: Literal["response", "all"] | None = None
    # Column of token ids in a data set or in Parquet files; None = the text is tokenized
    input_ids_key: Name | None = None
    # Records to read, [first, end], numbered from 0 over all shards in order, the end not included; null as the end =
    # to the last; None = all
    take: Take | None = None
    # The documents to keep: those with a hash of their content, a number from 0 to 1, from the first bound to below the
    # second; None = all
    hash_range: HashRange | None = None
    # The documents to keep: those of at least so many tokens, BOS and EOS counted; None = all
    min_tokens: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)  # and of at most so many; None = all
    id_key: Name = "id"  # key of the record's id, if it has one (Dolma); dotted as text_key
    source_from: str | None = None  # key of the sub-source to count separately in metrics, e.g. meta.pile_set_name

    @property
    def column(self) -> str:
        """Return the column of a data set or a Parquet file that holds the source's texts or token ids."""
        return self.input_ids_key or self.text_key

    @property
    def form(self) -> dict[str, str]:
        """Return the keys that say how a document is spelled, by name; empty if it is the value of a single key."""
        return {key: str(value) for key in self.FORM_KEYS if (value := getattr(self, key)) is not None}

    @property
    def selection(self) -> dict[str, object]:
        """Return the keys that choose a part of the records, by name, as plain values; empty if all are read."""
        chosen = {key: value for key in self.SELECTION_KEYS if (value := getattr(self, key)) is not None}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in chosen.items()}

    @property
    def selection_texts(self) -> dict[str, str]:
        """Return `selection` as a config has it, `key: value`, by key, for messages."""
        return {key: f"{key}: {json.dumps(value)}" for key, value in self.selection.items()}

    @property
    def has_length_bounds(self) -> bool:
        """Return whether the number of its tokens decides if a document is kept."""
        return self.min_tokens is not None or self.max_tokens is not None

    @property
    def content_key(self) -> str:
        """Return the key of this config that names what a document is made of."""
        return next(iter(self.form), "text_key" if self.input_ids_key is None else "input_ids_key")

    @property
    def learns_prompts(self) -> bool:
        """Return whether all tokens of a document are learned, those of prompts included."""
        return not self.form or self.loss_on == "all"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.paths) == (self.dataset is not None):
            raise ValueError(f"source {self.name!r}: needs either paths or dataset")
        if self.min_tokens and self.max_tokens and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"source {self.name!r}: min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}, so that it"
                " would keep no document"
            )
        try:
            self._check_form()
        except ValueError as error:
            raise ValueError(f"source {self.name!r}: {error}") from None
        return self

    def _check_form(self) -> None:
        if self.template is not None:
            template_fields(self.template)
        ways = sum(way is not None for way in (self.chat_format, self.chat_template))
        if ways != (self.messages_key is not None):
            raise ValueError("messages_key goes with either chat_format, such as chatml, or chat_template")
        if self.loss_on is not None and not self.form:
            raise ValueError("loss_on needs to know what a response is: set template or messages_key, or leave it out")
        others = {"text_key": self.text_key != DEFAULT_TEXT_KEY, "input_ids_key": self.input_ids_key is not None}
        others["messages_key"] = self.template is not None and self.messages_key is not None
        if self.form and any(others.values()):
            extra = next(key for key, is_set in others.items() if is_set)
            raise ValueError(f"{self.content_key} and {extra} both say what a document is; leave one out")
        columnar = [path for path in self.paths if path.endswith(".parquet")] or (
            [self.dataset] if self.dataset else []
        )
        if self.form and columnar:
            raise ValueError(
                f"{self.content_key} reads JSON lines, and of {columnar[0]} a single column is read; write its rows as "
                "JSON lines"
            )


class RemoteCache(Config):
    """A local cache of the blocks read from remote shards, so that they are fetched only once."""

    dir: Path  # on a local disk; shared by all processes of a node and by runs
    max_bytes: int = Field(ge=16 * MIB)  # limit on disk space; the least recently used blocks are evicted first


class Decontamination(Config):
    """The rule that keeps documents out of training because they share text with an evaluation suite."""

    suite: Path  # a folder or a YAML file, as in evaluation.suite
    splits: tuple[Name, ...] = Field(default=("val", "test"), min_length=1)  # splits of the suite
    # What has to match, regardless of case, character forms and styles of quotes, dashes and white space: a whole line
    # without leading and trailing white space, or min_tokens consecutive words anywhere
    match: Literal["paragraph", "ngram"] = "paragraph"
    # Minimum words of a paragraph, or words per n-gram; each Han or Kana character counts as a word
    min_tokens: int = Field(default=13, ge=1)


class WeightChange(Config):
    """New weights that apply from a given step on."""

    step: int = Field(ge=1)  # first optimizer step that uses them, counted from 0
    weights: dict[str, float]  # source name -> weight; sources not named keep theirs


class DataConfig(Config):
    """Everything that decides the content of batches and how they are made."""

    # As in SourceConfig; every other key decides what a batch holds
    MAY_CHANGE: ClassVar = frozenset(
        {"tokenizer", "on_bad_record", "max_bad_records", "index_dir", "max_index_at_start", "max_decoder_window"}
        | {"remote_cache", "num_workers", "prefetch_bytes", "worker_timeout"}
        | {"decontaminate", "forget"}  # the fingerprint compares what they drop instead
        | {"skip_steps"}  # decides which batches are trained on, not what they hold
    )

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    # A SentencePiece model, a tokenizer.json of the tokenizers library or a rank file of tiktoken
    tokenizer: Path
    # The encoding whose pattern and special tokens a rank file goes with; None = the file is the published one of some
    rank_encoding: RankEncoding | None = None
    seq_len: int = Field(ge=1)  # predicted tokens per row; a row holds seq_len + 1 tokens
    packing: Packing = "best_fit"
    # The tokens of its row that a token attends to: those before it of its own document, or of all documents
    attention: Literal["document", "row"] = "document"
    # Streams of rows, which only a stage changes; None = the most that divide a batch and have 64 MiB each, up to 1024
    lanes: int | None = Field(default=None, ge=1)
    # Version of the rules that decide the order of rows; None = the run's own, or the newest for a new run
    plan_version: Literal[1, 2] | None = None
    bos: bool = True  # begin each document with the tokenizer's BOS
    eos: bool = True  # end each document with the tokenizer's EOS
    # The token that is BOS; None = the one that the tokenizer's file names
    bos_token: str | None = Field(default=None, min_length=1)
    # The token that is EOS; None = the one that the tokenizer's file names
    eos_token: str | None = Field(default=None, min_length=1)
    weight_changes: tuple[WeightChange, ...] = ()  # ordered by step

    on_bad_record: Literal["fail", "skip"] = "fail"  # a bad record is a line that is not a JSON object with a text
    # Records that may be skipped on one rank before it fails; None = no limit
    max_bad_records: int | None = Field(default=None, ge=0)

    decontaminate: Decontamination | None = None  # None = no document is dropped because of its content
    # A list of documents that rows still hold and nothing is learned from: see records/document_list.py
    forget: Path | None = None
    # Steps, first and last, whose batches are passed over as if they had been trained on; counted as in metrics.jsonl
    skip_steps: tuple[tuple[Step, Step], ...] = ()

    window_bytes: int | None = Field(default=None, ge=1)  # raw bytes; None = 512 * seq_len within 1..4 MiB
    index_dir: Path | None = None  # folder of indexes and manifests; None = beside the shards, or the user's cache
    max_index_at_start: int = Field(default=20 * 10**9, ge=0)  # raw bytes that a training start may index on its own
    max_decoder_window: int = Field(
        default=DEFAULT_MAX_DECODER_WINDOW, ge=1024
    )  # bytes of zstd's decoder window; --long=31 needs 2 GiB

    remote_cache: RemoteCache | None = None  # cache of remote shards; None = every read goes to the network

    num_workers: int = Field(default=1, ge=0)  # processes that make windows; 0 = the loading process makes them
    prefetch_bytes: int = Field(default=128 * MIB, ge=0)  # raw bytes of windows made ahead of use
    worker_timeout: float = Field(default=300.0, gt=0)  # seconds that a window may take before its worker is replaced

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"sources: the name {name!r} is used twice; names must differ")
        of_ids = [source.name for source in self.sources if source.input_ids_key is not None]
        if self.decontaminate and of_ids:
            raise ValueError(f"decontaminate: source {of_ids[0]!r} holds token ids; it works on texts only")
        flat = [step for steps in self.skip_steps for step in steps]
        if any(last < first for first, last in self.skip_steps) or flat != sorted(flat):
            written = [list(steps) for steps in self.skip_steps]
            raise ValueError(f"skip_steps: {written} must be pairs [first, last] of steps, in order")
        weights = {source.name: source.weight for source in self.sources}
        _check_weights(weights, "sources")
        steps = [change.step for change in self.weight_changes]
        if steps != sorted(set(steps)):
            raise ValueError(f"weight_changes: steps {steps} must rise")
        for change in self.weight_changes:
            if unknown := sorted(set(change.weights) - set(names)):
                raise ValueError(f"weight_changes at step {change.step}: no source {unknown[0]!r}; there are {names}")
            weights = weights | change.weights
            _check_weights(weights, f"weight_changes at step {change.step}")
        return self

    @property
    def plan(self) -> int:
        """Return the plan version in force: a config that names none belongs to a new run, which follows the newest."""
        return self.plan_version or PLAN_VERSIONS[-1]

    @property
    def strict_records(self) -> bool:
        """True if bytes alone decide what a line holds (`records.json_lines`), the rule since plan version 2."""
        return self.plan >= 2

    def num_lanes(self, global_batch_size: int, raw_bytes: int) -> int:
        """Return V, the number of lanes; `raw_bytes` covers all sources with weight."""
        if self.lanes:
            return self.lanes
        if self.plan == 1:
            return min(global_batch_size, _DEFAULT_MAX_LANES)
        most = min(max(1, raw_bytes // _LANE_BYTES), global_batch_size, _DEFAULT_MAX_LANES)
        return next(lanes for lanes in range(most, 0, -1) if global_batch_size % lanes == 0)

    def weightings(self) -> list[tuple[int, tuple[float, ...]]]:
        """Return (first step, weights in the order of the sources) for each stage, ordered by step."""
        weights = {source.name: source.weight for source in self.sources}
        stages = [(0, tuple(weights.values()))]
        for change in self.weight_changes:
            weights |= change.weights
            stages.append((change.step, tuple(weights.values())))
        return stages

    @property
    def window_limit(self) -> int:
        """Raw bytes that a window may hold; a larger record is a window of its own."""
        return self.window_bytes or min(max(512 * self.seq_len, MIB), 4 * MIB)

    @property
    def cell_bytes(self) -> int:
        """Raw bytes between the marks of the record table, which is never coarser than a window."""
        return min(MIB, self.window_limit)


def template_fields(template: str) -> list[tuple[str, str | None]]:
    """Split a template into texts and the key after each, None after the last text if that ends it.

    Raises: ValueError with what is wrong with it.
    """
    try:
        fields = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"template: {error}; write {{{{ and }}}} for braces that are text") from None
    if any(key is not None and (not key or spec or how) for _, key, spec, how in fields):
        raise ValueError(f"template: {template!r} must have nothing but keys of the record in braces")
    if all(key is None for _, key, _, _ in fields):
        raise ValueError(f"template: {template!r} names no key of the record; write it in braces, as in {{response}}")
    return [(text, key) for text, key, _, _ in fields]


def with_recorded_plan(written: Mapping[str, object]) -> dict[str, object]:
    """Return the data config that a run recorded, with its plan version filled in.

    A config that names none was recorded before plan versions existed, under the rules that are now version 1.
    """
    return {"plan_version": PLAN_VERSIONS[0], **written}


def check_split(global_batch_size: int, dp_size: int, micro_batch_size: int = 1, at: str = "train") -> None:
    """Check that a global batch splits evenly over ranks, in whole micro-batches.

    Args:
        global_batch_size: rows of one step, over all ranks.
        dp_size: number of data-parallel ranks.
        micro_batch_size: rows of one forward pass.
        at: the section that says so.
    Raises: ConfigError naming values that would fit.
    """
    portion = dp_size * micro_batch_size
    if global_batch_size % portion == 0:
        return
    working = [n for n in range(1, global_batch_size + 1) if global_batch_size % (n * micro_batch_size) == 0]
    over = "over"
    if micro_batch_size > 1:
        over = f"into micro-batches of {at}.micro_batch_size={micro_batch_size} rows on"
    raise ConfigError(
        f"{at}.global_batch_size={global_batch_size} cannot be split {over} {dp_size} data-parallel ranks; make it a"
        f" multiple of {portion}, such as {multiples_near(global_batch_size, portion)}; with this batch, these numbers"
        f" of data-parallel ranks work: {listed(working)}"
    )


def _check_weights(weights: Mapping[str, float], where: str) -> None:
    if any(weight < 0 for weight in weights.values()):
        raise ValueError(f"{where}: weights must not be negative: {dict(weights)}")
    if not any(weights.values()):
        raise ValueError(f"{where}: all weights are 0; at least one must be positive")
