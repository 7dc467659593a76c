"""Rank files: ids equal tiktoken's by the pattern that it has for an encoding, which is known by the file or named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args
from unittest import mock

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import ConfigError, DataConfig, Tokenizer
from shards.config import RankEncoding
from shards.tokenize import rank_file
from tests.examples import examples
from tests.shards.corpora import TOKENIZER
from tests.shards.tokenize import kinds
from tests.shards.tokenize.test_kinds import HOSTILE, MIXED, without_gigatoken

tiktoken = pytest.importorskip("tiktoken")
# Tokens that words of one pattern hold and words of another do not
PARTS = ["\n ", "\n  ", " \n", " \n ", "\n\n", "\n\n ", "  ", "\t ", "LL", "'LL", "'S", "'s", "b's", "B'S", "ab", "Ab"]
PARTS += ["AB", "bA", "12", "123", "1234", " 1", "/\n", "!/", "!\n", "!\n\n", "e\u0301", "\u02b0a"]
TOKENS = [bytes([byte]) for byte in range(256)] + list(dict.fromkeys(part.encode() for part in PARTS))
BLANKS = [" ", "  ", "\n", "\r\n", "\t", "\u3000", "\x85"]
SPLIT = st.lists(st.one_of(st.sampled_from([*PARTS, *BLANKS, "a", "B", "\u01c5", "\xbd"]), MIXED)).map("".join)
TELLING = " 1234 b's B'S !/\nbA'LL \n "  # each encoding splits it otherwise


def pattern(encoding: RankEncoding) -> str:
    """Return the pattern of an encoding as tiktoken says it; Llama 3's code hands its own to tiktoken."""
    from tiktoken_ext import openai_public

    if encoding == "llama3":
        return kinds.LLAMA3
    with mock.patch.object(openai_public, "load_tiktoken_bpe"):
        found: str = openai_public.ENCODING_CONSTRUCTORS[encoding]()["pat_str"]
    return found


class Ranks:
    """A rank file made by hand, as the project reads it, and what tiktoken makes of texts."""

    def __init__(self, encoding: RankEncoding, folder: Path) -> None:
        self.encoding, self.path = encoding, kinds.write_ranks(folder / encoding, TOKENS)
        mergeable = {token: rank for rank, token in enumerate(TOKENS)}
        peer = tiktoken.Encoding("", pat_str=pattern(encoding), mergeable_ranks=mergeable, special_tokens={})
        self.encode: Callable[[str], list[int]] = peer.encode_ordinary
        self.ours = Tokenizer(self.path, bos=False, eos=False, rank_encoding=encoding)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[RankEncoding, Ranks]:
    folder = tmp_path_factory.mktemp("ranks")
    return {encoding: Ranks(encoding, folder) for encoding in get_args(RankEncoding)}


@pytest.fixture(params=get_args(RankEncoding))
def ranks(request: pytest.FixtureRequest, opened: dict[RankEncoding, Ranks]) -> Ranks:
    return opened[request.param]


@pytest.mark.parametrize("encoding", get_args(RankEncoding))
@settings(max_examples=examples(300))
@given(text=SPLIT)
def test_ids_of_any_text_equal_tiktokens(opened: dict[RankEncoding, Ranks], encoding: RankEncoding, text: str) -> None:
    assert opened[encoding].ours.encode(text) == opened[encoding].encode(text), ascii(text)


def test_the_library_and_gigatoken_split_by_the_pattern(ranks: Ranks) -> None:
    pytest.importorskip("gigatoken")
    assert ranks.ours.obstacle is None
    library = tokenizers.Tokenizer.from_str(json.dumps(ranks.ours.library_json()))
    library.encode_special_tokens = True
    for text in (*PARTS, *BLANKS, "".join(PARTS), "".join(HOSTILE), *(f"a{one}" for one in PARTS)):
        assert library.encode(text, add_special_tokens=False).ids == ranks.ours.encode(text) == ranks.encode(text)


def test_encodings_split_texts_differently(opened: dict[RankEncoding, Ranks]) -> None:
    assert len({tuple(one.ours.encode(TELLING)) for one in opened.values()}) == len(opened)


def test_special_tokens_stand_where_the_encoding_has_them(ranks: Ranks) -> None:
    ends = {"llama3": (True, 0, 1), "r50k_base": (False, None, 0), "cl100k_base": (False, None, 1)}
    bos, first, last = ends.get(ranks.encoding, (False, None, 1))
    found = without_gigatoken(ranks.path, bos=bos, rank_encoding=ranks.encoding)
    assert found.eos_id == len(TOKENS) + last
    assert found.bos_id == (-1 if first is None else len(TOKENS) + first)
    if first is None:
        with pytest.raises(ConfigError, match="data.bos=true, but the tokenizer .* has no BOS"):
            without_gigatoken(ranks.path, rank_encoding=ranks.encoding)


def test_a_published_file_is_known_and_others_must_be_named(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="none of the published ones.* data.rank_encoding .*one of llama3, r50k_base"):
        Tokenizer(ranks.path)
    digest = hashlib.sha256(ranks.path.read_bytes()).hexdigest()
    published = rank_file.ENCODINGS[ranks.encoding]._replace(sha256=digest)
    monkeypatch.setitem(rank_file.ENCODINGS, ranks.encoding, published)
    assert without_gigatoken(ranks.path, bos=False, eos=False).encode(TELLING) == ranks.encode(TELLING)
    other = "llama3" if ranks.encoding != "llama3" else "o200k_base"
    with pytest.raises(ConfigError, match=f"data.rank_encoding={other}: .* published file of {ranks.encoding}"):
        without_gigatoken(ranks.path, rank_encoding=other)


def test_the_key_belongs_to_rank_files_alone(opened: dict[RankEncoding, Ranks]) -> None:
    with pytest.raises(ConfigError, match="data.rank_encoding=r50k_base: .* is no rank file"):
        Tokenizer(TOKENIZER, rank_encoding="r50k_base")
    values = {"tokenizer": opened["o200k_base"].path, "seq_len": 64, "bos": False}
    values |= {"sources": [{"name": "x", "paths": ["x"]}]}
    data = DataConfig.parse(values | {"rank_encoding": "o200k_base"})
    assert Tokenizer.of(data).encode(TELLING) == opened["o200k_base"].encode(TELLING)
    with pytest.raises(ConfigError, match="rank_encoding.*llama3"):
        DataConfig.parse(values | {"rank_encoding": "p50k_base"})
