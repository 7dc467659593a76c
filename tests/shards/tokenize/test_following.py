"""A text that follows another has tokens of its own: none of a beginning, and none that change those before it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from pretrain.exchange.tokenizer_files import write_tokenizer
from shards import Tokenizer
from tests.examples import examples
from tests.shards.corpora import TOKENIZER
from tests.shards.tokenize import kinds

CONTEXTS = ["Question: What is it?\nAnswer:", "The cat sat", "ends with a space ", "x\n", "12", "", "日本"]
FOLLOWING = [" four", " New York", "word", "\n    return x", "  two spaces", "4", " 漢字", "\tx"]
WORDS = st.lists(st.sampled_from([*CONTEXTS, *FOLLOWING, " ", "\n"]), min_size=1, max_size=4).map("".join)
KINDS = ["bundled", "dummy_prefix", "squeezed", "exported", "prefix_space", "metaspace", "neox", "smollm2", "ranks"]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    if kind == "bundled":
        return Tokenizer(TOKENIZER)
    if kind in ("dummy_prefix", "squeezed"):
        return Tokenizer(prefixed_model(folder / "x.model", squeezes=kind == "squeezed"))
    if kind == "exported":  # a tokenizer.json whose normalizer puts a space before a text
        write_tokenizer(Tokenizer(prefixed_model(folder / "x.model")), folder, bos=True, max_length=64)
        return Tokenizer(folder / "tokenizer.json", eos=False)
    if kind in ("prefix_space", "metaspace"):
        return Tokenizer(write_prefixed(folder / "tokenizer.json", kind), bos=False, eos=False)
    if kind == "ranks":
        return Tokenizer(kinds.write_ranks(folder / "x.tiktoken", kinds.ranks()), rank_encoding="llama3")
    return Tokenizer(kinds.write_json(folder, kind))


def prefixed_model(path: Path, squeezes: bool = False) -> Path:
    """Write the bundled SentencePiece model with a space before each text, as LLaMA's has it."""
    model = sentencepiece_model_pb2.ModelProto.FromString(TOKENIZER.read_bytes())
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = squeezes
    path.write_bytes(model.SerializeToString())
    return path


def write_prefixed(path: Path, kind: str) -> Path:
    """Write a tokenizer.json whose pre-tokenizer puts a space before a text."""
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=kind == "metaspace"))
    if kind == "metaspace":
        made.normalizer = normalizers.Sequence([normalizers.NFC()])
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="first")])
        made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
        alphabet = sorted(set("".join([*CONTEXTS, *FOLLOWING])))
    else:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(kinds.texts()[:20], trainer)
    path.write_text(made.to_str())
    return path


@given(context=WORDS, following=WORDS)
@settings(max_examples=examples(200), deadline=None)
def test_a_context_and_what_follows_it_spell_both_texts(tokenizer: Tokenizer, context: str, following: str) -> None:
    """State what a second space before a continuation would break."""
    (before,), (after,) = tokenizer.encode_beginnings([context]), tokenizer.encode_following([following])
    spelled, text = tokenizer.decode([*before, *after]), context + following
    if tokenizer.path.parent.name.startswith("squeezed"):  # it has no tokens for spaces beside spaces or at an end
        spelled, text = spelled.replace(" ", ""), text.replace(" ", "")
    # Spaces at the beginning of a document are a model's own affair
    assert spelled.lstrip(" ") == text.lstrip(" ")
    whole = tokenizer.encode_documents([context])[0]
    assert before.tolist() == whole[: len(whole) - len(tokenizer.ending)].tolist(), "that of a document, without EOS"


def test_an_answer_that_begins_a_word_has_the_tokens_of_the_whole_text(tokenizer: Tokenizer) -> None:
    """Where no token reaches over the boundary, to encode both apart is to encode them together."""
    for context in CONTEXTS[:2]:
        for text in (" four", " New York"):
            (before,), (after,) = tokenizer.encode_beginnings([context]), tokenizer.encode_following([text])
            (whole,) = tokenizer.encode_beginnings([context + text])
            assert [*before, *after] == whole.tolist()


def test_an_exported_model_continues_as_the_model_does(tmp_path: Path) -> None:
    ours = Tokenizer(prefixed_model(tmp_path / "x.model"))
    write_tokenizer(ours, tmp_path, bos=True, max_length=64)
    theirs = Tokenizer(tmp_path / "tokenizer.json", eos=False)
    for one, other in zip(ours.encode_following(FOLLOWING), theirs.encode_following(FOLLOWING), strict=True):
        assert one.tolist() == other.tolist()


def test_a_byte_level_vocabulary_encodes_a_continuation_as_any_text(tmp_path: Path) -> None:
    path = kinds.write_json(tmp_path, "smollm2")
    library = tokenizers.Tokenizer.from_str(json.dumps(json.loads(path.read_text())))
    found = Tokenizer(path).encode_following(FOLLOWING)
    assert [ids.tolist() for ids in found] == [library.encode(text, add_special_tokens=False).ids for text in FOLLOWING]
