"""What is said of a run's data equals what reading and tokenizing it document by document gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pretrain.commands import dispatch
from pretrain.commands.data_report import histogram
from shards import DataConfig, MaxOverflow, OverflowTolerance, SourceConfig, Tokenizer, prepare, read_documents
from shards.description import SourceDescription, describe

SAMPLE = Path(__file__).resolve().parents[2] / "shards/sample"
SEQ_LEN = 128
TOLERANCE = 20


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    paths = sorted((SAMPLE / "train").glob("dolma-*"))
    config = DataConfig.model_validate(
        {
            "tokenizer": SAMPLE / "tokenizer-4k.model",
            "seq_len": SEQ_LEN,
            "window_bytes": 1 << 16,
            "index_dir": tmp_path_factory.mktemp("index"),
            "packing": {"overflow_tolerance": TOLERANCE},
            "sources": [{"name": path.name, "paths": [str(path)], "weight": i + 1} for i, path in enumerate(paths[:2])],
        }
    )
    prepare(config)
    return config


def test_a_whole_corpus_is_counted(config: DataConfig) -> None:
    found = describe(config, 1 << 30)
    tokenizer = Tokenizer.of(config)
    lengths = []
    for source, described in zip(config.sources, found.sources, strict=True):
        texts = [document.text for document in read_documents(Path(source.paths[0]))]
        of_source = [len(tokenizer.encode_document(text)) for text in texts]
        assert sorted(described.lengths.tolist()) == sorted(of_source)
        assert (described.tokens, described.num_documents) == (sum(of_source), len(texts))
        assert (described.is_sample, described.num_skipped) == (False, 0)
        lengths += of_source
    packings = {each.name: each for each in found.packings}
    beyond = [length - SEQ_LEN - 1 for length in lengths]
    assert packings["pad"].rows == sum(-(-(length - 1) // SEQ_LEN) for length in lengths)
    assert packings["truncate"].rows == len(lengths)
    assert packings["truncate"].dropped == pytest.approx(sum(over for over in beyond if over > 0) / sum(lengths))
    assert packings["best_fit"].rows < packings["pad"].rows
    assert (packings["best_fit"].cut, packings["best_fit"].dropped) == (0, 0)
    assert packings["concat"].cut > 0
    assert isinstance(config.packing, OverflowTolerance)
    short = sum(left for over in beyond if over > 0 and 0 < (left := over % SEQ_LEN) < TOLERANCE)
    assert packings[f"overflow_tolerance: {TOLERANCE}"].dropped == pytest.approx(short / sum(lengths))


def test_documents_that_are_dropped_for_their_length_count_as_dropped(config: DataConfig) -> None:
    most = 300
    found = describe(config.model_copy(update={"packing": MaxOverflow(max_overflow=most)}), 1 << 30)
    lengths = np.concatenate([source.lengths for source in found.sources])
    kept = lengths[lengths <= SEQ_LEN + 1 + most]
    described = next(each for each in found.packings if each.name == f"max_overflow: {most}")
    assert described.rows == sum(-(-(length - 1) // SEQ_LEN) for length in kept.tolist())
    assert described.dropped == pytest.approx(1 - kept.sum() / lengths.sum())
    assert 0 < len(kept) < len(lengths)


def test_only_what_a_source_keeps_is_described(config: DataConfig) -> None:
    (paths,) = (config.sources[0].paths,)
    texts = [document.text for document in read_documents(Path(paths[0]))]
    tokenizer, first, end = Tokenizer.of(config), 100, len(texts) - 100

    def of(**part: object) -> SourceDescription:
        source = SourceConfig.model_validate({"name": "a", "paths": paths, **part})
        (found,) = describe(config.model_copy(update={"sources": (source,)}), 1 << 30).sources
        return found

    taken, low, high = of(take=[first, end]), of(hash_range=[0, 0.4]), of(hash_range=[0.4, 1])
    expected = [len(tokenizer.encode_document(text)) for text in texts]
    assert sorted(taken.lengths.tolist()) == sorted(expected[first:end])
    assert (taken.num_documents, taken.tokens) == (end - first, sum(expected[first:end]))
    assert taken.raw_bytes < of().raw_bytes
    assert sorted([*low.lengths.tolist(), *high.lengths.tolist()]) == sorted(expected)
    assert low.num_documents + high.num_documents == len(texts)
    long = of(min_tokens=200)
    assert sorted(long.lengths.tolist()) == sorted(length for length in expected if length >= 200)
    assert sorted(long.left_out.tolist()) == sorted(length for length in expected if length < 200)
    assert long.num_documents == len(long.lengths) < len(texts)
    assert 0.3 * len(texts) < low.num_documents < 0.5 * len(texts)


def test_a_sample_is_bounded_and_spread(config: DataConfig) -> None:
    whole, sample = describe(config, 1 << 30), describe(config, 400_000)
    for of_all, part in zip(whole.sources, sample.sources, strict=True):
        assert part.is_sample
        assert part.read_bytes < 200_000 + config.window_limit
        assert part.num_documents == of_all.num_documents
        assert part.tokens == pytest.approx(of_all.tokens, rel=0.3)
    again = describe(config, 400_000)
    assert all(np.array_equal(a.lengths, b.lengths) for a, b in zip(sample.sources, again.sources, strict=True))


def test_lengths_are_counted_between_powers_of_two() -> None:
    bounds, documents, tokens = histogram(np.array([2, 3, 4, 7, 31]))
    assert bounds.tolist() == [2, 4, 8, 16, 32]
    assert documents.tolist() == [2, 2, 0, 1]
    assert tokens.tolist() == [5, 11, 0, 31]


def test_the_command_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "configs/quickstart.yaml", f"data.index_dir={tmp_path}", "--describe"]
    assert dispatch.run("index", [*words, "--describe-bytes", "1e5", "--png", str(tmp_path / "lengths.png")]) == 0
    shown = capsys.readouterr().out
    for part in ("pile", "dolma", "~", "best_fit", "Of pile, dolma, a sample was read"):
        assert part in shown
    assert (tmp_path / "lengths.png").stat().st_size > 10_000
    assert dispatch.run("index", [str(SAMPLE / "train" / "pile-*"), "--describe"]) == 2
    assert "--describe needs --config" in capsys.readouterr().err
