"""A shard's records, checked against its index. decoders, parquet_rows, arrow_rows -> reader -> text_index, search."""

from __future__ import annotations

from shards.config import DataConfig, SourceConfig
from shards.index.decoders import Decoders
from shards.index.manifest import Shard
from shards.index.parquet_rows import ParquetRows
from shards.records.arrow_rows import Columns
from shards.records.json_lines import Records, parser_for
from shards.storage import files
from shards.storage.block_cache import open_cache


class ShardReader:
    """An open shard."""

    def __init__(self, data: DataConfig, source: SourceConfig, shard: Shard) -> None:
        cache = open_cache(data.remote_cache)
        self._shard, self._source = shard, source
        self._table = shard.index.table()
        self._parser = parser_for(source, data.strict_records)
        self._decoders = Decoders(data.max_decoder_window, cache, data.index_dir, data.cell_bytes)
        self._columns, self._parquet = Columns(), ParquetRows(cache)

    def read(self, first_cell: int, stop_cell: int) -> Records:
        """Read the records of consecutive cells. Raises: ShardError if they are not what was indexed."""
        (first, start), (last, stop) = self._table[[first_cell, stop_cell]].tolist()
        path, index = self._shard.path, self._shard.index
        if files.is_parquet(path):
            rows = (first, last - first)
            return self._parquet.records(index.raw_range(path, start, stop), rows, rows, self._source)
        if files.is_column(path):
            return self._columns.records(path, index.stat, first, last - first, self._source, index.content_hash)
        return self._parser.parse(self._decoders.read(index.raw_range(path, start, stop)), first + 1)

    def close(self) -> None:
        """Close the shard."""
        self._decoders.close()
        self._columns.close()
        self._parquet.close()
