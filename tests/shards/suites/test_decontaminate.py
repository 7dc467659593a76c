# ruff: noqa: RUF001 - look-alike scripts are the point here
"""Documents that share text with a suite are dropped, all of them and no others, whoever reads them."""

from __future__ import annotations

import random
import re
import unicodedata
from itertools import islice
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shards import ConfigError, DataConfig, Loader, check_fingerprint, merge_states, prepare, read_documents
from shards.config import Decontamination
from shards.suites import decontaminate, suite
from shards.suites import normalization as comparing
from shards.suites.decontaminate import HashSet, ngrams, obtain, split_lines
from shards.suites.normalization import comparable
from shards.suites.suite import find
from tests.examples import examples
from tests.shards.corpora import ROOT, SAMPLE, config, record, words, write_shard

EVAL = ROOT / "shards/sample/eval"


HAN_AND_KANA = "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U000323af"


def plain_words(text: str) -> list[str]:
    """Split a text into words as the docs define them, by a regular expression."""
    marked = "".join("_" if unicodedata.category(c)[0] == "M" else " " if c == "_" else c for c in text)
    places = [m.span() for m in re.finditer(rf"(?=[{HAN_AND_KANA}])\w|[^\W{HAN_AND_KANA}]+", marked)]
    return [text[a:b] for a, b in places]


def plain_lines(text: str) -> list[str]:
    """Split a text into lines as the docs define them: at all of Python's line ends, folded, stripped."""
    plain = str.maketrans("‘’“”–—−‐", "''\"\"----")
    return [unicodedata.normalize("NFKC", line.casefold()).translate(plain).strip() for line in text.splitlines()]


def paragraphs_of_suite(split: str) -> set[str]:
    """Return the suite's paragraphs of at least 13 words, as strings."""
    lines = {line for document in find(EVAL, split).documents() for line in plain_lines(document.text)}
    return {line for line in lines if len(plain_words(line)) >= 13}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[int]]:
    """Write a shard of the bundled sample with a held-out paragraph in every tenth document; return those lines too."""
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


@pytest.mark.distributed
def test_all_planted_overlaps_are_found_and_no_other_document_is_dropped(
    planted: tuple[Path, set[int]], tmp_path: Path
) -> None:
    shard, lines = planted
    forbidden = paragraphs_of_suite("val") | paragraphs_of_suite("test")
    expected, kept = set(), 0
    for document in read_documents(shard):
        if any(line in forbidden for line in plain_lines(document.text)):
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
    # An incomplete last batch is not yielded, so a few documents are never reached
    assert len(set(found)) == len(found), "each once"
    assert set(found) <= expected
    assert len(expected - set(found)) <= 8
    assert not kept_lines & expected
    assert len(kept_lines) > 0.9 * kept


def test_any_number_of_ranks_and_a_resumed_loader_drop_the_same_documents(
    planted: tuple[Path, set[int]], tmp_path: Path
) -> None:
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


TEXTS = [
    "The quick, brown FOX-jumps over\nthe lazy dog. Zwölf Boxkämpfer",
    "",
    "one two_three 3.5",
    "é" * 9 + " a b c d e",
    "人工智能是IT的一个分支，ラーメン「カタカナ」 한국어 문장 हिन्दी में 𠀀𠀁x",
    "no separators" * 40_000,
    "ab",
]


@pytest.mark.parametrize("block", [3, 50, 1 << 18])
def test_ngrams_equal_those_of_a_plain_search(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decontaminate, "BLOCK_CHARACTERS", block)
    monkeypatch.setattr(comparing, "BLOCK_CHARACTERS", block)
    decontaminate._powers.cache_clear()
    texts = comparable([*TEXTS, *(words(seed, 400) for seed in range(3))] if block > 50 else TEXTS[:5])

    def plain(text: str, n: int) -> list[tuple[str, ...]]:
        found = [word[i : i + block] for word in plain_words(text) for i in range(0, len(word), block)]
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
    monkeypatch.undo()
    decontaminate._powers.cache_clear()


