"""Read a YAML file and `key.path=value` overrides into one plain tree, and note where each key was written.

file -> config_file -> config. YAML is read as version 1.2, since PyYAML's 1.1 has traps: there
`3e-4` is a string, `off` is false, `12:30` is 750.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from shards import ConfigError

Tree = dict[str, Any]
Origins = dict[str, str]  # key path -> "file:line" or "command line"

_INT = re.compile(r"[-+]?[0-9][0-9_]*$|0x[0-9a-fA-F]+$")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)
_BOOL = re.compile(r"true$|True$|TRUE$|false$|False$|FALSE$")
_NULL = re.compile(r"~$|null$|Null$|NULL$|$")
# The order matters: the first match wins, and every int looks like a float.
_SCALARS = (("null", _NULL), ("bool", _BOOL), ("int", _INT), ("float", _FLOAT), ("merge", re.compile(r"<<$")))


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2, and without silently accepting a key twice."""

    yaml_implicit_resolvers: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - typed so by PyYAML

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        first: dict[object, int] = {}
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in first and key != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} appears twice, first in line {first[key]}", key_node.start_mark
                )
            first[key] = line
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes exactly those strings that _Loader would take for something else."""

    yaml_implicit_resolvers: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - typed so by PyYAML


for _name, _pattern in _SCALARS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, None)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, None)
# int("010") is ten, whereas YAML 1.1's constructor reads octal.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value, 16 if "x" in node.value else 10))


def dump(tree: Tree) -> str:
    """Write a tree as YAML that `read_tree` reads back."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def read_tree(path: Path, overrides: Sequence[str] = ()) -> tuple[Tree, Origins]:
    """Read a file and apply `key.path=value` overrides; a number in a path is a position in a list.

    Raises:
        ConfigError: if the file cannot be read or parsed, or an override does not fit. Keys and values are not checked.
    """
    tree, origins = _parse(_text_of(path), str(path)) or ({}, {})
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a config is a mapping of sections such as `model:`, not {tree!r}")
    for override in overrides:
        origins[set_value(tree, override)] = "command line"
    return tree, origins


def set_value(tree: Tree, override: str) -> str:
    """Apply one `key.path=value` to a tree, and return its key. Raises: ConfigError if it does not fit."""
    key, value = _split(override)
    _set(tree, key.split("."), value, override)
    return key


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except FileNotFoundError:
        there = [str(other) for other in sorted(path.parent.glob("*.y*ml"))]
        near = difflib.get_close_matches(str(path), there, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(there)}" if there else ""
        raise ConfigError(f"{path}: no such file{hint}") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def _parse(text: str, where: str) -> tuple[Any, Origins] | None:
    """Return the content of a YAML text and the line of each key; None if it is empty."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        origins: Origins = {}
        _note_lines(node, "", where, origins)
        # Copied through JSON, since an alias shares its value with the anchor and an override would change both.
        return json.loads(json.dumps(loader.construct_document(node))), origins
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{where}{line}: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from None
    finally:
        loader.dispose()


def _note_lines(node: yaml.Node, path: str, where: str, origins: Origins) -> None:
    if path:
        origins.setdefault(path, f"{where}:{node.start_mark.line + 1}")
    below: list[tuple[str, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        below = [(key.value, key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)]
    elif isinstance(node, yaml.SequenceNode):
        below = [(str(i), item, item) for i, item in enumerate(node.value)]
    for name, named, value in below:
        key = f"{path}.{name}" if path else name
        origins[key] = f"{where}:{named.start_mark.line + 1}"  # the key's line; its value may begin further down
        _note_lines(value, key, where, origins)


def _split(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key or any(not part for part in key.split(".")):
        raise ConfigError(f"{override!r} is no override; write key.path=value, for example optim.learning_rate=3e-4")
    parsed = _parse(text, f"override {override!r}")
    return key, parsed[0] if parsed else None


def _set(tree: Any, path: Sequence[str], value: object, override: str) -> None:
    """Set one value in nested dicts and lists, creating missing sections."""
    node = tree
    for i, part in enumerate(path):
        last = i == len(path) - 1
        parent = ".".join(path[:i])
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                raise ConfigError(
                    f"override {override!r}: {parent} is a list of {len(node)}; "
                    f"name an item by its number, 0 to {len(node) - 1}, or set all of {parent}"
                )
            if last:
                node[int(part)] = value
            node = node[int(part)]
        elif isinstance(node, dict):
            if last:
                node[part] = value
            elif node.get(part) is None:
                node[part] = {}
            node = node[part]
        else:
            raise ConfigError(f"override {override!r}: {parent} is {node!r}, which has no {part!r}")
