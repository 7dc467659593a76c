"""Write docs/configuration.md from the config classes themselves: `python docs/make_configuration.py`.

A key's type, default and bounds come from the class, its meaning from the comment above or behind the field in the
source, and whether it may change from the rules that a resumed run is held to. `--check` writes nothing and exits with
1 if the page is stale.
"""

from __future__ import annotations

import argparse
import ast
import functools
import inspect
import io
import os
import re
import sys
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed probes for a device and warns of finding none

import annotated_types
from pydantic import Discriminator, JsonValue, TypeAdapter
from pydantic.fields import FieldInfo

from pretrain.config import RunConfig
from pretrain.config_changes import may_change
from shards import Config
from shards.suites.suite import SuiteFile

PAGE = Path(__file__).with_name("configuration.md")
MIB = 1 << 20

_PLAIN = {
    int: "whole number",
    float: "number",
    bool: "`true` or `false`",
    str: "text",
    Path: "path",
    type(None): "`null`",
    JsonValue: "any value",
}
_LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}  # keyed by annotated_types' names

HEAD = """\
<!-- Written by `python docs/make_configuration.py` from the config classes. Edit the comments there, not this page. -->

# Configuration

This page lists every key of a run's YAML file, in the order of the classes that check it. [data.md](data.md),
[evaluation.md](evaluation.md) and [clusters.md](clusters.md) explain how to choose the values;
[quickstart.yaml](../configs/quickstart.yaml) is a complete example.

- Override a key on the command line with `key.path=value`. An item of a list is named by its position, as in
  `data.sources.0.weight=0.5`.
- `--print-config` shows the whole config with its defaults, and the DeepSpeed config that follows from it.
- An unknown key, a wrong type or an impossible combination ends the run before it starts, with a message that names the
  key, the value and what would be right. Types are strict: `8` is a whole number, `"8"` and `8.0` are not.
- **Resume** says what happens when a run resumes with another value of the key. *Free*: the new value applies from then
  on, and the log names the change. *Fixed*: the start is refused, because the change would corrupt the run; give the
  new run another `run.name`, fork the run, or start over with `--fresh`. *Free until it begins*: a stage in the future
  may be edited, one in the past may not. Some free keys of `data` are compared by what they lead to:
  files may move, for example, as long as their contents stay the same.
- What a stage shares with the run, such as `data.sources`, is described once, under the run's own key. In a stage, keys
  that are *fixed* there are *free until it begins*.
"""

SUITE_HEAD = """\
## A suite's YAML file

`evaluation.suite` and `data.decontaminate.suite` name a folder or a YAML file with these keys;
[evaluation.md](evaluation.md#suites) describes both.
"""


class Key(NamedTuple):
    """One row of the page."""

    path: str  # for example data.sources[].weight
    kind: str
    bounds: str  # empty if the type's values are not restricted
    default: str
    meaning: str  # empty if the source has no comment


class Section(NamedTuple):
    """A config class and its place in the tree."""

    path: str  # empty for the root
    config: type[Config]
    chosen_by: str = ""  # the key and value that choose this class among several for one place

    @property
    def title(self) -> str:
        return f"`{self.path}`" + (f" with `{self.chosen_by}`" if self.chosen_by else "")


def sections(config: type[Config], path: str = "", chosen_by: str = "") -> Iterator[Section]:
    """Yield a config class and all those below it, depth first, in the order of their fields."""
    yield Section(path, config, chosen_by)
    for name, field in config.model_fields.items():
        for inner in _sections_of(field, _join(path, name)):
            yield from sections(inner.config, inner.path, inner.chosen_by)


def _sections_of(field: FieldInfo, path: str) -> Iterator[Section]:
    """Yield the sections that a key has, several if another key inside it chooses one."""
    key = next((item.discriminator for item in _metadata_of(field) if isinstance(item, Discriminator)), None)
    for inner, suffix in _inner_configs(field.annotation):
        chosen_by = f"{key}: {inner.model_fields[key].default}" if isinstance(key, str) else ""
        yield Section(f"{path}{suffix}", inner, chosen_by)


