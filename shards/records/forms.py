"""The values of a record, such as an instruction and its answer -> the parts of a document. forms -> json_lines.

A document is what its parts spell, one after the other. Which of them are responses is known from here on; each is
tokenized by itself (`tokenize/parts.py`), as it would be when a model is asked for it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from shards.config import SourceConfig, template_fields
from shards.records.chat_template import ChatTemplate, Message

FORM_VERSION = 1  # raise it whenever the same records would give other parts, or the same parts other tokens
_START, _END = "<|im_start|>", "<|im_end|>"
# Names of roles in records of OpenAI's form and of ShareGPT's -> those that a format spells
_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
_MESSAGE_KEYS = (("role", "content"), ("from", "value"))


class Part(NamedTuple):
    """A stretch of a document's text."""

    text: str
    is_response: bool  # else it belongs to a prompt
    is_marker: bool = False  # the name of a special token, which it becomes if the tokenizer has one of that name


class Form(Protocol):
    """How a source's documents are spelled.

    Attributes:
        keys: the keys of a record whose values are asked for; each may be dotted.
        markers: the names of special tokens among its parts.
    """

    @property
    def keys(self) -> tuple[str, ...]: ...

    @property
    def markers(self) -> tuple[str, ...]: ...

    def parts(self, values: Sequence[object]) -> list[Part]:
        """Spell a document. Args: values: those of `keys`. Raises: ValueError with what is wrong with them."""


class Template:
    """A text with keys of the record in braces: what comes before the last of them is the prompt."""

    markers = ()

    def __init__(self, template: str) -> None:
        """Take a template that its config has checked."""
        self._fields = template_fields(template)
        self._last = max(i for i, (_, key) in enumerate(self._fields) if key is not None)
        self.keys = tuple(dict.fromkeys(key for _, key in self._fields if key is not None))

    def parts(self, values: Sequence[object]) -> list[Part]:
        """Fill in the values, which must be strings."""
        texts = {key: _string(key, value) for key, value in zip(self.keys, values, strict=True)}
        spelled = [(literal, "" if key is None else texts[key]) for literal, key in self._fields]
        last, response = spelled[self._last]
        prompt = "".join(map("".join, spelled[: self._last])) + last
        return [Part(prompt, False), Part(response + "".join(map("".join, spelled[self._last + 1 :])), True)]


class ChatML:
    """A conversation in ChatML, <|im_start|>ROLE, line feed, content, <|im_end|>, with a line feed between messages.

    A response is the content of a message of the assistant, with the marker that ends it.
    """

    markers = (_START, _END)

    def __init__(self, messages_key: str) -> None:
        self.keys = (messages_key,)

    def parts(self, values: Sequence[object]) -> list[Part]:
        """Spell the messages, at least one of which must be the assistant's."""
        messages = _messages(self.keys[0], values[0])
        parts: list[Part] = []
        for number, (role, content) in enumerate(messages):
            if forged := next((marker for marker in self.markers if marker in content), None):
                raise ValueError(
                    f"message {number} holds {forged!r}, which could not be told from the marker of that name; take it"
                    " out of the text"
                )
            parts += [Part("\n", False)] if number else []
            parts += [Part(_START, False, True), Part(f"{role}\n", False)]
            parts += [Part(content, role == "assistant"), Part(_END, role == "assistant", True)]
        return parts


class OwnChat:
    """A conversation as a tokenizer's own chat template spells it."""

    def __init__(self, messages_key: str, template: ChatTemplate) -> None:
        self.keys, self.markers, self._template = (messages_key,), template.markers, template

    def parts(self, values: Sequence[object]) -> list[Part]:
        """Spell the messages, at least one of which must be the assistant's."""
        return [Part(*stretch) for stretch in self._template.stretches(_messages(self.keys[0], values[0]))]


def form_of(source: SourceConfig) -> Form | None:
    """Return how a source's documents are spelled; None if each is one text. Raises: ConfigError as `ChatTemplate`."""
    if source.template is not None:
        return Template(source.template)
    if source.messages_key is None:
        return None
    template = _chat_template_of(source)
    return OwnChat(source.messages_key, template) if template else ChatML(source.messages_key)


def identity_of(source: SourceConfig) -> dict[str, str]:
    """Return what decides how a source's documents are spelled, with a file's hash in place of its path."""
    template = _chat_template_of(source)
    return source.form | ({"chat_template": template.content_hash} if template else {})


def _chat_template_of(source: SourceConfig) -> ChatTemplate | None:
    at = f"source {source.name!r}: chat_template"
    return None if source.chat_template is None else ChatTemplate(source.chat_template, at)


def _messages(key: str, value: object) -> list[Message]:
    """Return the messages under a key. Raises: ValueError with what is wrong with one."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key!r} is {_shown(value)}, not a list of messages")
    messages = [_message(f"{key}[{i}]", message) for i, message in enumerate(value)]
    if all(role != "assistant" for role, _ in messages):
        raise ValueError(f"{key!r} has no message of the assistant, so there is no response to learn")
    return messages


def _message(at: str, message: object) -> Message:
    """Return a message, with its role in the terms of OpenAI. Args: at: its place in the record."""
    if not isinstance(message, dict):
        raise ValueError(f"{at} is {_shown(message)}, not an object")
    for role_key, content_key in _MESSAGE_KEYS:
        if role_key in message and content_key in message:
            role = message[role_key]
            if not isinstance(role, str) or role not in _ROLES:
                known = ", ".join(_ROLES)
                raise ValueError(f"{at}.{role_key} is {_shown(role)}, no role that is known; roles are {known}")
            return Message(_ROLES[role], _string(f"{at}.{content_key}", message[content_key]))
    pairs = " or ".join(f"{role_key!r} and {content_key!r}" for role_key, content_key in _MESSAGE_KEYS)
    raise ValueError(f"{at} has the keys {', '.join(map(repr, message))}, not {pairs}")


def _string(at: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{at!r} is {_shown(value)}, not a string")
    return value


def _shown(value: object) -> str:
    return json.dumps(value)[:40]
