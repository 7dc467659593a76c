"""Documents that share text with a suite are dropped, all of them and no others, whoever reads them."""

from __future__ import annotations

import random
import re
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from shards import ConfigError, DataConfig, Loader, check_fingerprint, merge_states, read_documents
from shards.decontaminate import WORD, HashSet, Lines, ngrams
from shards.suite import find
from tests.shards.corpora import ROOT, SAMPLE, config, record, words, write_shard

EVAL = ROOT / "shards/sample/eval"


def paragraphs_of_suite(split: str) -> set[str]:
    """Paragraphs of at least 13 words, as strings."""
    lines = {line.strip() for document in find(EVAL, split).documents() for line in document.text.split("\n")}
    return {line for line in lines if len(WORD.findall(line)) >= 13}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[int]]:
    """A shard of the bundled sample with a held-out paragraph in every tenth document, and the lines of these."""
    chance = random.Random(5)
    held_out = sorted(paragraphs_of_suite("test"))
    lines, raw = set(), []
    for line, document in enumerate(islice(read_documents(SAMPLE / "pile-00.jsonl.zst"), 400), start=1):
        text = document.text
        if line % 10 == 0:
            cuts = [0, *(m.end() for m in re.finditer("\n", text)), len(text)]
            place = chance.choice(cuts)
            margin = chance.choice(["", " ", "\t ", " " * 99])
            text = f"{text[:place]}\n{margin}{chance.choice(held_out)}{margin}\r\n{text[place:]}"
            lines.add(line)
        raw.append(record(text))
    folder = tmp_path_factory.mktemp("planted")
    return write_shard(folder / "train.jsonl.zst", b"".join(raw)), lines


def data_config(shard: Path, folder: Path, **changes: object) -> DataConfig:
    sources = [{"name": "train", "paths": [str(shard)], "max_epochs": 1}]
    values: dict[str, object] = {"window_bytes": 1 << 15, "seq_len": 64, "lanes": 2, "index_dir": folder / "index"}
    return config(sources, **(values | {"decontaminate": {"suite": EVAL}} | changes))


def test_all_planted_overlaps_are_found_and_no_other_document_is_dropped(
    planted: tuple[Path, set[int]], tmp_path: Path
) -> None:
    shard, lines = planted
    forbidden = paragraphs_of_suite("val") | paragraphs_of_suite("test")
    expected, kept = set(), 0
    for document in read_documents(shard):
        if any(line.strip() in forbidden for line in document.text.split("\n")):
            expected.add(document.line)
        else:
            kept += 1
    assert lines <= expected
    found: list[int] = []
    kept_lines = set()
    with Loader(data_config(shard, tmp_path, num_workers=1), 8) as loader:
        for batch in loader:
            found += [item.line for item in batch.contaminated]
            assert {item.source for item in batch.contaminated} <= {"train"}
            assert all("shares a paragraph" in item.reason for item in batch.contaminated)
            assert not batch.skipped, "what is dropped is no bad record"
            assert batch.skipped_so_far == 0
            kept_lines |= {origin.line for origin in batch.origins()}
    # The last batch that cannot be filled is not given out, so a few documents are never reached
    assert len(set(found)) == len(found), "each once"
    assert set(found) <= expected
    assert len(expected - set(found)) <= 8
    assert not kept_lines & expected
    assert len(kept_lines) > 0.9 * kept


def test_the_ranks_together_and_a_resumed_loader_drop_the_same(planted: tuple[Path, set[int]], tmp_path: Path) -> None:
    data = data_config(planted[0], tmp_path)
    with Loader(data, 256) as loader:
        whole = [(batch.row_hash, [item.line for item in batch.contaminated]) for batch in islice(loader, 12)]
    assert sum(len(lines) for _, lines in whole) > 10
    states = []
    shares: list[list[tuple[int, list[int]]]] = []
    for rank in range(2):
        with Loader(data, 256, dp_rank=rank, dp_size=2) as loader:
            shares.append([(b.row_hash, [item.line for item in b.contaminated]) for b in islice(loader, 5)])
            states.append(loader.state_dict())
    for (row_hash, lines), *parts in zip(whole, *shares, strict=False):
        assert sum(part[0] for part in parts) % 2**64 == row_hash
        assert sorted(line for part in parts for line in part[1]) == sorted(lines)
    with Loader(data, 256) as loader:
        loader.load_state_dict(merge_states(states))
        after = [(batch.row_hash, [item.line for item in batch.contaminated]) for batch in islice(loader, 7)]
    assert after == whole[5:]


