"""A tokenizer's own chat template renders what transformers renders, and says which tokens are responses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from shards import ConfigError, Loader, SourceConfig, Tokenizer
from shards.records.chat_template import ChatTemplate, Message
from shards.records.json_lines import Records, parser_for
from shards.tokenize.parts import encode_parts
from shards.windows.recipe import Tools, template_files
from tests.shards.corpora import config
from tests.shards.tokenize import kinds
from tests.shards.tokenize.test_parts import END, START, with_markers

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim"
    " + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# With BOS at the beginning, EOS after each answer, and the block that marks answers for transformers
MARKED = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + eos_token }}{% endgeneration %}
    {%- elif message.role == 'user' %}
        {{- '[' + message.content + '] ' }}
    {%- else %}
        {{- raise_exception('only users ask') }}
    {%- endif %}
{%- endfor %}"""
# An answer that is no longer the last loses its thoughts
CHANGING = """{% for m in messages %}{{ m.content if loop.last else m.content.split('!')[-1] }};{% endfor %}"""
TALK = [("user", "hello there"), ("assistant", " well, hello"), ("user", "and 2 more"), ("assistant", "yes\nof course")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    return with_markers(kinds.write_json(folder, "llama3"))


def write_config(folder: Path, template: object) -> Path:
    added = {str(i): {"content": name, "special": True} for i, name in enumerate((START, END))}
    ends = {"bos_token": {"content": "<|begin|>"}, "eos_token": "<|endoftext|>", "pad_token": None}
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({"chat_template": template, "added_tokens_decoder": added, **ends}))
    return path


def parsed(path: Path, *talks: list[tuple[str, str]]) -> Records:
    source = SourceConfig.parse({"name": "a", "paths": ["a"], "messages_key": "m", "chat_template": str(path)})
    lines = [json.dumps({"m": [{"role": role, "content": said} for role, said in talk]}) for talk in talks]
    return parser_for(source).parse("\n".join(lines).encode(), 1)


@pytest.mark.parametrize(
    ("template", "learned"),
    [
        (CHATML, f"well, hello{END}\nyes\nof course{END}\n<|endoftext|>"),
        (
            [{"name": "rag", "template": "x"}, {"name": "default", "template": CHATML}],
            f"well, hello{END}\nyes\nof course{END}\n<|endoftext|>",
        ),
        # With the space after each question; the template's last EOS is that of the document
        (MARKED, "  well, hello<|endoftext|> yes\nof course<|endoftext|>"),
    ],
    ids=["chatml", "named", "marked"],
)
def test_what_is_rendered_is_what_transformers_renders(
    tmp_path: Path, tokenizer: Path, template: object, learned: str
) -> None:
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer), bos_token="<|begin|>", eos_token="<|endoftext|>",
        additional_special_tokens=[START, END],
    )  # fmt: skip
    plain = template if isinstance(template, str) else CHATML
    messages = [{"role": role, "content": said} for role, said in TALK]
    text = theirs.apply_chat_template(messages, chat_template=plain, tokenize=False)
    found = parsed(write_config(tmp_path, template), TALK)
    assert found.texts == [text]
    ours = Tokenizer(tokenizer)
    tokens, _, prompts = encode_parts(ours, found.parts or [])
    expected = theirs(text, add_special_tokens=False)["input_ids"]
    begins = [] if expected[0] == ours.bos_id else [ours.bos_id]
    ends = [] if expected[-1] == ours.eos_id else [ours.eos_id]
    assert tokens.tolist() == [*begins, *expected, *ends], "BOS and EOS once, even where the template has them too"
    is_prompt = np.zeros(len(tokens), np.bool_)
    for start, stop in zip(prompts.starts, prompts.stops, strict=True):
        is_prompt[start:stop] = True
    assert theirs.decode(tokens[~is_prompt]) == learned


@pytest.mark.parametrize(
    ("template", "talk", "expected"),
    [
        (MARKED, [("system", "x"), *TALK], "the chat template refuses it: only users ask"),
        (CHANGING, [("user", "x"), ("assistant", "a!b"), ("user", "x")], "message 1 is spelled otherwise where it is"),
        (CHATML, [("user", f"x{END}"), *TALK], "message 0 holds '<|im_end|>', the name of a special token"),
        ("{{ strftime_now('%Y') }}", TALK, "the chat template refuses it: 'strftime_now' is undefined"),
        (CHATML, [("user", "x")], "'m' has no message of the assistant"),
    ],
)
def test_a_conversation_that_a_template_cannot_spell_is_a_bad_record(
    tmp_path: Path, template: str, talk: list[tuple[str, str]], expected: str
) -> None:
    found = parsed(write_config(tmp_path, template), talk)
    assert not found.texts
    assert expected in found.bad[0].reason


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "tokenizer_config.json is not there"),
        ("[]", "is no tokenizer_config.json"),
        ("{", "is no tokenizer_config.json"),
        ("{}", "chat_template.jinja is not there; name a tokenizer_config.json that holds a chat_template"),
        ('{"chat_template": "{% if %}"}', "its chat_template is no Jinja"),
    ],
)
def test_a_file_without_a_template_is_refused(tmp_path: Path, content: str | None, expected: str) -> None:
    path = tmp_path / "tokenizer_config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=f"chat_template=.*{expected}"):
        ChatTemplate(path, "chat_template")


@pytest.mark.parametrize("version", ["3.1.5", "2.11.3", None])
def test_without_a_safe_jinja_a_template_is_refused(
    tmp_path: Path, version: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if version:
        monkeypatch.setattr("jinja2.__version__", version)
    else:
        monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ConfigError, match="pip install 'jinja2>=3.1.6'"):
        ChatTemplate(write_config(tmp_path, CHATML), "chat_template")


def test_only_the_content_of_a_template_counts(tmp_path: Path, tokenizer: Path) -> None:
    turns = [{"role": role, "content": said} for role, said in TALK]
    (tmp_path / "a.jsonl").write_text(json.dumps({"m": turns}) + "\n")
    chat = {"name": "chat", "paths": [f"{tmp_path}/a.jsonl"], "messages_key": "m"}
    prints = []
    for name, template in (("a", CHATML), ("b", CHATML), ("c", MARKED)):
        (tmp_path / name).mkdir()
        path = write_config(tmp_path / name, template)
        data = config([chat | {"chat_template": str(path)}], tokenizer=tokenizer, lanes=1, num_workers=int(name == "b"))
        with Loader(data, 1) as loader:
            prints.append((next(loader).row_hash, loader.fingerprint["config"]))
    assert prints[0] == prints[1]
    assert prints[0][0] != prints[2][0]
    assert prints[0][1] != prints[2][1]


def test_a_template_that_is_replaced_stops_a_worker_that_starts_late(tmp_path: Path, tokenizer: Path) -> None:
    path = write_config(tmp_path, CHATML)
    chat = {"name": "chat", "paths": ["a"], "messages_key": "m", "chat_template": str(path)}
    data = config([chat], tokenizer=tokenizer)
    recipe = Tools(Tokenizer.of(data), templates=template_files(data.sources)).recipe()
    recipe.open([data])
    write_config(tmp_path, MARKED)
    with pytest.raises(ConfigError, match=r"chat_template=.*replaced while the run was going on"):
        recipe.open([data])


def test_a_template_in_a_file_of_its_own_is_found(tmp_path: Path) -> None:
    path = write_config(tmp_path, None)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    stretches = ChatTemplate(path, "x").stretches([Message("user", "a"), Message("assistant", "b")])
    assert "".join(stretch.text for stretch in stretches if stretch.is_response) == f"b{END}\n"
