"""The user's settings of the data: sources, row length, packing, workers. config -> loader."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from shards.config_errors import explain, listed, multiples_near
from shards.errors import ConfigError

Name = Annotated[str, StringConstraints(min_length=1, pattern=r"^[^/\s]+$")]

MIB = 1 << 20
_DEFAULT_MAX_LANES = 1024
_LANE_BYTES = 64 * MIB  # raw bytes of all sources per lane, at least, where the number of lanes is not given
PLAN_VERSIONS = (1, 2)  # versions of the rules by which data is dealt out; the newest last
DEFAULT_MAX_DECODER_WINDOW = 128 * MIB


def _with_strict_scalars(schema: Any) -> Any:
    """Return a pydantic schema, or a part of one, whose scalars are all strict.

    pydantic's own strict mode goes too far: it refuses lists for tuples, texts for paths and mappings for sections.
    """
    if isinstance(schema, list):
        return [_with_strict_scalars(part) for part in schema]
    if not isinstance(schema, dict) or schema.get("type") == "chain":
        return schema
    if schema.get("type") in ("bool", "float", "int", "str"):
        return schema | {"strict": True}
    if schema.get("type") == "literal" and all(type(value) is int for value in schema["expected"]):
        # A literal is looked up by equality, and True and 1.0 equal 1
        return core_schema.chain_schema([core_schema.int_schema(strict=True), schema])
    return {key: _with_strict_scalars(part) for key, part in schema.items()}


class Config(BaseModel):
    """Base of every config class: frozen, without unknown keys, and strict about the types of values.

    A number, a truth value or a text is never converted: 8 is an int, "8", 8.0 and True are not; an int may stand for a
    float. A list may stand for a tuple and a text for a path, since YAML has neither.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        strict: CoreSchema = _with_strict_scalars(handler(source))
        return strict

    @classmethod
    def parse(cls, values: Mapping[str, object], at: str = "") -> Self:
        """Validate plain values, as read from YAML; `at` is the key under which they stand.

        Raises: ConfigError naming each key that is wrong, its value, and what would be right.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError("\n".join(explain(error, cls, at))) from None


class OverflowTolerance(Config):
    """One document per row; what overflows the last full row becomes a row of its own only if it is long enough."""

    overflow_tolerance: int = Field(ge=1)  # tokens; a shorter overflow is dropped


Packing = Literal["best_fit", "concat", "truncate", "pad"] | OverflowTolerance


class SourceConfig(Config):
    """A named list of shards, or a data set, with a weight."""

    # Keys that a run may change when it goes on, since contents are compared instead or no token depends on them
    MAY_CHANGE: ClassVar = frozenset(
        {"paths", "dataset", "dataset_config", "split", "revision", "id_key", "source_from"}
    )

    name: Name  # as it appears in metrics; unique
    paths: tuple[str, ...] = ()  # files or globs, sorted after expansion; relative to the current folder
    dataset: str | None = None  # instead of paths: an HF data set: a local file or folder, or its name on the hub
    dataset_config: str | None = None  # which of the data set's configurations, where it has several
    split: str = "train"  # split of the data set
    revision: str | None = None  # revision of a data set on the hub; None = the newest
    weight: float = Field(default=1.0, ge=0)  # share of the rows, relative to the other sources' weights
    # Passes over the source, then it leaves the mix; None = no limit
    max_epochs: int | None = Field(default=None, ge=1)
    text_key: Name = "text"  # key of the text in a record, as in the Pile and Dolma
    input_ids_key: Name | None = None  # column of token ids in a data set; None = the text is tokenized
    id_key: Name = "id"  # key of the record's id, where it has one (Dolma)
    source_from: str | None = None  # key of a sub-source to count apart in metrics, e.g. meta.pile_set_name

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.paths) == (self.dataset is not None):
            raise ValueError(f"source {self.name!r}: needs either paths or dataset")
        if self.dataset is None and self.input_ids_key is not None:
            raise ValueError(f"source {self.name!r}: input_ids_key is for a dataset; shards hold texts")
        return self


class RemoteCache(Config):
    """A local copy of what was read of remote shards, to be read again without the network."""

    dir: Path  # on a local disk; shared by all processes of a node, and by runs
    max_bytes: int = Field(ge=16 * MIB)  # the most disk space that it may take; the least recently used blocks go first


class Decontamination(Config):
    """Which documents are kept out of the training because they share text with an evaluation suite."""

    suite: Path  # a folder or a YAML file, as in evaluation.suite
    splits: tuple[Name, ...] = Field(default=("val", "test"), min_length=1)  # of the suite
    # What has to match, ignoring case, forms of characters and kinds of quotes, dashes and white space: a whole line
    # without the white space at its ends, or min_tokens consecutive words anywhere
    match: Literal["paragraph", "ngram"] = "paragraph"
    # The fewest words of a paragraph, or the words of an n-gram. A Han or Kana character is a word
    min_tokens: int = Field(default=13, ge=1)


class WeightChange(Config):
    """New weights from a step on."""

    step: int = Field(ge=1)  # first optimizer step, counted from 0, that uses them
    weights: dict[str, float]  # source name -> weight; a source that is not named keeps its weight


class DataConfig(Config):
    """Everything that decides the content of batches, and how they are made."""

    # As in SourceConfig; every other key decides what a batch holds
    MAY_CHANGE: ClassVar = frozenset(
        {"tokenizer", "on_bad_record", "max_bad_records", "index_dir", "max_index_at_start", "max_decoder_window"}
        | {"remote_cache", "num_workers", "prefetch_bytes", "worker_timeout"}
        | {"decontaminate"}  # compared by what it drops
    )

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    tokenizer: Path  # a SentencePiece model
    seq_len: int = Field(ge=1)  # predicted tokens per row; a row holds seq_len + 1 tokens
    packing: Packing = "best_fit"
    # Streams of rows, fixed for a run's life; None = as many as divide a batch and have 64 MiB each, at most 1024
    lanes: int | None = Field(default=None, ge=1)
    # Version of the rules that decide the order of rows; None = the run's own, or the newest for a new run
    plan_version: Literal[1, 2] | None = None
    bos: bool = True  # begin each document with the tokenizer's BOS
    eos: bool = True  # end each document with the tokenizer's EOS
    weight_changes: tuple[WeightChange, ...] = ()  # in order of their steps

    on_bad_record: Literal["fail", "skip"] = "fail"  # a bad record is a line that is not a JSON object with a text
    # Records skipped on one rank before it fails; None = no limit
    max_bad_records: int | None = Field(default=None, ge=0)

    decontaminate: Decontamination | None = None  # None = no document is dropped for its content

    window_bytes: int | None = Field(default=None, ge=1)  # raw bytes; None = 512 * seq_len within 1..4 MiB
    index_dir: Path | None = None  # folder of indexes and manifests; None = beside the shards, or the user's cache
    max_index_at_start: int = Field(default=20 * 10**9, ge=0)  # raw bytes a training start may index by itself
    max_decoder_window: int = Field(
        default=DEFAULT_MAX_DECODER_WINDOW, ge=1024
    )  # bytes of zstd's decoder window; --long=31 needs 2 GiB

    remote_cache: RemoteCache | None = None  # cache of remote shards; None = what is read again is fetched again

    num_workers: int = Field(default=1, ge=0)  # processes that make windows; 0 = in the loading process
    prefetch_bytes: int = Field(default=128 * MIB, ge=0)  # raw bytes of windows made ahead of their use
    worker_timeout: float = Field(default=300.0, gt=0)  # seconds for one window, then its worker is replaced

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"sources: the name {name!r} stands twice; names must differ")
        of_ids = [source.name for source in self.sources if source.input_ids_key is not None]
        if self.decontaminate and of_ids:
            raise ValueError(f"decontaminate: source {of_ids[0]!r} holds token ids; it works on texts only")
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
        """The plan version that applies: a config that names none is of a new run, which follows the newest."""
        return self.plan_version or PLAN_VERSIONS[-1]

    @property
    def strict_records(self) -> bool:
        """True if a line is a record by its bytes alone (`records.json_lines`), as since the second plan version."""
        return self.plan >= 2

    def num_lanes(self, global_batch_size: int, raw_bytes: int) -> int:
        """Return V, the number of lanes; `raw_bytes` counts all sources that are drawn from."""
        if self.lanes:
            return self.lanes
        if self.plan == 1:
            return min(global_batch_size, _DEFAULT_MAX_LANES)
        most = min(max(1, raw_bytes // _LANE_BYTES), global_batch_size, _DEFAULT_MAX_LANES)
        return next(lanes for lanes in range(most, 0, -1) if global_batch_size % lanes == 0)

    def weight_stages(self) -> list[tuple[int, tuple[float, ...]]]:
        """Return (first step, weights in the order of the sources) of each stage, in the order of steps."""
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
        """Raw bytes between the record table's marks: no coarser than a window."""
        return min(MIB, self.window_limit)