QUOTE = (
    "He said \u201cthe quick brown fox jumps over the lazy dog\u201d \u2014 and left\u2026 Émile\u2019s town for good"
)
CHINESE = (
    "人工智能是计算机科学的一个分支，它企图了解智能的实质，并生产出一种新的能以人类智能相似的方式做出反应的智能机器"
)
SAME = [  # two spellings of the same text to a reader, and whether the whole line counts as equal, or only its words
    (QUOTE, QUOTE.replace("\u201c", '"').replace("\u201d", '"').replace("\u2019", "'"), True),
    (QUOTE, QUOTE.replace("\u2014", "-").replace("\u2026", "..."), True),
    (QUOTE, QUOTE.upper(), True),
    (QUOTE, unicodedata.normalize("NFD", QUOTE), True),
    (QUOTE, QUOTE.replace(" ", "\u00a0"), True),
    (QUOTE, QUOTE.replace("quick", "qu\u00adick").replace("fox", "f\u200bo\ufeffx"), True),
    (QUOTE, QUOTE.replace("fo", "\uff46\uff4f"), True),
    (QUOTE, QUOTE.replace("\u201c", "").replace("\u201d", ","), False),
    (QUOTE, QUOTE.replace(" ", "_"), False),
    (CHINESE, CHINESE, True),
    (CHINESE, CHINESE.replace("，", ","), True),
    (CHINESE, CHINESE.replace("，", " "), False),
    ("ΟΔΥΣΣΕΥΣ ΚΑΙ ΠΑΛΙΝ " * 6, "οδυσσευς και παλιν " * 6, True),
    ("Die Straße führt in den ﬁnsteren Wald, in dem die Räuber seit Jahren hausen sollen", None, True),
]


@pytest.mark.parametrize("match", ["paragraph", "ngram"])
def test_a_copy_is_found_however_it_is_spelled(match: str, tmp_path: Path) -> None:
    for number, (text, copy, same_line) in enumerate(SAME):
        suite = tmp_path / str(number)
        write_shard(suite / "val.jsonl", record(text))
        rule = Decontamination.model_validate({"suite": suite, "splits": ["val"], "match": match})
        found = obtain(rule, tmp_path)
        copy = text.replace("ß", "SS").replace("ﬁ", "FI") if copy is None else copy
        assert found.shares_text([text, copy]).tolist() == [True, same_line or match == "ngram"], (number, copy)
        inside = [f"other words {copy} and more of them", words(number, 50), "", copy[:12]]
        assert found.shares_text(inside).tolist() == [match == "ngram", False, False, False]


def test_lines_are_found_whatever_whitespace_ends_them_and_however_short(tmp_path: Path) -> None:
    write_shard(tmp_path / "val.jsonl", record("yes no\n一\nthe whole of a longer line here"))
    rule = Decontamination.model_validate({"suite": tmp_path, "splits": ["val"], "min_tokens": 1})
    found = obtain(rule, tmp_path)
    blanks = [chr(code) for code in range(0x3100) if chr(code).isspace()]
    assert len(blanks) > 25
    for line in ("yes no", "一", "the whole of a longer line here"):
        texts = [
            *(f"{blank}{line}{blank * 9}" for blank in blanks),
            *(f"x{end}{line}{end}y" for end in ("\n", "\r\n", "\r", "\v", "\f", "\x1c", "\x85", "\u2028", "\u2029")),
        ]
        assert found.shares_text(texts).all()
        assert not found.shares_text([f"x {line}", f"{line}x", line[:-1], "", "\n", " \n"]).any()
    assert not found.shares_text(["no", "yes", "二", "yes n\xf6", "yes no\xff"]).any()


@settings(max_examples=examples(200))
@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("éΣİßﬁ½…\u0301\u0345\u1161가\uffff"))
    )
)
def test_texts_are_folded_independently_of_their_neighbours_and_form(texts: list[str]) -> None:
    """Fold texts independently of their neighbours and form; the reference goes character by character."""
    once = comparable(texts)
    assert comparable(once) == once
    for form in ("NFC", "NFD"):
        assert comparable([unicodedata.normalize(form, text) for text in texts]) == once
    with mock.patch.object(comparing, "BLOCK_CHARACTERS", 2):
        assert comparable(texts) == once
    assert once == [comparing._fold(text.replace("\uffff", "")) for text in texts]


