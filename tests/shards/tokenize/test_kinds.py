"""Ids of every kind of file equal those of the library that the file is for, with gigatoken and without."""

from __future__ import annotations

import builtins
import json
import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import ConfigError, DataConfig, Loader, Tokenizer, check_fingerprint, read_documents
from shards.config import RankEncoding
from shards.tokenize import fast_bpe
from shards.windows.recipe import Tools
from tests.examples import examples
from tests.shards.corpora import SAMPLE, TOKENIZER
from tests.shards.tokenize import kinds
from tests.shards.tokenize.test_tokenizer import ODD, TEXTS

NAMES = ["neox", "smollm2", "llama3", "qwen2", "ranks"]
HOSTILE = [
    *ODD,
    "'s",
    "'S",
    "'\u017f",
    "don't",
    "I'LL",
    "   x",
    "12345",
    "\u0663\u0664",
    "\xb2",
    "|||IP|||",
    "<|begin|>",
    "\x04",
]
HOSTILE += [
    "\u088f",
    "\u037e",
    "=\u0338",
    "\x85",
    "\u2028",
    "\u1100\u1161",
    "x" * 300,
    kinds.END,
    "\x1c",
    "\U00032e45's",
]
MIXED = st.lists(
    st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(exclude_categories=["Cs"]), max_size=4), TEXTS),
    max_size=20,
).map("".join)


class Vocabulary:
    """A file as the project reads it, and the library's ids of texts."""

    def __init__(self, name: str, folder: Path) -> None:
        self.encode: Callable[[str], list[int]]
        if name == "ranks":
            tiktoken = pytest.importorskip("tiktoken")
            tokens = kinds.ranks()
            self.path = kinds.write_ranks(folder / "ranks.model", tokens)
            mergeable = {token: rank for rank, token in enumerate(tokens)}
            self.encode = tiktoken.Encoding(
                "", pat_str=kinds.LLAMA3, mergeable_ranks=mergeable, special_tokens={}
            ).encode_ordinary
        else:
            self.path = kinds.write_json(folder, name)
            peer = tokenizers.Tokenizer.from_file(str(self.path))
            peer.encode_special_tokens = True
            self.encode = lambda text: peer.encode(text, add_special_tokens=False).ids
        self.encoding: RankEncoding | None = "llama3" if name == "ranks" else None
        self.ours = Tokenizer(self.path, rank_encoding=self.encoding)

    def check(self, texts: Sequence[str], ours: Tokenizer | None = None) -> None:
        ours = ours or self.ours
        ids, lengths = ours.encode_documents(texts)
        assert ids.dtype == ours.dtype
        parts = np.split(ids, np.cumsum(lengths)[:-1]) if len(texts) else []
        for text, found in zip(texts, parts, strict=True):
            assert found.tolist() == [ours.bos_id, *self.encode(text), ours.eos_id], ascii(text)


@pytest.fixture(scope="module", params=NAMES)
def vocabulary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return Vocabulary(request.param, tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="module")
def neox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kinds.write_json(tmp_path_factory.mktemp("neox"), "neox")


def without_gigatoken(path: Path, **options: Any) -> Tokenizer:
    load = builtins.__import__

    def refuse(name: str, *rest: object) -> object:
        if name == "gigatoken":
            raise ImportError(name)
        return load(name, *rest)

    with mock.patch.object(builtins, "__import__", refuse):
        return Tokenizer(path, **options)


@settings(max_examples=examples(300))
@given(texts=st.lists(MIXED, min_size=1, max_size=4))
def test_ids_of_any_text_equal_the_librarys(vocabulary: Vocabulary, texts: list[str]) -> None:
    vocabulary.check(texts)


def test_ids_of_every_character_equal_the_librarys(vocabulary: Vocabulary) -> None:
    """Try a part of all characters, the unassigned ones too, beside letters, digits, spaces and line feeds."""
    codes = [code for code in range(random.Random(3).randrange(97), 0x110000, 97) if not 0xD800 <= code < 0xE000]
    vocabulary.check(["a{0}'s{0} {0}1{0}\n x{0}{0}".format(chr(code)) for code in codes])


def test_ids_of_real_text_equal_the_librarys(vocabulary: Vocabulary) -> None:
    for shard in sorted([*SAMPLE.glob("*.zst"), *SAMPLE.glob("*.gz")]):
        vocabulary.check([document.text for document in list(read_documents(shard))[::40]])