def with_recorded_plan(written: Mapping[str, object]) -> dict[str, object]:
    """Return a data config that a run wrote down, with its plan version.

    Where it names none, the run was begun before there were plan versions, under the rules that are now the first.
    """
    return {"plan_version": PLAN_VERSIONS[0], **written}


def check_split(global_batch_size: int, dp_size: int, micro_batch_size: int = 1) -> None:
    """Check that a global batch can be split evenly over ranks, in whole micro-batches.

    Args:
        global_batch_size: rows of one step, over all ranks.
        dp_size: number of data-parallel ranks.
        micro_batch_size: rows of one forward pass.
    Raises: ConfigError that names values that would fit.
    """
    portion = dp_size * micro_batch_size
    if global_batch_size % portion == 0:
        return
    working = [n for n in range(1, global_batch_size + 1) if global_batch_size % (n * micro_batch_size) == 0]
    over = "over"
    if micro_batch_size > 1:
        over = f"into micro-batches of train.micro_batch_size={micro_batch_size} rows on"
    raise ConfigError(
        f"train.global_batch_size={global_batch_size} cannot be split {over} {dp_size} data-parallel ranks; make it a"
        f" multiple of {portion}, such as {multiples_near(global_batch_size, portion)}; with this batch, these numbers"
        f" of data-parallel ranks work: {listed(working)}"
    )


def _check_weights(weights: Mapping[str, float], where: str) -> None:
    if any(weight < 0 for weight in weights.values()):
        raise ValueError(f"{where}: weights must not be negative: {dict(weights)}")
    if not any(weights.values()):
        raise ValueError(f"{where}: all weights are 0; at least one must be positive")
