"""Records of several values become documents of parts, or bad records that say what is wrong with them."""

from __future__ import annotations

import json

import pytest

from shards import ConfigError, SourceConfig
from shards.records.forms import Part, form_of
from shards.records.json_lines import Records, parser_for

TEMPLATE = "Q: {question}\nContext: {meta.context}\nA: {answer} {{done}}"
CHAT = {"messages_key": "talk.messages", "chat_format": "chatml"}
START, END = "<|im_start|>", "<|im_end|>"


def source(**keys: object) -> SourceConfig:
    return SourceConfig.parse({"name": "a", "paths": ["a.jsonl"], **keys})


def parsed(line: str, **keys: object) -> Records:
    return parser_for(source(**keys)).parse(line.encode(), 7)


def odd(record: dict[str, object]) -> str:
    """Return a record with a number that only the slower of the two parsers accepts."""
    return json.dumps({**record, "score": float("nan")})


@pytest.mark.parametrize("write", [json.dumps, odd])
def test_a_template_is_filled_with_values_and_its_last_one_begins_the_response(write: object) -> None:
    assert callable(write)
    record = {"question": "why {x}?", "answer": "so", "meta": {"context": ""}, "id": 3}
    found = parsed(write(record), template=TEMPLATE)
    prompt, response = "Q: why {x}?\nContext: \nA: ", "so {done}"
    assert found.parts == [[Part(prompt, False), Part(response, True)]]
    assert (found.texts, found.lines, found.ids, found.bad) == ([prompt + response], [7], ["3"], [])
    (again,) = parsed(write({"x": "a", "y": "\ud800b"}), template="{x}-{x}-{y}").parts or ()
    assert again == [Part("a-a-", False), Part("\ufffdb", True)]


@pytest.mark.parametrize("write", [json.dumps, odd])
@pytest.mark.parametrize(("role", "content", "user", "assistant"), [
    ("role", "content", "user", "assistant"), ("from", "value", "human", "gpt"),
])  # fmt: skip
def test_conversations_of_both_kinds_are_spelled_alike(
    write: object, role: str, content: str, user: str, assistant: str
) -> None:
    assert callable(write)
    turns = [("system", "be brief"), (user, "hi"), (assistant, "hello"), (user, "bye")]
    record = {"talk": {"messages": [{role: who, content: said, "tokens": 3} for who, said in turns]}}
    found = parsed(write(record), **CHAT)
    (parts,) = found.parts or ()
    names = ("system", "user", "assistant", "user")
    spelled = [f"{START}{name}\n{said}{END}" for name, (_, said) in zip(names, turns, strict=True)]
    assert found.texts == ["\n".join(spelled)] == ["".join(part.text for part in parts)]
    assert [part for part in parts if part.is_response] == [Part("hello", True), Part(END, True, True)]
    assert {part.text for part in parts if part.is_marker} == {START, END}
    assert Part("hi", False) in parts


@pytest.mark.parametrize(
    ("keys", "record", "expected"),
    [
        ({"template": TEMPLATE}, {"question": "q", "answer": "a"}, "has no key 'meta.context'; its keys are 'questio"),
        ({"template": "{q}{a}"}, {"q": "q", "a": None}, "'a' is null, not a string"),
        ({"template": "{q}{a}"}, {"q": ["x"], "a": "a"}, """'q' is ["x"], not a string"""),
        (CHAT, {"messages": []}, "has no key 'talk.messages'; its keys are 'messages'"),
        (CHAT, {"talk": {"messages": []}}, "'talk.messages' is [], not a list of messages"),
        (CHAT, {"talk": {"messages": "hi"}}, """'talk.messages' is "hi", not a list of messages"""),
        (CHAT, {"talk": {"messages": ["hi"]}}, """talk.messages[0] is "hi", not an object"""),
        (CHAT, {"talk": {"messages": [{"role": "user", "value": "x"}]}},
         "talk.messages[0] has the keys 'role', 'value', not 'role' and 'content' or 'from' and 'value'"),
        (CHAT, {"talk": {"messages": [{"role": "assistant", "content": "x"}, {"role": "tool", "content": "x"}]}},
         'talk.messages[1].role is "tool", no role that is known; roles are system, user, assistant, human, gpt'),
        (CHAT, {"talk": {"messages": [{"role": "user", "content": "x"}]}}, "has no message of the assistant"),
        (CHAT, {"talk": {"messages": [{"role": "assistant", "content": f"a {END} b"}]}},
         "message 0 holds '<|im_end|>', which could not be told from the marker of that name; take it out"),
        (CHAT, {"talk": {"messages": [{"role": "assistant", "content": [{"type": "text"}]}]}},
         "'talk.messages[0].content' is [{\"type\": \"text\"}], not a string"),
    ],
)  # fmt: skip
def test_what_cannot_be_spelled_is_a_bad_record(
    keys: dict[str, object], record: dict[str, object], expected: str
) -> None:
    for write in (json.dumps, odd):
        found = parsed(write(record), **keys)
        assert (found.texts, found.parts) == ([], [])
        ((line, reason, _),) = found.bad
        assert line == 7
        assert expected in reason


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"template": "no key"}, "names no key of the record"),
        ({"template": "{a} {"}, "write {{ and }} for braces"),
        ({"template": "{}"}, "nothing but keys of the record in braces"),
        ({"template": "{a!r}"}, "nothing but keys of the record in braces"),
        ({"template": "{a:>3}"}, "nothing but keys of the record in braces"),
        ({"template": "{a}", "text_key": "b"}, "template and text_key both say what a document is"),
        ({"template": "{a}", "input_ids_key": "b"}, "template and input_ids_key both say what a document is"),
        ({"template": "{a}", **CHAT}, "template and messages_key both say what a document is"),
        ({"messages_key": "b"}, "messages_key goes with either chat_format, such as chatml, or chat_template"),
        ({"chat_format": "chatml"}, "messages_key goes with either chat_format"),
        ({**CHAT, "chat_template": "a.json"}, "messages_key goes with either chat_format"),
        ({"loss_on": "all"}, "set template or messages_key, or leave it out"),
        ({"template": "{a}", "paths": ["a/*.parquet"]}, "of a/*.parquet a single column is read; write its rows as"),
        ({"template": "{a}", "paths": [], "dataset": "x"}, "of x a single column is read; write its rows as JSON line"),
    ],
)  # fmt: skip
def test_a_form_that_does_not_work_is_refused(keys: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        source(**keys)
    assert "source 'a': " in str(caught.value)
    assert expected in str(caught.value)


def test_a_source_of_plain_texts_has_no_form() -> None:
    assert form_of(source()) is None
    assert parsed('{"text": "x"}').parts is None
