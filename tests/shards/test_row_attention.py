"""Where tokens attend to the whole row, it is one piece, and the same tokens are learned as where they do not."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from shards import Batch, ConfigError, Loader, check_fingerprint
from tests.shards.corpora import config, record, words, write_shard


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_shard(folder / "texts.jsonl", b"".join(record(words(i, 3 + i % 40)) for i in range(200)))
    return folder


def loader(corpus: Path, **changes: object) -> Loader:
    sources = [{"name": "texts", "paths": [str(corpus / "texts.jsonl")], "max_epochs": 1}]
    return Loader(config(sources, seq_len=64, **changes), 4, seed=3)


def batches(corpus: Path, **changes: object) -> list[Batch]:
    with loader(corpus, **changes) as opened:
        return list(opened)


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_a_row_is_one_piece_with_the_targets_of_its_documents(corpus: Path, packing: str) -> None:
    apart, joined = (batches(corpus, packing=packing, attention=attention) for attention in ("document", "row"))
    assert any(batch.segment_ids.max() > 2 for batch in apart)
    for one, other in zip(apart, joined, strict=True):
        assert np.array_equal(one.tokens, other.tokens)
        assert np.array_equal(one.is_target, other.is_target)
        assert one.n_targets == other.n_targets
        assert np.array_equal(np.abs(other.segment_ids), (one.segment_ids > 0).astype(np.int32))
        assert other.squared_lengths == sum(int(n) ** 2 for n in (one.segment_ids > 0).sum(1))
        assert one.row_hash != other.row_hash
        assert one.source_tokens == other.source_tokens


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_a_token_knows_its_piece_whatever_attends_to_it(corpus: Path, packing: str) -> None:
    apart, joined = (batches(corpus, packing=packing, attention=attention) for attention in ("document", "row"))
    for one, other in zip(apart, joined, strict=True):
        assert np.array_equal(one.pieces, np.abs(one.segment_ids))
        assert np.array_equal(other.pieces, one.pieces)


def test_nothing_attends_to_a_forgotten_document(corpus: Path, tmp_path: Path) -> None:
    listed = tmp_path / "forget.jsonl"
    lines = [f'{{"shard": "{corpus / "texts.jsonl"}", "line": {line}}}\n' for line in range(5, 200, 7)]
    listed.write_text("".join(lines))
    split = 0
    for apart, batch in zip(
        *(batches(corpus, attention=one, forget=listed) for one in ("document", "row")), strict=True
    ):
        assert np.array_equal(batch.pieces, apart.pieces)
        assert np.array_equal(batch.pieces, np.abs(apart.segment_ids))
        for ids, tokens in zip(np.abs(batch.segment_ids), batch.tokens, strict=True):
            assert not tokens[ids == 0].any()
            inside = np.flatnonzero(ids)
            split += len(inside) > 0 and not ids[inside[0] : inside[-1]].all()
        for each in (apart, batch):  # the model computes each stretch of equal numbers by itself
            stretches = [groupby(ids) for ids in np.abs(each.segment_ids).tolist()]
            lengths = [len(list(same)) for of_row in stretches for number, same in of_row if number]
            assert each.squared_lengths == sum(length**2 for length in lengths)
    assert split, "no row had a forgotten document between others"


def test_a_begun_run_keeps_what_it_attends_to(corpus: Path) -> None:
    with loader(corpus) as old, loader(corpus, attention="row") as new:
        assert "attention" not in old.fingerprint["config"]  # as in runs from before the key existed
        with pytest.raises(ConfigError, match="data.attention"):
            check_fingerprint(old.fingerprint, new.fingerprint)
