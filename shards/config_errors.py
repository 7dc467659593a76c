"""Explain what is wrong in a config so that the user can correct it. config -> config_errors -> the user."""

from __future__ import annotations

import difflib
import json
import typing
from collections.abc import Iterator, Mapping, Sequence

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails


def explain(
    error: ValidationError,
    root: type[BaseModel],
    at: str = "",
    origins: Mapping[str, str] | None = None,
    file: str = "",
) -> list[str]:
    """Explain each finding in one line: where it is, the key, the value, and what would be right.

    Args:
        error: what pydantic found in a tree.
        root: the class of the tree.
        at: the key that holds the tree; empty for a whole config.
        origins: key path -> where it was written.
        file: the place to report for missing keys, which were written nowhere; if empty, lines begin with the key.
    """
    above = (at,) if at else ()
    findings: dict[tuple[str, ...], list[ErrorDetails]] = {}
    for item in error.errors():
        path = (*_key_path(root, item["loc"]), *_discriminator(item))
        findings.setdefault(path, []).append(item)
    lines = []
    for path, items in findings.items():
        if any(other[: len(path)] == path and other != path for other in findings):
            continue  # the deeper finding is the cause
        keys = [".".join((*above, *path[:n])) for n in range(len(path), 0, -1)]
        where = next((origins[key] for key in keys if key in origins), file) if origins else file
        lines += [f"{where}: {line}" if where else line for line in _sentence(root, above, path, items).splitlines()]
    return lines


def multiples_near(value: int, of: int) -> str:
    """List the multiples of a number on either side of a value."""
    below = value // of * of
    return listed([n for n in (below, below + of) if n])


def not_divisible(key: str, value: int, by_key: str, by: int) -> Iterator[str]:
    """Yield what is wrong with a key's value that another's does not divide."""
    if value % by:
        near, divisors = multiples_near(value, by), listed([n for n in range(1, value + 1) if value % n == 0])
        yield (
            f"{key}={value} cannot be split by {by_key}={by}; make {key} a multiple, such as {near}, "
            f"or {by_key} a divisor: {divisors}"
        )


def listed(numbers: Sequence[int]) -> str:
    """List numbers as in a sentence, cut off after sixteen."""
    shown = [str(n) for n in numbers[:16]]
    return " or ".join(shown) if len(shown) == 2 else ", ".join(shown) + (", ..." if len(numbers) > 16 else "")


def _sentence(
    root: type[BaseModel], above: tuple[str, ...], path: tuple[str, ...], items: Sequence[ErrorDetails]
) -> str:
    """Explain what pydantic found about one key; a union has one finding for each of its members."""
    first, key = items[0], ".".join((*above, *path))
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key; {_suggestion(root, above, path, _models_at(root, first['loc'][:-1]))}"
    if first["type"] == "missing":
        return f"{key}: missing, and it has no default"
    if first["type"] == "value_error":
        message = first["msg"].removeprefix("Value error, ")
        return f"{key}: {message}" if key else message  # findings about the whole tree name their keys
    if first["type"] == "union_tag_invalid":
        return f"{key}: {json.dumps(first['ctx']['tag'])} is wrong; it should be one of {first['ctx']['expected_tags']}"
    wanted = dict.fromkeys(_wanted(item) for item in items)
    return f"{key}: {json.dumps(first['input'], default=str)} is wrong; it should be {' or '.join(wanted)}"


def _wanted(item: ErrorDetails) -> str:
    plain = {
        "bool": "true or false",
        "int": "a whole number, without a point or exponent",
        "float": "a number",
        "model": "a section with keys of its own",
        "dict": "a section with keys of its own",
        "tuple": "a list",
        "string": "text",
        "path": "a path",
    }
    kind, _, finding = item["type"].partition("_")
    if finding in ("type", "parsing", "from_float", "attributes_type") and kind in plain:
        return plain[kind]
    if item["type"] == "too_short":
        return f"a list of at least {item['ctx']['min_length']}"
    if item["type"] == "string_pattern_mismatch":
        return f"text that matches {item['ctx']['pattern']}"
    return item["msg"].removeprefix("Input should be ").removeprefix("Input should ")


def _suggestion(
    root: type[BaseModel], above: tuple[str, ...], path: tuple[str, ...], models: Sequence[type[BaseModel]]
) -> str:
    """Suggest the key that was meant: a similar one nearby, else one in another section, else all keys known here.

    Args:
        models: the classes that the key's section may be of.
    """
    *section, name = path
    nearby = sorted({field for model in models for field in model.model_fields})
    elsewhere: dict[str, list[str]] = {}
    for other in dict.fromkeys(_all_paths(root, above)):
        if other[:-1] != (*above, *section):  # of which other classes have keys that are not known here
            elsewhere.setdefault(other[-1], []).append(".".join(other))
    if near := difflib.get_close_matches(name, nearby, n=1, cutoff=0.7):
        return f"did you mean {'.'.join((*above, *section, near[0]))}?"
    if near := difflib.get_close_matches(name, list(elsewhere), n=1, cutoff=0.8):
        found = elsewhere[near[0]]  # a stage has keys of the same names, which are not meant if there are others
        return f"did you mean {' or '.join(key for key in found if not any(key.endswith(f'.{k}') for k in found))}?"
    return f"known here: {', '.join(nearby)}"


def _discriminator(item: ErrorDetails) -> tuple[str, ...]:
    """Return the key that chooses the class of a section, if that is what is wrong."""
    return (item["ctx"]["discriminator"].strip("'"),) if item["type"] == "union_tag_invalid" else ()


def _key_path(root: type[BaseModel], location: tuple[int | str, ...]) -> Iterator[str]:
    """Yield the keys of a pydantic location, without the names of union members that it inserts between them."""
    models = [root]
    open_keys = False  # inside a mapping whose keys the user chooses
    for i, part in enumerate(location):
        annotations = [
            m.model_fields[part].annotation for m in models if isinstance(part, str) and part in m.model_fields
        ]
        if annotations:
            models = [model for annotation in annotations for model in _models_in(annotation)]
            open_keys = not models and any("dict" in str(annotation) for annotation in annotations)
            yield str(part)
        elif isinstance(part, int) or open_keys or (i == len(location) - 1 and not _is_member(part, models)):
            yield str(part)


def _is_member(part: str, models: list[type[BaseModel]]) -> bool:
    names = [model.__name__ for model in models]
    return "[" in part or part in ("str", "int", "float", "bool", *names) or bool(_chosen_by(part, models))


def _chosen_by(part: int | str, models: list[type[BaseModel]]) -> list[type[BaseModel]]:
    """Return the classes of a union that a key of theirs chooses by this value, which stands in the location."""
    return [m for m in models if any(typing.get_args(field.annotation) == (part,) for field in m.model_fields.values())]


def _models_at(root: type[BaseModel], location: Sequence[int | str]) -> list[type[BaseModel]]:
    """Return the classes that the section at a pydantic location may be of."""
    models = [root]
    for part in location:
        found = [
            m
            for model in models
            if isinstance(part, str) and part in model.model_fields
            for m in _models_in(model.model_fields[part].annotation)
        ]
        models = found or _chosen_by(part, models) or models  # neither if the part is a list index
    return models


def _all_paths(model: type[BaseModel], above: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        yield (*above, name)
        for below in _models_in(field.annotation):
            yield from _all_paths(below, (*above, name))


def _models_in(annotation: object) -> list[type[BaseModel]]:
    """Return the config classes that a field's type mentions, at any depth."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]