def _metadata_of(field: FieldInfo) -> Iterator[Any]:
    """Yield what is said of a field's type beside the type itself, also where `null` may stand in its place."""
    yield from field.metadata
    for argument in typing.get_args(field.annotation):
        if typing.get_origin(argument) is typing.Annotated:
            yield from argument.__metadata__


def keys(section: Section) -> list[Key]:
    """Collect the row of each key of a section."""
    meanings = comments(section.config)
    return [
        Key(
            path=_join(section.path, name),
            kind=_in_words(field.annotation),
            bounds=", ".join([*_bounds(field.metadata), *_inner_bounds(field.annotation)]),
            default=_default(field),
            meaning=meanings.get(name, ""),
        )
        for name, field in section.config.model_fields.items()
    ]


def comments(config: type[Config]) -> dict[str, str]:
    """Read the comments on a class's fields: the lines directly above a field, then those behind it.

    Returns:
        Returns the text of each field that has a comment, as one line.
    """
    texts = {}
    for owner in reversed(config.__mro__):
        if issubclass(owner, Config):
            texts |= _own_comments(owner)
    return texts


def _own_comments(config: type[Config]) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(config))
    (class_node,) = ast.parse(source).body
    assert isinstance(class_node, ast.ClassDef)
    lines = source.splitlines()
    found = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    alone = {number for number in found if lines[number - 1].lstrip().startswith("#")}
    texts = {}
    for node in class_node.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        first = node.lineno
        while first - 1 in alone:
            first -= 1
        assert node.end_lineno is not None
        above = " ".join(found[number] for number in range(first, node.lineno))
        behind = " ".join(found[number] for number in range(node.lineno, node.end_lineno + 1) if number in found)
        if above or behind:
            texts[node.target.id] = f"{above.rstrip('.')}. {_sentence(behind)}" if above and behind else above or behind
    return texts


def undocumented() -> list[str]:
    """Name the keys whose field has no comment. A section needs none, since its class has a docstring."""
    return [
        key.path
        for root in (RunConfig, SuiteFile)
        for section in sections(root)
        for key in keys(section)
        if not key.meaning and not _below(section, key)
    ]


def page() -> str:
    """Put the whole page together."""
    parts, before = [HEAD], None
    for section in sections(RunConfig):
        if section.title != _titles()[section.config]:
            continue  # a stage has it too
        title = f"## {section.title}\n\n" if section.path else "## The top level\n\n"
        title *= section.title != before  # one key may hold either of two sections
        parts.append(f"{title}{_docstring(section.config)}\n\n{_table(section, resumes=True)}")
        before = section.title
    parts.append(SUITE_HEAD)
    for section in sections(SuiteFile):
        title = f"### `{section.path}`\n\n" if section.path else ""
        parts.append(f"{title}{_docstring(section.config)}\n\n{_table(section, resumes=False)}")
    return "\n".join(parts)


def _table(section: Section, resumes: bool) -> str:
    columns = ["key", "type", "default", *(["resume"] if resumes else []), "meaning"]
    rows = [columns, ["---"] * len(columns)]
    for key in keys(section):
        meaning = key.meaning
        if below := _below(section, key):
            meaning = f"{meaning}. See {below}" if meaning else f"See {below}"
        rows.append(
            [
                f"`{key.path}`",
                ", ".join(filter(None, (key.kind, key.bounds))),
                key.default,
                *([_on_resume(section, key)] if resumes else []),
                _sentence(meaning),
            ]
        )
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)


def _below(section: Section, key: Key) -> str:
    """Link to the section of a key that has one; return an empty text for a key that holds a value."""
    field = section.config.model_fields[key.path.rpartition(".")[2]]
    titles = dict.fromkeys(_titles()[inner.config] for inner in _sections_of(field, key.path))
    return ", ".join(f"[{title}](#{_anchor(title)})" for title in titles)


@functools.cache
def _titles() -> dict[type[Config], str]:
    """Map each class to the title under which the page describes it: that of the first section that has it."""
    titles: dict[type[Config], str] = {}
    for root in (RunConfig, SuiteFile):
        for section in sections(root):
            titles.setdefault(section.config, section.title)
    return titles


