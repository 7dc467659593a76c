"""What a step was trained on, made again from a saved state; a document by its line.

loader, shard_index -> provenance.
"""

from collections.abc import Mapping

from shards.batch import Batch
from shards.config import DataConfig, SourceConfig
from shards.errors import CheckpointError, ShardError
from shards.fingerprint import check_fingerprint
from shards.index.random_access import document
from shards.index.shard_index import obtain
from shards.loader import Loader
from shards.records.arrow_rows import Columns
from shards.records.json_lines import Document
from shards.storage import files
from shards.storage.block_cache import BlockCache
from shards.tokenize.tokenizer import Tokenizer


def batch_after(
    config: DataConfig,
    global_batch_size: int,
    seed: int,
    state: Mapping[str, object] | None,
    batches: int,
    fingerprint: Mapping[str, object] | None = None,
) -> Batch:
    """A whole global batch, as the ranks of a run had it between them; `origins()` says where its pieces come from.

    Args:
        config, global_batch_size, seed: of the run.
        state: all lanes' cursors, saved at or before that batch; None = the run's start.
        batches: global batches between the state and the one asked for.
        fingerprint: of the run's loader, where it is known: what differs now is named.
    Raises: ConfigError or ShardError if the data is not what it was; CheckpointError if the state is of another run, or
    the run ends before that batch.
    """
    config = config.model_copy(update={"max_bad_records": None})  # looking back must not fail on their number
    with Loader(config, global_batch_size, seed) as loader:
        if fingerprint is not None:
            check_fingerprint(fingerprint, loader.fingerprint)
        if state is not None:
            loader.load_state_dict(state)
        for number, batch in enumerate(loader):
            if number == batches:
                return batch
    raise CheckpointError(f"the run's data ends less than {batches + 1} batches after the state")


def document_at(config: DataConfig, source: SourceConfig, path: str, line: int) -> Document:
    """One document of a shard, by its line, read from the nearest entry.

    Args:
        line: of the record in the unpacked shard, counted from 1.
    Raises: ShardError if there is no such line, or no document in it.
    """
    if not files.is_column(path):
        cache = BlockCache.of(config.remote_cache)
        strict = config.strict_records
        return document(path, line, source, config.index_dir, config.max_decoder_window, cache, strict)
    index = obtain(path, config.index_dir, config.cell_bytes, config.max_decoder_window)
    if not 1 <= line <= index.num_records:
        raise ShardError(f"{path}: has no line {line}; its lines are 1 to {index.num_records}")
    records = Columns().records(path, index.stat, line - 1, 1, source, index.content_hash)
    if not records.lines:
        raise ShardError(f"{path}, line {line}: {records.bad[0].reason if records.bad else 'blank'}")
    text = records.texts[0]
    if records.token_ids is not None:
        text = Tokenizer(config.tokenizer, config.bos, config.eos).decode(records.token_ids[0])
    return Document(text, records.sub_sources[0] or source.name, path, line, records.ids[0])
