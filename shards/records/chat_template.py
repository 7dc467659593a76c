"""A tokenizer's own chat template, as published in its tokenizer_config.json. chat_template -> forms.

The template is Jinja and is rendered as `transformers` renders it, but for the date, which it is not told: a document
must be the same on every day. Its responses are found by rendering the conversation up to each of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from shards.errors import ConfigError

_SAFE_JINJA = [3, 1, 6]  # templates could get out of the sandbox of older ones
_JINJA_FILE = "chat_template.jinja"  # where newer versions of transformers put the template, beside the other file


class Message(NamedTuple):
    """A message of a conversation."""

    role: str
    content: str


class Stretch(NamedTuple):
    """A part of a rendered conversation."""

    text: str
    is_response: bool
    is_marker: bool  # it is the name of a special token


class ChatTemplate:
    """The template of a file, ready to be rendered.

    Attributes:
        markers: the names of the tokenizer's special tokens.
        content_hash: hash of all that decides what is rendered.
    """

    def __init__(self, path: Path, at: str) -> None:
        """Compile the template of a tokenizer_config.json, named by the key `at`. Raises: ConfigError."""
        try:
            config = json.loads(path.read_bytes())
            source = _template_in(config) or path.with_name(_JINJA_FILE).read_text()
            named = {key: _name(config.get(key)) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
            added = config.get("added_tokens_decoder", {}).values()
            special = {token["content"] for token in added if token.get("special")} | set(named.values())
        except FileNotFoundError as error:
            raise ConfigError(
                f"{at}={path}: {error.filename} is not there; name a tokenizer_config.json that holds a chat_template"
            ) from None
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            raise ConfigError(f"{at}={path}: is no tokenizer_config.json: {error!r}") from None
        self.markers = tuple(sorted(special - {""}, key=lambda name: (-len(name), name)))  # none hides a longer one
        self._special = {key: name for key, name in named.items() if name}
        self.content_hash = xxhash.xxh3_128_hexdigest(json.dumps([source, self._special, self.markers]).encode())
        self._template = _compiled(source, f"{at}={path}")
        self._marker = re.compile("(" + "|".join(map(re.escape, self.markers)) + ")") if self.markers else None

    def stretches(self, messages: Sequence[Message]) -> list[Stretch]:
        """Render a conversation. Raises: ValueError with what the template or this way of rendering it refuses."""
        for i, message in enumerate(messages):
            if self._marker and (found := self._marker.search(message.content)):
                raise ValueError(
                    f"message {i} holds {found[0]!r}, the name of a special token, which a chat template cannot tell "
                    "from its own; take it out of the text"
                )
        whole, place = self._rendered(messages, False), 0
        stretches: list[Stretch] = []
        for i, message in enumerate(messages):
            if message.role != "assistant":
                continue
            asked, answered = self._rendered(messages[:i], True), self._rendered(messages[: i + 1], False)
            if not (whole.startswith(answered) and answered.startswith(asked) and place <= len(asked)):
                raise ValueError(
                    f"message {i} is spelled otherwise where it is the last one, so that the template does not say "
                    "which tokens are its; use chat_format, or leave such conversations out"
                )
            stretches += self._divided(whole[place : len(asked)], False)
            stretches += self._divided(whole[len(asked) : len(answered)], True)
            place = len(answered)
        return [*stretches, *self._divided(whole[place:], False)]

    def _divided(self, text: str, is_response: bool) -> Iterator[Stretch]:
        """Yield a text's markers and what is between them."""
        for i, part in enumerate(self._marker.split(text) if self._marker else [text]):
            if part:
                yield Stretch(part, is_response, is_marker=i % 2 == 1)

    def _rendered(self, messages: Sequence[Message], asks: bool) -> str:
        """Return the text of a conversation. Args: asks: whether it ends with the beginning of a response."""
        values: dict[str, Any] = {"tools": None, "documents": None, "add_generation_prompt": asks, **self._special}
        try:
            text: str = self._template.render(messages=[message._asdict() for message in messages], **values)
        except Exception as error:  # a template may fail in any way
            raise ValueError(f"the chat template refuses it: {error}") from None
        return text


def _template_in(config: dict[str, Any]) -> str | None:
    """Return the template of a tokenizer_config.json, of several the one called default; None if it has none."""
    found = config.get("chat_template")
    if isinstance(found, list):
        return {one["name"]: one["template"] for one in found}.get("default")
    return found if isinstance(found, str) else None


def _name(token: object) -> str:
    """Return the name of a special token, which may be an object; empty if there is none."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else ""


def _compiled(source: str, at: str) -> Any:
    """Compile a template in the sandbox and with the options of transformers. Raises: ConfigError."""
    try:
        from jinja2 import TemplateError, TemplateSyntaxError, __version__, nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.parser import Parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        __version__ = ""
    if [int(number) for number in re.findall(r"\d+", __version__)[:3]] < _SAFE_JINJA:
        raise ConfigError(
            f"{at}: chat templates need Jinja, in a version that keeps what they do in its sandbox; "
            "pip install 'jinja2>=3.1.6'"
        )

    class Generation(Extension):
        """The block by which some templates mark responses for transformers, rendered as what is in it."""

        tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: object, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    sandbox.globals["raise_exception"], sandbox.filters["tojson"] = raise_exception, tojson
    try:
        return sandbox.from_string(source)
    except TemplateSyntaxError as error:
        raise ConfigError(f"{at}: its chat_template is no Jinja: {error}") from None
