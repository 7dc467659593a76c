"""A window -> its rows: read, tokenize, shuffle, pack. Pure, so any process may make any window.

decoders, reader -> window -> worker, pool.
"""

from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from shards import arrow
from shards.cache import BlockCache
from shards.columns import Columns
from shards.config import DataConfig
from shards.decoders import Decoders, RawRange
from shards.decontaminate import Decontaminator
from shards.errors import ShardError
from shards.packing import Rows, pack
from shards.plan import Ints
from shards.reader import BadRecord, RecordParser, Records, bad_record_error
from shards.recipe import Recipe
from shards.tokenizer import Tokenizer


class WindowTask(msgspec.Struct, frozen=True):
    """What there is to know to make a window."""

    source: int  # number in the config
    raw: RawRange
    first_record: int  # number in the shard, counted from 0
    num_records: int  # blank and bad ones counted
    key: int  # of the order of its documents and rows


class Window(NamedTuple):
    """The rows of a window and where their pieces come from."""

    rows: Rows
    lines: Ints  # [documents]: line of each in the shard, counted from 1
    sub_sources: tuple[str, ...]  # names that the documents give themselves
    sub_source_of: npt.NDArray[np.int32]  # [documents]: position in sub_sources; -1 = none
    skipped: tuple[BadRecord, ...]
    token_offsets: Ints  # [rows + 1]: where each row's tokens begin
    replays: int = 0  # entries that did not hold when it was read, so that decoding began before them


class WindowMaker:
    """Makes windows of the sources of one config, with a tokenizer and open decoders of its own."""

    def __init__(self, config: DataConfig, recipe: Recipe) -> None:
        """Raises: ConfigError if the files of tokenizer or filter are not there, or not those of the recipe."""
        self._config = config
        self._tokenizer = Tokenizer(config.tokenizer, config.bos, config.eos)
        recipe.check_tokenizer(config.tokenizer, self._tokenizer)
        self._decoders = Decoders(config.max_decoder_window, BlockCache.of(config.remote_cache), config.index_dir)
        self._columns = Columns()
        self._decontaminator = None
        if config.decontaminate and recipe.filter_file:
            self._decontaminator = Decontaminator(config.decontaminate, Path(recipe.filter_file))
            recipe.check_filter(self._decontaminator)
        self._parsers = [RecordParser.of(source) for source in config.sources]

    def make(self, task: WindowTask) -> Window:
        """The rows of a window. Raises: as `read`."""
        replays = self._decoders.replays
        records = self._kept(self.read(task))
        if records.token_ids is None:
            tokens, lengths = self._tokenizer.encode_documents(records.texts)
        else:
            tokens, lengths = self._join(records.token_ids, records.lines, task.raw.path)
        rows = pack(tokens, lengths, self._config.seq_len, self._config.packing, task.key)
        names = sorted({name for name in records.sub_sources if name is not None})
        number_of = {name: number for number, name in enumerate(names)}
        return Window(
            rows=rows,
            lines=np.array(records.lines, np.int64),
            sub_sources=tuple(names),
            sub_source_of=np.array([-1 if name is None else number_of[name] for name in records.sub_sources], np.int32),
            skipped=tuple(records.bad),
            token_offsets=rows.token_offsets(),
            replays=self._decoders.replays - replays,
        )

    def _kept(self, records: Records) -> Records:
        """The records without those that share text with the evaluation suite, which go to the bad ones."""
        if self._decontaminator is None:
            return records
        flags = self._decontaminator.shares_text(records.texts).tolist()
        dropped = [
            BadRecord(line, self._decontaminator.reason, contaminated=True)
            for line, flag in zip(records.lines, flags, strict=True)
            if flag
        ]
        kept = [i for i, flag in enumerate(flags) if not flag]
        return Records(
            texts=[records.texts[i] for i in kept],
            lines=[records.lines[i] for i in kept],
            sub_sources=[records.sub_sources[i] for i in kept],
            ids=[records.ids[i] for i in kept],
            bad=[*records.bad, *dropped],
        )

    def read(self, task: WindowTask) -> Records:
        """The records of a window.

        Raises: ShardError if the shard changed or is damaged, or holds a bad record that may not be skipped.
        """
        records = self._rows(task) if arrow.is_column(task.raw.path) else self._lines(task)
        if records.bad and self._config.on_bad_record == "fail":
            raise bad_record_error(task.raw.path, records.bad[0])
        return records

    def _rows(self, task: WindowTask) -> Records:
        """The records of a window of a column."""
        source = self._config.sources[task.source]
        return self._columns.records(task.raw.path, task.raw.stat, task.first_record, task.num_records, source)

    def _lines(self, task: WindowTask) -> Records:
        """The records of a window of JSON lines."""
        raw = self._decoders.read(task.raw)
        num_records = raw.count(b"\n") + (not raw.endswith(b"\n"))
        if num_records != task.num_records:
            raw_range = f"raw bytes {task.raw.start} to {task.raw.stop}"
            raise ShardError(
                f"{task.raw.path}: {raw_range} hold {num_records} lines, its index says {task.num_records}; it changed "
                "after it was indexed: put the old file back, or start a new run"
            )
        return self._parsers[task.source].parse(raw, task.first_record + 1)

    def _join(self, token_ids: list[Ints], lines: list[int], path: str) -> tuple[npt.NDArray[np.integer], Ints]:
        """(ids, lengths) as `Tokenizer.encode_documents` gives them. Raises: ShardError for one that is no piece's."""
        lengths = np.array([len(ids) for ids in token_ids], np.int64)
        tokens = np.concatenate([np.zeros(0, np.int64), *token_ids])
        wrong = np.flatnonzero((tokens < 0) | (tokens >= self._tokenizer.vocab_size))
        if len(wrong):
            document = int(np.searchsorted(np.cumsum(lengths), wrong[0], side="right"))
            raise ShardError(
                f"{path}, line {lines[document]}: token id {tokens[wrong[0]]}, but data.tokenizer has "
                f"{self._tokenizer.vocab_size} pieces; name the tokenizer that the ids were made with"
            )
        return tokens.astype(self._tokenizer.dtype), lengths

    def close(self) -> None:
        """Closes open shards."""
        self._decoders.close()
        self._columns.close()