def test_gigatoken_computes_what_it_was_made_for(vocabulary: Vocabulary) -> None:
    pytest.importorskip("gigatoken")
    assert vocabulary.ours.obstacle is None
    assert set(vocabulary.ours.libraries) == {"tokenizers", "gigatoken"}
    with mock.patch.object(fast_bpe, "library_ids", side_effect=AssertionError):
        vocabulary.check(["Plain text, in 2 parts.\n\n  And é 日本."])


NUMBERS = st.lists(
    st.one_of(
        st.sampled_from([*"09", "10", "x1", " ", "\xb2", "\u0663", "\u00bd", "\u2167", "\U0001d7d8", "\u0f33"]), TEXTS
    )
).map("".join)


@pytest.fixture(scope="module")
def digits_apart(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[int]]:
    """Return what encodes by a vocabulary that sets digits apart, and has a token with digits inside."""
    pytest.importorskip("gigatoken")
    folder = tmp_path_factory.mktemp("digits")
    content = json.loads(kinds.write_json(folder, "smollm2").read_text())
    kept = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    content["added_tokens"].append({"id": 1498, "content": "x10", **kept})
    path = kinds.write(folder / "kept.json", content)
    ours, peer = Tokenizer(path, bos=False, eos=False), tokenizers.Tokenizer.from_file(str(path))
    assert ours.obstacle is None
    assert ours.encode("x10") == [1498]
    peer.encode_special_tokens = True

    def encode(text: str) -> list[int]:
        ids = ours.encode(text)
        assert ids == peer.encode(text, add_special_tokens=False).ids, ascii(text)
        return ids

    return encode


@settings(max_examples=examples(300))
@given(text=NUMBERS)
def test_numbers_of_any_script_are_set_apart(digits_apart: Callable[[str], list[int]], text: str) -> None:
    digits_apart(text)


def test_gigatoken_computes_texts_with_numbers(digits_apart: Callable[[str], list[int]]) -> None:
    """Give the library no more than each number, once, unless a digit is a part of a token."""
    with mock.patch.object(fast_bpe, "library_ids", wraps=fast_bpe.library_ids) as library:
        for text in ("the \u3024 and 1\u30252\u3024", "\u3025\u3024 again"):
            digits_apart(text)
        assert sorted(call.args[1] for call in library.call_args_list) == ["\u3024", "\u3025"]
        for text in ("x10 \u3024", "x1\u3024"):  # the second is shown as "x10"
            digits_apart(text)
            assert library.call_args.args[1] == text


def test_without_gigatoken_ids_are_the_same_and_the_reason_is_given(vocabulary: Vocabulary) -> None:
    slow = without_gigatoken(vocabulary.path, rank_encoding=vocabulary.encoding)
    assert slow.obstacle == "gigatoken is not installed: pip install 'headrace[fast]'"
    assert slow.libraries == {"tokenizers": tokenizers.__version__}
    vocabulary.check(["".join(HOSTILE), *HOSTILE, ""], slow)


