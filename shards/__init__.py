"""Headrace's streaming loader: raw Pile and Dolma shards -> batches that depend on data, config, seed, step only."""

from __future__ import annotations

from shards.batch import Batch, Origin, Skipped
from shards.config import DataConfig, MaxOverflow, OverflowTolerance, SourceConfig, WeightChange
from shards.config_base import Config
from shards.errors import CheckpointError, ConfigError, HeadraceError, ShardError
from shards.fingerprint import check_fingerprint
from shards.forecast import Forecast
from shards.index.random_access import document, open_at
from shards.loader import Loader
from shards.plan.cursor import LoaderState, merge_states
from shards.preparation import Prepared, prepare
from shards.provenance import batch_after
from shards.records.json_lines import Document
from shards.records.texts import read_documents
from shards.stages import Stage, StageData, stage_after
from shards.tokenize.tokenizer import Tokenizer
from shards.windows.packing import Rows

__all__ = [
    "Batch",
    "CheckpointError",
    "Config",
    "ConfigError",
    "DataConfig",
    "Document",
    "Forecast",
    "HeadraceError",
    "Loader",
    "LoaderState",
    "MaxOverflow",
    "Origin",
    "OverflowTolerance",
    "Prepared",
    "Rows",
    "ShardError",
    "Skipped",
    "SourceConfig",
    "Stage",
    "StageData",
    "Tokenizer",
    "WeightChange",
    "__version__",
    "batch_after",
    "check_fingerprint",
    "document",
    "merge_states",
    "open_at",
    "prepare",
    "read_documents",
    "stage_after",
]

__version__ = "0.1.0"