def test_ngrams_are_those_that_a_plain_search_finds() -> None:
    texts = [
        "The quick, brown FOX-jumps over\nthe lazy dog. Zwölf Boxkämpfer",
        "",
        "one two three",
        "é" * 9 + " a b c d e",
    ]
    texts += [words(seed, 400) for seed in range(3)] + ["no separators" * 40_000]

    def plain(text: str, n: int) -> list[tuple[str, ...]]:
        found = re.findall(r"[a-z0-9\u0080-\U0010ffff]+", "".join(c.lower() if c.isascii() else c for c in text))
        return [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]

    for n in (1, 3, 13):
        hashes, owners = ngrams(texts, n)
        expected = [gram for text in texts for gram in plain(text, n)]
        assert owners.tolist() == [i for i, text in enumerate(texts) for _ in plain(text, n)]
        of: dict[tuple[str, ...], int] = {}
        assert [
            of.setdefault(gram, value) for gram, value in zip(expected, hashes.tolist(), strict=True)
        ] == hashes.tolist()
        assert len(set(of.values())) == len(of)


def test_with_ngrams_a_quotation_inside_a_paragraph_is_found(tmp_path: Path) -> None:
    quoted = " ".join(sorted(paragraphs_of_suite("test"), key=len)[-1].split()[3:30])
    texts = [f"He said: {quoted.upper()}, and left.", f"He said: {' '.join(reversed(quoted.split()))}.", "x" * 999]
    shard = write_shard(tmp_path / "t.jsonl", b"".join(record(text + words(i, 99)) for i, text in enumerate(texts)))
    for match, expected in (("ngram", [1]), ("paragraph", [])):
        rule = {"suite": EVAL, "match": match}
        data = data_config(shard, tmp_path, decontaminate=rule, lanes=1, seq_len=8)
        with Loader(data, 2) as loader:
            assert [item.line for item in next(loader).contaminated] == expected, match


@pytest.mark.parametrize("size", [0, 1, 5000])
def test_a_set_of_hashes_holds_what_was_put_in(tmp_path: Path, size: int) -> None:
    generator = np.random.default_rng(size)
    inside = generator.integers(0, 2**64, size, np.uint64)
    others = generator.integers(0, 2**64, 20_000, np.uint64)
    twice = np.concatenate([inside, inside[: size // 2]])
    HashSet.write(tmp_path / "set.npy", twice, twice // np.uint64(3))
    found = HashSet(tmp_path / "set.npy")
    assert len(found) == size
    assert found.contains(inside).all()
    assert not found.contains(others).any()
    assert found.contains(np.zeros(0, np.uint64)).shape == (0,)
    assert found.candidates(inside // np.uint64(3)).tolist() == list(range(size))
    assert len(found.candidates(others // np.uint64(3))) < len(others) / 8


def test_a_paragraph_is_what_stands_between_line_feeds_without_its_margins() -> None:
    spaces = " " * 300
    texts = ["  first line here \r\nshort\nsecond\u2028line here\n\n", f"first line here\t{spaces}", "", spaces, "\n\n"]
    lines = Lines.of([*texts, f"\t{spaces}first line here"], 10)
    assert lines.owners.tolist() == [0, 0, 1, 5]
    found = [lines.data[a:b].decode() for a, b in zip(lines.starts, lines.ends, strict=True)]
    assert found == ["first line here", "second\u2028line here", "first line here", "first line here"]
    for numbers in (lines.hashes(np.arange(4)), lines.signatures()):
        assert numbers[0] == numbers[2] == numbers[3] != numbers[1]
    assert not len(Lines.of([], 10).signatures())


def test_another_filter_is_another_run(planted: tuple[Path, set[int]], tmp_path: Path) -> None:
    prints = []
    for rule in (None, {"suite": EVAL}, {"suite": EVAL, "min_tokens": 20}, {"suite": EVAL, "splits": ["val"]}):
        with Loader(data_config(planted[0], tmp_path, decontaminate=rule), 8) as loader:
            prints.append(loader.fingerprint)
    check_fingerprint(prints[1], prints[1])
    for other in (prints[0], *prints[2:]):
        with pytest.raises(ConfigError, match=r"data\.decontaminate"):
            check_fingerprint(prints[1], other)
    before = {key: value for key, value in prints[0].items() if key != "decontaminate"}
    check_fingerprint(before, prints[0])  # a run that was begun before there was such a key


def test_bad_rules_are_named(planted: tuple[Path, set[int]], tmp_path: Path) -> None:
    for rule, message in (
        ({"suite": tmp_path / "nowhere"}, r"data\.decontaminate\.suite=.*nowhere is no folder"),
        ({"suite": EVAL, "splits": ["dev"]}, "no split 'dev'"),
        ({"suite": EVAL, "min_tokens": 10**6}, "no paragraph of 1000000 words in it"),
    ):
        with pytest.raises(ConfigError, match=message):
            Loader(data_config(planted[0], tmp_path, decontaminate=rule), 8)
    source = {"name": "ids", "dataset": "x", "input_ids_key": "ids"}
    with pytest.raises(ValidationError, match="'ids' holds token ids"):
        config([source], decontaminate={"suite": EVAL})