def test_other_ranks_are_given_the_filter_and_never_read_the_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_shard(tmp_path / "suite/val.jsonl", record(words(3, 30)))
    shard = write_shard(tmp_path / "a.jsonl", b"".join(record(words(i, 30)) for i in range(6)))
    rule = {"suite": tmp_path / "suite", "splits": ["val"]}
    data = config([{"name": "a", "paths": [str(shard)], "max_epochs": 1}], lanes=1, decontaminate=rule)
    prepared = prepare(data.model_copy(update={"index_dir": tmp_path / "index"}))

    def dropped_by(data: DataConfig) -> list[int]:
        with Loader(data, 1, prepared=prepared) as loader:
            return [found.line for batch in loader for found in batch.contaminated]

    reads: list[object] = []
    documents = suite.Suite.documents
    monkeypatch.setattr(suite.Suite, "documents", lambda found: reads.append(found) or documents(found))
    (tmp_path / "suite").rename(tmp_path / "elsewhere")
    assert dropped_by(data) == [4]
    # If the file is missing, as on a node that does not share the folder, the filter is made again
    assert prepared.filters[0] is not None
    Path(prepared.filters[0].path).unlink()
    (tmp_path / "elsewhere").rename(tmp_path / "suite")
    assert not reads
    other = data.model_copy(update={"index_dir": tmp_path / "other"})
    assert dropped_by(other) == [4]
    assert len(reads) == 1
    assert "set data.index_dir to a folder that all nodes share" in caplog.text


def test_ngrams_find_a_quotation_inside_a_paragraph(tmp_path: Path) -> None:
    quoted = " ".join(sorted(paragraphs_of_suite("test"), key=len)[-1].split()[3:30])
    texts = [f"He said: {quoted.upper()}, and left.", f"He said: {' '.join(reversed(quoted.split()))}.", "x" * 999]
    shard = write_shard(tmp_path / "t.jsonl", b"".join(record(text + words(i, 99)) for i, text in enumerate(texts)))
    for match, expected in (("ngram", [1]), ("paragraph", [])):
        rule = {"suite": EVAL, "match": match}
        data = data_config(shard, tmp_path, decontaminate=rule, lanes=1, seq_len=8)
        with Loader(data, 2) as loader:
            assert [item.line for item in next(loader).contaminated] == expected, match


@pytest.mark.parametrize("size", [0, 1, 5000])
def test_a_set_of_hashes_holds_what_was_added(tmp_path: Path, size: int) -> None:
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


def test_a_paragraph_is_the_stripped_text_between_line_feeds() -> None:
    spaces = " " * 300
    texts = ["  first line here \r\nshort\nsecond\u2028line here\n\n", f"first line here\t{spaces}", "", spaces, "\n\n"]
    lines = split_lines([*texts, f"\t{spaces}first line here"], 4)
    assert lines.owners.tolist() == [0, 0, 1, 5]
    found = [lines.data[a:b].decode() for a, b in zip(lines.starts, lines.ends, strict=True)]
    assert found == ["first line here", "second\u2028line here", "first line here", "first line here"]
    for numbers in (lines.hashes(np.arange(4)), lines.signatures()):
        assert numbers[0] == numbers[2] == numbers[3] != numbers[1]
    assert not len(split_lines([], 4).signatures())


def test_a_run_with_another_filter_is_another_run(planted: tuple[Path, set[int]], tmp_path: Path) -> None:
    prints = []
    for rule in (None, {"suite": EVAL}, {"suite": EVAL, "min_tokens": 20}, {"suite": EVAL, "splits": ["val"]}):
        with Loader(data_config(planted[0], tmp_path, decontaminate=rule), 8) as loader:
            prints.append(loader.fingerprint)
    check_fingerprint(prints[1], prints[1])
    for other in (prints[0], *prints[2:]):
        with pytest.raises(ConfigError, match=r"data\.decontaminate"):
            check_fingerprint(prints[1], other)
    older = {**prints[1], "decontaminate": {**prints[1]["decontaminate"], "version": 1}}  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=r"version 1 of the rule .* says VERSION = 1, or start a new run"):
        check_fingerprint(older, prints[1])
    before = {key: value for key, value in prints[0].items() if key != "decontaminate"}
    check_fingerprint(before, prints[0])  # a run begun before the key existed


def test_invalid_rules_are_named(planted: tuple[Path, set[int]], tmp_path: Path) -> None:
    for rule, message in (
        ({"suite": tmp_path / "nowhere"}, r"data\.decontaminate\.suite=.*nowhere is not a folder"),
        ({"suite": EVAL, "splits": ["dev"]}, "no split 'dev'"),
        ({"suite": EVAL, "min_tokens": 10**6}, "no paragraph of 1000000 words in it"),
    ):
        with pytest.raises(ConfigError, match=message):
            Loader(data_config(planted[0], tmp_path, decontaminate=rule), 8)
    source = {"name": "ids", "dataset": "x", "input_ids_key": "ids"}
    with pytest.raises(ValidationError, match="'ids' holds token ids"):
        config([source], decontaminate={"suite": EVAL})
