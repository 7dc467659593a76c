"""Long texts are encoded in parts: the ids are those of the whole text, and memory stays small."""

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import Tokenizer, read_documents, tokenizer
from shards.cuts import Cuts
from tests.shards.corpora import SAMPLE, TOKENIZER

WHOLE = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER))
CUTS = Cuts(TOKENIZER.read_bytes())
TEXTS = st.text(
    st.one_of(st.sampled_from(" \u2581\n\tae.,</s>0x"), st.characters(exclude_categories=["Cs"])), max_size=60
)


@settings(max_examples=500)
@given(text=TEXTS, size=st.integers(1, 8))
def test_parts_of_any_text_give_its_ids(text: str, size: int) -> None:
    assert CUTS.exact
    assert [i for part in CUTS.parts(text, size) for i in WHOLE.encode(part)] == WHOLE.encode(text)


def test_parts_of_real_text_give_its_ids() -> None:
    for shard in sorted([*SAMPLE.glob("*.zst"), *SAMPLE.glob("*.gz")]):
        for number, document in enumerate(read_documents(str(shard))):
            if number % 20 == 0:
                parts = list(CUTS.parts(document.text, 10))
                assert [i for part in parts for i in WHOLE.encode(part)] == WHOLE.encode(document.text)
                assert len(parts) > len(document.text) // 200


def test_a_long_document_is_encoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "MAX_PART", 50)
    text = "the quick  brown fox\n" * 50 + " "
    tokens = Tokenizer(TOKENIZER)
    longest: list[int] = []
    encode = tokens.encode
    monkeypatch.setattr(tokens, "encode", lambda part: longest.append(len(part)) or encode(part))
    ids, lengths = tokens.encode_documents([text, "short"])
    assert max(longest) < 80
    assert ids[: lengths[0]].tolist() == [tokens.bos_id, *WHOLE.encode(text), tokens.eos_id]
