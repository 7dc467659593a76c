"""A tokenizer that cannot spell a text is refused; one that can never is, whatever its normalizer and the text."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece

from shards import ConfigError, DataConfig, Tokenizer, read_documents
from shards.suites.suite import find
from shards.tokenizer_check import Soundness, check_sources, check_suite
from tests.vocabularies import GPT2_PIECES, foreign_pieces, write_model

SAMPLE = Path("shards/sample")
BUNDLED = SAMPLE / "tokenizer-4k.model"
ODD = [
    " ", "  ", "\u2581", "\n", "\t", "a", "the", "\ufffd", "\x00", "\x85", "\u2028", "\U0001f600", "漢", "é", "e\u0301",
    "\xa0", "\u3000", "<s>", "</s>", "<unk>", " ⁇ ", "<0x0A>", "\ufeff", "\r\n", "\ufb01", "\u212b", "½", "\u200b",
]  # fmt: skip
MODELS = {
    "identity": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "nfkc": {"normalization_rule_name": "nmt_nfkc", "model_type": "unigram"},
    "folded, no prefix": {"normalization_rule_name": "nmt_nfkc_cf", "add_dummy_prefix": False},
    "suffix": {"normalization_rule_name": "identity", "treat_whitespace_as_suffix": True},
}

PLAIN = [*"plainwords", "\u2581"]  # pieces of "plain words"


def config(tokenizer: Path, *sources: dict[str, object]) -> DataConfig:
    values = {"tokenizer": tokenizer, "seq_len": 32, "sources": [{"name": f"s{i}", **s} for i, s in enumerate(sources)]}
    return DataConfig.model_validate(values)


def judged(tokenizer: Tokenizer, texts: list[str]) -> None:
    found = Soundness(tokenizer, "suite 'x'")
    for text in texts:
        found.add("part", text, tokenizer.encode_documents([text])[0])
    found.check()


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("train") / "lines.txt"
    documents = list(read_documents(SAMPLE / "eval/multilingual/val.jsonl.zst"))[:20]
    path.write_text("\n".join(document.text[:2000].replace("\n", " ") for document in documents))
    return path


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_byte_fallback_can_spell_every_text(lines: Path, name: str) -> None:
    options = {"model_type": "bpe", "byte_fallback": True, "vocab_size": 700, "hard_vocab_limit": False} | MODELS[name]
    path = lines.with_name(f"{name}.model")
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(input=str(lines), model_writer=file, minloglevel=3, **options)
    generator = random.Random(1)
    texts = ["".join(generator.choices(ODD, k=generator.randrange(12))) for _ in range(500)]
    judged(Tokenizer(path), texts)


def test_the_bundled_tokenizer_can_spell_the_bundled_text() -> None:
    tokenizer = Tokenizer(BUNDLED)
    check_sources(config(BUNDLED, {"paths": [f"{SAMPLE}/train/*"]}), tokenizer)
    check_suite(find(SAMPLE / "eval", "val"), tokenizer)


def test_a_vocabulary_made_only_to_name_ids_is_refused_for_text_and_accepted_for_ids(tmp_path: Path) -> None:
    path = foreign_pieces(tmp_path / "named.model")
    tokenizer = Tokenizer(path, bos=False, eos=False)
    text = {"paths": [str(SAMPLE / "train/pile-00.jsonl.zst")]}
    pq.write_table(pa.table({"ids": [[5, 6, 7]], "text": ["the cat sat on the mat"]}), tmp_path / "d.parquet")
    ids = {"dataset": str(tmp_path / "d.parquet"), "input_ids_key": "ids"}
    check_sources(config(path, ids), tokenizer)
    with pytest.raises(ConfigError, match=r"named\.model cannot spell the text of source 's1': \d+\.\d% .* UNK"):
        check_sources(config(path, ids, text), tokenizer)
    with pytest.raises(ConfigError, match="source 's0'"):
        check_sources(config(path, {"dataset": str(tmp_path / "d.parquet")}), tokenizer)
    with pytest.raises(ConfigError, match="suite 'eval'"):
        check_suite(find(SAMPLE / "eval", "val"), tokenizer)


def test_foreign_text_in_any_of_a_few_shards_is_found(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_model(tmp_path / "m.model", PLAIN), bos=False, eos=False)
    for shard in range(4):
        text = "漢字とかな" if shard == 3 else "plain words"
        (tmp_path / f"{shard}.jsonl").write_text((json.dumps({"text": text}) + "\n") * 50)
    with pytest.raises(ConfigError, match="UNK"):
        check_sources(config(tmp_path / "m.model", {"paths": [str(tmp_path / "*.jsonl")]}), tokenizer)


def test_a_few_unknown_characters_are_accepted_and_a_part_full_of_them_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = Tokenizer(write_model(tmp_path / "m.model", PLAIN), bos=False, eos=False)
    found = Soundness(tokenizer, "suite 'x'")
    for part, text in (("words", "plain words " * 100), ("emoji", "plain words \U0001f600")):
        found.add(part, text, tokenizer.encode_documents([text])[0])
    with caplog.at_level(logging.WARNING):
        found.check()
    assert "of emoji in suite 'x'" in caplog.text
    assert "of words" not in caplog.text
    with pytest.raises(ConfigError, match="1.0% of its ids"):
        judged(tokenizer, ["a" * 99 + "?"])
    judged(tokenizer, ["a" * 100 + "?"])


def test_ids_that_decode_to_another_text_are_shown(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_model(tmp_path / "m.model", [*GPT2_PIECES, "\u2581"]), bos=False, eos=False)
    text = "a cat sat"
    ids = tokenizer.encode_documents([text])[0]
    assert tokenizer.difference(text, ids) is None
    assert tokenizer.difference(text, np.concatenate([ids[:2], ids[3:]])) == ("cat sat", "at sat")


def test_errors_in_a_shard_are_left_to_its_indexing(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{broken\n{"other": 1}\n')
    (tmp_path / "cut.jsonl.zst").write_bytes((SAMPLE / "train/pile-00.jsonl.zst").read_bytes()[:2000])
    paths = [str(tmp_path / "bad.jsonl"), str(tmp_path / "cut.jsonl.zst")]
    check_sources(config(BUNDLED, {"paths": paths}), Tokenizer(BUNDLED))
