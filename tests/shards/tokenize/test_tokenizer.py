"""For every text and model, ids equal those of SentencePieceProcessor.encode, word by word if that is exact."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from shards import DataConfig, Loader, Tokenizer, read_documents
from shards.tokenize import long_words, word_encoder
from tests.examples import examples
from tests.shards.corpora import SAMPLE, TOKENIZER
from tests.vocabularies import write_model

SYMBOLS = ["<|im_start|>", "<|im_end|>", "  x", "ab"]
PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
KINDS = {  # how each model is trained, and whether its texts can be cut
    "bundled": (None, True),
    "symbols": (PLAIN | {"user_defined_symbols": SYMBOLS, "byte_fallback": True}, True),
    "unknown": (PLAIN | {"user_defined_symbols": SYMBOLS}, True),
    "nmt_nfkc": ({"byte_fallback": True, "normalization_rule_name": "nmt_nfkc_cf"}, True),
    "squeezed": ({"byte_fallback": True, "normalization_rule_name": "identity"}, True),
    "suffix": (PLAIN | {"byte_fallback": True, "treat_whitespace_as_suffix": True}, True),
    "across_spaces": (PLAIN | {"split_by_whitespace": False}, True),
    "unescaped": (PLAIN | {"user_defined_symbols": SYMBOLS}, True),
    "unused": (PLAIN | {"user_defined_symbols": SYMBOLS, "byte_fallback": True}, True),
    "unused_unknown": (PLAIN, True),
    "unigram": ({"model_type": "unigram", "byte_fallback": True}, False),
}
ODD = [
    *SYMBOLS, "</s>", "<s>", "<unk>", "<0x0A>", "\u2581", "\u2581\u2581the", "\0", "\n", "\n\n", "\t", "\r\n",
    " ", "   ", "\ufeff",
    "the ", "The", "there", "é", "e\u0301", "ﬁ", "½", "日本", "本語", "\u3000", "한국", "я", "ся ", "🙂", "👩\u200d💻",
    "\U0010ffff", "\ue000",
    "0", "12", ".", ",\"", "ÿ", "a" * 40, "pneumono" * 5, "=" * 20, "日" * 30, "\u0800" * 6,
]  # fmt: skip
TEXTS = st.lists(
    st.one_of(st.sampled_from(ODD), st.text(st.characters(exclude_categories=["Cs"]), max_size=6)), max_size=20
).map("".join)


def sentences() -> Iterator[str]:
    for number, document in enumerate(read_documents(sorted(SAMPLE.glob("dolma-wiki*.gz"))[0])):
        if number % 40 == 0:
            yield from document.text.splitlines()[:5]
    yield from ["日本語の文章。", "한국어 문장", "Всё смешалось в доме", "½ ﬁn 日本 語"] * 5


def train(kind: str, path: Path) -> Path:
    options, _ = KINDS[kind]
    if options is None:
        return TOKENIZER
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(),
        model_writer=model,
        minloglevel=2,
        num_threads=1,
        **{"vocab_size": 700, "model_type": "bpe", "character_coverage": 0.999, "hard_vocab_limit": False} | options,
    )
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    if kind.startswith("unused"):
        for piece in proto.pieces[5::3]:  # of all lengths, and of one character too
            if piece.type == proto.SentencePiece.NORMAL:
                piece.type = proto.SentencePiece.UNUSED
    proto.normalizer_spec.escape_whitespaces = kind != "unescaped"
    path.write_bytes(proto.SerializeToString())
    return path


class Model:
    """A model as the project encodes with it, and as SentencePiece does."""

    def __init__(self, path: Path) -> None:
        self.path, self.ours = path, Tokenizer(path)
        self.peer = sentencepiece.SentencePieceProcessor(model_file=str(path))

    def check(self, texts: list[str]) -> None:
        ids, lengths = self.ours.encode_documents(texts)
        assert ids.dtype == self.ours.dtype
        assert len(lengths) == len(texts)
        assert lengths.sum() == len(ids)
        begin = 0
        for text, length in zip(texts, lengths.tolist(), strict=True):
            found = ids[begin : begin + length].tolist()
            assert found == [self.ours.bos_id, *self.peer.encode(text), self.ours.eos_id], text
            begin += length


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    made = Model(train(request.param, tmp_path_factory.mktemp("models") / f"{request.param}.model"))
    assert (made.ours.obstacle is None) == KINDS[request.param][1]
    return made


@settings(max_examples=examples(100))
@given(
    texts=st.lists(TEXTS, max_size=4),
    block=st.sampled_from([1, 7, 40, 1 << 17]),
    part=st.sampled_from([1, 5, 20, 1 << 17]),
)
def test_ids_of_any_text_equal_sentencepieces(model: Model, texts: list[str], block: int, part: int) -> None:
    with mock.patch.object(word_encoder, "BLOCK_BYTES", block), mock.patch.object(long_words, "PART_BYTES", part):
        model.check(texts)


UNBROKEN = ["a", "ab", "aab", "the", "there", "ing", "0", "=", "é", "日本", "語", "Ü", "🙂", "<|im_start|>"]


@settings(max_examples=examples(40))
@given(
    parts=st.lists(st.tuples(st.sampled_from(UNBROKEN), st.integers(1, 80)), min_size=1, max_size=5),
    mixed=st.lists(st.sampled_from(UNBROKEN), max_size=60),
    part=st.sampled_from([16, 50, 300]),
)
def test_ids_of_words_of_any_length_equal_sentencepieces(
    model: Model, parts: list[tuple[str, int]], mixed: list[str], part: int
) -> None:
    """Encode runs of one character or syllable, where leftmost merges decide, and mixed letters, where scores do."""
    text = "".join(unit * count for unit, count in parts) + "".join(mixed)
    with mock.patch.object(word_encoder, "BLOCK_BYTES", 10), mock.patch.object(long_words, "PART_BYTES", part):
        model.check([text, "a word", text[::-1]])


@settings(max_examples=examples(200))
@given(
    pieces=st.lists(st.text("abc\u2581", min_size=1, max_size=6), min_size=1, max_size=20, unique=True),
    kinds=st.lists(st.sampled_from(["NORMAL", "UNUSED", "UNUSED", "USER_DEFINED"]), min_size=20, max_size=20),
    byte_fallback=st.booleans(),
    texts=st.lists(st.text("aabbcc  x", max_size=60), min_size=1, max_size=5),
)
def test_texts_are_cut_whatever_pieces_are_unused(
    tmp_path_factory: pytest.TempPathFactory,
    pieces: list[str],
    kinds: list[str],
    byte_fallback: bool,
    texts: list[str],
) -> None:
    path = write_model(tmp_path_factory.getbasetemp() / "unused.model", pieces, byte_fallback=byte_fallback)
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    for piece, kind in zip(proto.pieces[-len(pieces) :], kinds, strict=False):
        piece.type = proto.SentencePiece.Type.Value(kind)
    path.write_bytes(proto.SerializeToString())
    made = Model(path)
    assert made.ours.obstacle is None
    with mock.patch.object(word_encoder, "BLOCK_BYTES", 16), mock.patch.object(long_words, "PART_BYTES", 8):
        made.check(texts)


@pytest.mark.parametrize("unit", ["a", "ab", "xyz", "Donaudampfschifffahrtsgesellschaft", "=-", "\u00e4\u00f6"])
def test_a_long_word_is_encoded_in_bounded_parts_each_once(unit: str) -> None:
    model = Model(TOKENIZER)
    text = unit * (400_000 // len(unit))
    seen: list[int] = []
    encode = model.ours._kind._words._long_words.processor.EncodeAsNumpy
    with (
        mock.patch.object(long_words, "PART_BYTES", 1 << 13),
        mock.patch.object(word_encoder, "BLOCK_BYTES", 1 << 13),
        mock.patch.object(
            model.ours._kind._words._long_words.processor,
            "EncodeAsNumpy",
            lambda data: seen.append(len(data)) or encode(data),
        ),
    ):
        model.check([f"before {text} after"])
    assert max(seen, default=0) <= 1 << 14
    assert sum(seen) <= 2 * len(text.encode()) + (1 << 14)


def test_ids_of_real_text_equal_sentencepieces(model: Model) -> None:
    for shard in sorted([*SAMPLE.glob("*.zst"), *SAMPLE.glob("*.gz")]):
        model.check([document.text for document in list(read_documents(shard))[::40]])


@pytest.mark.parametrize(("limit", "value"), [("MAX_WORDS", 300), ("MAX_LONG_BYTES", 100), ("MAX_IDS", 2000)])
def test_a_full_table_is_cleared(limit: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_encoder, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(word_encoder, limit, value)
    model = Model(TOKENIZER)
    texts = [document.text for document in read_documents(sorted(SAMPLE.glob("*.gz"))[0])][:60]
    clear = mock.Mock(wraps=model.ours._kind._words._clear)
    monkeypatch.setattr(model.ours._kind._words, "_clear", clear)
    model.check(texts)
    assert clear.call_count > 3


@pytest.mark.parametrize("factor", ["MIX", "MULTIPLIER"])
def test_words_in_the_same_slot_are_distinguished(factor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all words, or all with the same beginning, hash to one slot, so that only bytes and lengths decide."""
    monkeypatch.setattr(word_encoder, factor, word_encoder.np.uint64(0))
    Model(TOKENIZER).check(["interested interest interesting a a\0 ab abcdefg abcdefgh \0 \0\0", "interesting the a b"])


def test_the_reason_for_encoding_documents_whole_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = train("unigram", tmp_path / "unigram.model")
    config = DataConfig.parse(
        {
            "tokenizer": path,
            "seq_len": 64,
            "lanes": 1,
            "num_workers": 0,
            "index_dir": tmp_path,
            "sources": [{"name": "wiki", "paths": [str(SAMPLE / "dolma-wiki*.gz")]}],
        }
    )
    with caplog.at_level(logging.WARNING, "shards"), Loader(config, 1) as loader:
        next(loader)
    assert [record.getMessage() for record in caplog.records if "unigram" in record.getMessage()] == [
        f"{path} encodes documents whole, several times slower than word by word: it is a unigram model, not BPE"
    ]