def _anchor(title: str) -> str:
    """Return the name that GitHub gives a heading."""
    return re.sub(r"[^a-z0-9_-]", "", title.lower().replace(" ", "-"))


def _on_resume(section: Section, key: Key) -> str:
    if _below(section, key) and key.kind == "mapping":
        return ""  # each key of the section has its own entry
    if may_change(key.path.replace("[]", ".0")):
        return "free"
    return "free until it begins" if key.path.startswith("stages") else "fixed"


def _inner_configs(annotation: Any) -> Iterator[tuple[type[Config], str]]:
    """Yield the config classes that an annotation mentions, each with `[]` if it is in a list."""
    if inspect.isclass(annotation) and issubclass(annotation, Config):
        yield annotation, ""
    elif typing.get_origin(annotation) is not Literal:
        suffix = "[]" if typing.get_origin(annotation) is tuple else ""
        for argument in typing.get_args(annotation):
            for config, below in _inner_configs(argument):
                yield config, suffix + below


def _in_words(annotation: Any) -> str:
    """Describe an annotation as a user of YAML would."""
    words = list(dict.fromkeys(_alternatives(annotation)))
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _alternatives(annotation: Any) -> Iterator[str]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _PLAIN:
        yield _PLAIN[annotation]
    elif inspect.isclass(annotation) and issubclass(annotation, Config):
        yield "mapping"
    elif origin is typing.Annotated:
        yield from _alternatives(arguments[0])
    elif origin is Literal:
        yield from (f"`{value}`" for value in arguments)
    elif origin in (typing.Union, types.UnionType):
        for argument in arguments:
            yield from _alternatives(argument)
    elif origin is tuple:
        counted = "list" if Ellipsis in arguments else f"list of {len(arguments)}"
        yield f"{counted}, each: {_in_words(arguments[0])}"
    elif origin is dict:
        yield f"mapping, each value: {_in_words(arguments[1])}"
    else:
        raise TypeError(f"no words for the type {annotation!r}; add them to {__file__}")


def _bounds(metadata: Sequence[Any]) -> Iterator[str]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _bounds(item.metadata)
        elif isinstance(item, annotated_types.MinLen):
            yield "not empty"
        elif pattern := getattr(item, "pattern", None):
            yield f"matching `{pattern}`"
        else:
            yield from (
                f"{words} {_number(getattr(item, name))}" for name, words in _LIMITS.items() if hasattr(item, name)
            )


def _inner_bounds(annotation: Any) -> Iterator[str]:
    """Yield the bounds inside an annotation, each once."""
    if typing.get_origin(annotation) is Literal:
        return
    own = _bounds(getattr(annotation, "__metadata__", ()))
    inner = (text for part in typing.get_args(annotation)[:2] for text in _inner_bounds(part))
    yield from dict.fromkeys([*own, *inner])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Config):
        return ""  # each key of the section has its own
    written = TypeAdapter[object](field.rebuild_annotation()).dump_python(value, mode="json")  # as in config.yaml
    if isinstance(written, int) and not isinstance(written, bool):
        return _number(written)
    return f"`{_yaml(written)}`"


def _number(value: float) -> str:
    """Format a number, adding a readable form where it has many digits."""
    if isinstance(value, int) and value >= MIB:
        reading = f"{value // MIB} MiB" if value % MIB == 0 else f"{value:,}"
        return f"`{value}` ({reading})"
    return f"`{_yaml(value)}`"


def _yaml(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, str) and value != value.strip():
        return f'"{value}"'
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value)


def _docstring(config: type[Config]) -> str:
    return textwrap.fill(" ".join((inspect.getdoc(config) or "").split()), 120)


def _sentence(text: str) -> str:
    """Capitalize a comment, unless it begins with a name or a value, and write None as YAML does."""
    text = re.sub(r"\bNone\b", "`null`", text)
    return text[:1].upper() + text[1:] if text[:1].islower() and text.split()[0].isalpha() else text


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is stale")
    written = page()
    if not parser.parse_args().check:
        PAGE.write_text(written)
    elif not PAGE.exists() or PAGE.read_text() != written:
        print(f"{PAGE.name} is stale: run `python docs/make_configuration.py`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
