"""HF data sets as sources: the Arrow files of a local or hub data set. The only importer of `datasets`.

config -> hf_datasets -> preparation. From then on the files' columns are read (arrow.py), by row number, in any
process.
"""

from __future__ import annotations

from pathlib import Path

from shards.config import SourceConfig
from shards.errors import ShardError
from shards.records import arrow
from shards.storage import files

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}
_SAVED = ("state.json", "dataset_dict.json")  # files that `save_to_disk` leaves in a folder


def shards_of(source: SourceConfig) -> list[str]:
    """List the columns that hold a data set's documents, one per file, in order; make its Arrow files if need be.

    Raises: ShardError if it cannot be loaded, has no such split or column, or is only part of its files.
    """
    assert source.dataset is not None
    import datasets  # takes seconds, which runs without data sets and workers should not pay

    where = f"source {source.name!r}: data set {source.dataset!r}"
    try:
        data = _load(datasets, source.dataset, source)
    except Exception as error:  # each builder and the hub's client raise errors of their own
        advice = "without network, name a local file or folder, or load it once where there is one"
        if isinstance(error, datasets.exceptions.DatasetGenerationError):
            advice = (
                "if its files differ in their keys or in the types of their values, they make no data set: read JSON "
                "lines or Parquet with paths: instead, or make each kind of file a source of its own"
            )
        raise ShardError(f"{where}, split {source.split!r}: cannot be loaded: {_reason(error)}; {advice}") from None
    arrow_files = [str(part["filename"]) for part in data.cache_files]
    schema = data.features.arrow_schema
    if arrow.type_of(schema, source.column) is None:
        key, names = "input_ids_key" if source.input_ids_key else "text_key", ", ".join(arrow.column_names(schema))
        raise ShardError(f"{where}: has no column {source.column!r} ({key}); its columns are {names}")
    if sum(arrow.num_rows(file) for file in arrow_files) != len(data):
        raise ShardError(
            f"{where}: split {source.split!r} covers only part of its files; name whole splits, e.g. train+test"
        )
    shards = [files.column_path(file, source.column) for file in arrow_files]
    for shard, file in zip(shards, arrow_files, strict=True):
        arrow.check_column(arrow.table(file).schema, shard, source)
    return shards


def _reason(error: BaseException) -> str:
    """Describe the root cause of an error, which `datasets` wraps in one that says only that something failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def _load(datasets, name: str, source: SourceConfig):  # type: ignore[no-untyped-def]  # the library has no types
    """Load a `datasets.Dataset` over Arrow files."""
    path = Path(name).expanduser()
    if any((path / mark).exists() for mark in _SAVED):
        data = datasets.load_from_disk(str(path))
        splits = data if isinstance(data, datasets.DatasetDict) else {str(data.split or source.split): data}
        if source.split not in splits:
            raise ValueError(f"its splits are {', '.join(splits)}")
        return splits[source.split]
    if path.is_file():
        if path.suffix not in _BUILDERS:
            raise ValueError(f"a file's name must end in one of {', '.join(_BUILDERS)}")
        return datasets.load_dataset(_BUILDERS[path.suffix], data_files={"train": str(path)}, split=source.split)
    return datasets.load_dataset(
        str(path) if path.exists() else name, source.dataset_config, split=source.split, revision=source.revision
    )