def test_the_names_of_special_tokens_in_a_document_are_text(vocabulary: Vocabulary) -> None:
    """Encode documents that hold every special token: none of their ids is inside, and the texts come back."""
    special = [kinds.END, "<|begin|>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    text = " ".join(["a", *special, *(f"x{name}y" for name in special)])
    inside = vocabulary.ours.encode_documents([text])[0][1:-1]
    assert not {vocabulary.ours.bos_id, vocabulary.ours.eos_id} & set(inside.tolist())
    assert vocabulary.ours.decode(inside) == text
    assert vocabulary.ours.difference(text, vocabulary.ours.encode_documents([text])[0]) is None


def test_bos_and_eos_are_those_of_the_post_processor_or_of_the_config(neox: Path, tmp_path: Path) -> None:
    found = without_gigatoken(neox)  # which has no part in this
    assert (found.piece(found.bos_id), found.piece(found.eos_id)) == ("<|begin|>", kinds.END)
    content = json.loads(neox.read_text()) | {"post_processor": None}
    bare = kinds.write(tmp_path / "bare.json", content)
    both = "data.bos=true, but the tokenizer .* has no BOS; .* data.bos_token\\ndata.eos=true, .* data.eos_token"
    with pytest.raises(ConfigError, match=both):
        without_gigatoken(bare)
    assert without_gigatoken(bare, bos=False, eos=False).eos_id == -1
    named = without_gigatoken(bare, bos=False, eos_token=kinds.END)
    assert named.encode_documents(["a", ""])[0].tolist() == [*found.encode("a"), 0, 0]
    assert named.marks == (False, kinds.END)
    with pytest.raises(ConfigError, match="data.eos_token='</s>': .* no such token"):
        without_gigatoken(bare, bos=False, eos_token="</s>")


def test_gigatokens_caches_are_dropped_as_they_grow(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gigatoken")
    monkeypatch.setattr(fast_bpe, "MAX_GROWTH", -1)
    opened = mock.Mock(wraps=vocabulary.ours._kind._fast._open)
    monkeypatch.setattr(vocabulary.ours._kind._fast, "_open", opened)
    for text in ("the first text", "the second text", "the first text"):
        vocabulary.check([text])
    assert opened.call_count == 3


def test_a_gigatoken_that_gives_other_ids_is_not_used(
    neox: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    gigatoken = pytest.importorskip("gigatoken")
    right = gigatoken.Tokenizer.from_json

    class Wrong:
        def __init__(self, content: str) -> None:
            self._right = right(content)

        def encode(self, text: str) -> object:
            return self._right.encode(text.replace("don't", "do not"))

    source = {"name": "wiki", "paths": [str(SAMPLE / "dolma-wiki*.gz")]}
    values = {
        "tokenizer": neox,
        "seq_len": 64,
        "lanes": 1,
        "num_workers": 0,
        "index_dir": tmp_path,
        "sources": [source],
    }
    with mock.patch.object(gigatoken.Tokenizer, "from_json", Wrong), caplog.at_level(logging.WARNING, "shards"):
        with Loader(DataConfig.parse(values), 1) as loader:
            next(loader)
        assert "gives other ids for" in caplog.text
        peer = tokenizers.Tokenizer.from_file(str(neox))
        assert Tokenizer(neox).encode("I don't") == peer.encode("I don't", add_special_tokens=False).ids


def test_a_run_keeps_the_versions_that_compute_its_ids(neox: Path, tmp_path: Path) -> None:
    def fingerprint(tokenizer: Path, **changes: str) -> dict[str, object]:
        source = {"name": "wiki", "paths": [str(SAMPLE / "dolma-wiki*.gz")]}
        values = {"tokenizer": tokenizer, "seq_len": 64, "lanes": 1, "num_workers": 0, "index_dir": tmp_path}
        with Loader(DataConfig.parse(values | {"sources": [source]} | changes), 1) as loader:
            return loader.fingerprint

    before = fingerprint(neox)
    check_fingerprint(before, fingerprint(neox))
    with pytest.raises(ConfigError, match="data.eos_token: .* None, now it is '<|begin|>'"):
        check_fingerprint(before, fingerprint(neox, eos_token="<|begin|>"))
    with (
        mock.patch.object(tokenizers, "__version__", "9.9"),
        pytest.raises(ConfigError, match="pip install .*tokenizers=="),
    ):
        check_fingerprint(before, fingerprint(neox))
    assert "tokenizer_libraries" not in fingerprint(TOKENIZER)
    config = DataConfig.parse({"tokenizer": neox, "seq_len": 64, "sources": [{"name": "x", "paths": ["x"]}]})
    recipe = Tools(Tokenizer(neox)).recipe()
    recipe.open([config])
    with (
        mock.patch.object(tokenizers, "__version__", "9.9"),
        pytest.raises(ConfigError, match="put the old versions back"),
    ):
        recipe.open([config])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model": ', "damaged: it begins as JSON"),
        (b'{"a": 1}', "no tokenizer.json .*: it has no model"),
        (b'{"model": {"type": "Nothing"}}', "the tokenizers library .* cannot read it"),
        (b'{"model": {"type": "BPE", "dropout": 0.1}}', "dropout=0.1 encodes a text differently each time"),
        (b"IQ== 0\nIg== 1\n", "has no token for the byte 0x00"),
        (b"IQ== 0\nIg== 2\n", "line 2: rank 2 .* where a new token of rank 1 belongs"),
        (b"IQ== 0\nwhat is this\n", "line 2: .* is not a token in base64 and its rank"),
        (b"anything", "not a SentencePiece model, nor a tokenizer.json or a rank file"),
    ],
)
def test_a_file_of_no_kind_is_refused_by_what_is_wrong(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ConfigError, match=f"data.tokenizer={tmp_path / 'file'}.*{message}"):
        Tokenizer(tmp_path / "file", rank_encoding="llama3" if content.startswith(b"IQ") else None)
