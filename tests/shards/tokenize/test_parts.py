"""A document of parts has the ids that each part has where it stands, and its prompts are exactly those of prompts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import Tokenizer
from shards.records.forms import Part
from shards.tokenize.parts import encode_parts
from tests.examples import examples
from tests.shards.corpora import TOKENIZER
from tests.shards.tokenize import kinds
from tests.shards.tokenize.test_following import prefixed_model

START, END = "<|im_start|>", "<|im_end|>"
TEXTS = st.sampled_from(["", " ", "Question: x\nAnswer: ", "four words of it", " yes", "\n", "日本", START, "a  b  "])
PARTS = st.lists(st.builds(Part, TEXTS, st.booleans()) | st.builds(Part, st.just(END), st.booleans(), st.just(True)))


@pytest.fixture(scope="module", params=["bundled", "dummy_prefix", "smollm2", "markers"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "bundled":
        return Tokenizer(TOKENIZER)
    if request.param == "dummy_prefix":
        return Tokenizer(prefixed_model(folder / "x.model"))
    path = kinds.write_json(folder, "smollm2")
    return Tokenizer(with_markers(path) if request.param == "markers" else path)


def with_markers(path: Path) -> Path:
    """Add the markers of ChatML to a tokenizer.json as special tokens."""
    content = json.loads(path.read_text())
    plain = content["added_tokens"][0]
    first = 1 + max(content["model"]["vocab"].values())
    content["added_tokens"] += [
        {**plain, "id": first + i, "content": name, "special": True} for i, name in enumerate((START, END))
    ]
    path.write_text(json.dumps(content))
    return path


def test_a_response_has_the_ids_that_follow_its_prompt(tokenizer: Tokenizer) -> None:
    prompt, response = "Instruction: name it\nResponse: ", "Paris, of course"
    tokens, lengths, prompts = encode_parts(tokenizer, [[Part(prompt, False), Part(response, True)]] * 2)
    (asked,), (answer,) = tokenizer.encode_beginnings([prompt[:-1]]), tokenizer.encode_following([" " + response])
    expected = [*asked, *answer, tokenizer.eos_id]
    assert tokens.tolist() == expected * 2
    assert lengths.tolist() == [len(expected)] * 2
    assert [column.tolist() for column in prompts] == [[0, 1], [0, 0], [len(asked)] * 2]


def test_markers_are_one_token_where_the_tokenizer_has_it_and_text_elsewhere(tokenizer: Tokenizer) -> None:
    parts = [Part(START, False, True), Part(f"user\n{END}", False), Part(END, True, True)]
    tokens, _, prompts = encode_parts(tokenizer, [parts])
    ids = [tokenizer.index(name) for name in (START, END)]
    if None in ids:
        text = tokenizer.encode_beginnings([f"{START}user\n{END}"])[0]
        expected = [*text, *tokenizer.encode_following([END])[0], tokenizer.eos_id]
    else:
        text = np.array([tokenizer.bos_id, ids[0], *tokenizer.encode_following([f"user\n{END}"])[0]])
        expected = [*text, ids[1], tokenizer.eos_id]
        assert ids[1] not in text, "what somebody wrote is text"
    assert tokens.tolist() == expected
    assert (prompts.starts[0], prompts.stops[-1]) == (0, len(text))


@given(documents=st.lists(PARTS.filter(bool), max_size=4))
@settings(max_examples=examples(150), deadline=None)
def test_parts_spell_their_texts_and_nothing_else_is_a_prompt(
    tokenizer: Tokenizer, documents: list[list[Part]]
) -> None:
    tokens, lengths, prompts = encode_parts(tokenizer, documents)
    is_prompt = np.zeros(len(tokens), np.bool_)
    begins = np.concatenate([[0], np.cumsum(lengths)])
    for document, start, stop in zip(*prompts, strict=True):
        is_prompt[begins[document] + start : begins[document] + stop] = True
    names = [name for name in (START, END) if tokenizer.index(name) is not None]
    for i, parts in enumerate(documents):
        ids, prompt = tokens[begins[i] : begins[i + 1]], is_prompt[begins[i] : begins[i + 1]]
        kept = [p for p in parts if not (p.is_marker and p.text in names)]
        assert tokenizer.decode(ids).replace(" ", "") == "".join(p.text for p in kept).replace(" ", "")
        for wanted in (True, False):
            said = "".join(p.text for p in kept if p.is_response != wanted)
            assert tokenizer.decode(ids[prompt == wanted]).replace(" ", "") == said.replace(" ", "")
        assert (ids[-1], prompt[-1]) == (tokenizer.eos_id, not parts[-1].is_response)
        assert ids[0] == tokenizer.bos_id
        assert (encode_parts(tokenizer, [parts])[0] == ids).all(), "a document's ids do not depend on the others"
