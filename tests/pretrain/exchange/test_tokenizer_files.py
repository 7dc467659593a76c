"""The exported tokenizer.json of every kind of file gives our ids, and prompts are encoded as documents begin."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pretrain.exchange.folder import open_codec, open_tokenizer
from pretrain.exchange.tokenizer_files import check_tokenizer, is_json, write_tokenizer
from pretrain.inference.generate import codec_of
from shards import ConfigError, Tokenizer, read_documents
from shards.tokenize import rank_file
from tests.shards.corpora import SAMPLE, TOKENIZER
from tests.shards.tokenize import kinds

TEXTS = [
    "", " ", "   a", "a  b ", "\n\n\tx", "<|endoftext|><|begin|>a <|begin_of_text|>", "|||IP|||",
    "née 你好 😀\u200d\u0301", "\r\n\x00", "=" * 99, "e\u0301 12345 I'LL don't",
]  # fmt: skip


def published_ranks(path: Path, patch: pytest.MonkeyPatch) -> Path:
    """Write a rank file that is known as if it were Llama 3's own."""
    written = kinds.write_ranks(path, kinds.ranks())
    digest = hashlib.sha256(written.read_bytes()).hexdigest()
    patch.setitem(rank_file.ENCODINGS, "llama3", rank_file.ENCODINGS["llama3"]._replace(sha256=digest))
    return written


@pytest.fixture(scope="module", params=["neox", "smollm2", "llama3", "qwen2", "ranks"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("kinds")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "ranks":
            yield published_ranks(folder / "ranks.model", patch)
        else:
            yield kinds.write_json(folder, request.param)


@pytest.mark.parametrize("bos", [True, False])
def test_the_exported_tokenizer_gives_our_ids(path: Path, bos: bool, tmp_path: Path) -> None:
    ours = Tokenizer(path, bos=bos)
    write_tokenizer(ours, tmp_path, bos, 64)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": ours.bos_id, "eos_token_id": ours.eos_id}))
    theirs, codec = AutoTokenizer.from_pretrained(tmp_path), codec_of(ours, bos)
    documents = list(read_documents(sorted(SAMPLE.glob("*.gz"))[0]))[::240]
    for text in [*TEXTS, *(document.text[:2000] for document in documents)]:
        ids = [*([ours.bos_id] if bos else []), *ours.encode(text)]
        assert theirs(text).input_ids == ids == codec.encode(text), ascii(text)
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids) == codec.decode(ids)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    check_tokenizer(tmp_path, ours, "data.tokenizer=x")
    opened, scored = open_codec(tmp_path), open_tokenizer(tmp_path)
    assert opened.ends == codec.ends
    for text in TEXTS:
        assert opened.encode(text) == codec.encode(text), ascii(text)
        assert scored.encode_document(text).tolist() == [*codec.encode(text), ours.eos_id], "as documents are scored"
    with pytest.raises(ConfigError, match="use the model's own tokenizer"):
        check_tokenizer(tmp_path, Tokenizer(TOKENIZER), "data.tokenizer=x")


def test_a_rank_file_opens_as_the_tokenizer_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = published_ranks(tmp_path / "tokenizer.model", monkeypatch)
    ours, codec = Tokenizer(written), open_codec(tmp_path)
    assert codec.encode("the text") == [ours.bos_id, *ours.encode("the text")]
    assert codec.ends == {ours.eos_id}
    check_tokenizer(tmp_path, ours, "data.tokenizer=x")


def test_a_tokenizer_json_is_known_by_its_content(path: Path) -> None:
    assert is_json(path) == (path.suffix == ".json")
    assert not is_json(TOKENIZER)


@pytest.mark.parametrize("bos", [True, False])
def test_documents_of_a_sentencepiece_export_are_scored_as_in_training(bos: bool, tmp_path: Path) -> None:
    ours = Tokenizer(TOKENIZER, bos=bos)
    write_tokenizer(ours, tmp_path, bos, 64)
    ids = {"bos_token_id": ours.bos_id if bos else None, "eos_token_id": ours.eos_id}
    (tmp_path / "config.json").write_text(json.dumps(ids))
    opened, theirs = open_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        wanted = ours.encode_document(text).tolist()
        assert opened.encode_document(text).tolist() == wanted
        assert [*theirs(text).input_ids, ours.eos_id] == wanted, ascii(text)
