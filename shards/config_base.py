"""What configs are made of: their base class, and kinds of values that several of them have. config_base -> config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    StringConstraints,
    ValidationError,
)
from pydantic_core import CoreSchema, core_schema

from shards.config_errors import explain
from shards.errors import ConfigError

Name = Annotated[str, StringConstraints(min_length=1, pattern=r"^[^/\s]+$")]


def _with_strict_scalars(schema: Any) -> Any:
    """Return a pydantic schema, or part of one, with all its scalars made strict.

    pydantic's own strict mode goes too far: it refuses lists for tuples, texts for paths and mappings for sections.
    """
    if isinstance(schema, list):
        return [_with_strict_scalars(part) for part in schema]
    if not isinstance(schema, dict) or schema.get("type") == "chain":
        return schema
    if schema.get("type") in ("bool", "float", "int", "str"):
        return schema | {"strict": True}
    if schema.get("type") == "literal" and all(type(value) is int for value in schema["expected"]):
        # Literals are looked up by equality, and True and 1.0 both equal 1
        return core_schema.chain_schema([core_schema.int_schema(strict=True), schema])
    return {key: _with_strict_scalars(part) for key, part in schema.items()}


class Config(BaseModel):
    """Base of every config class: frozen, closed to unknown keys, and strict about the types of values.

    Numbers, booleans and strings are never converted: 8 is an int; "8", 8.0 and True are not. An int is accepted for a
    float. A list is accepted for a tuple and a string for a path, since YAML has neither.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        strict: CoreSchema = _with_strict_scalars(handler(source))
        return strict

    @classmethod
    def parse(cls, values: Mapping[str, object], at: str = "") -> Self:
        """Validate plain values, as read from YAML; `at` is the key that holds them.

        Raises: ConfigError naming each wrong key, its value, and what would be right.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError("\n".join(explain(error, cls, at))) from None


def _check_take(take: tuple[int, int | None]) -> tuple[int, int | None]:
    first, end = take
    if first < 0 or (end is not None and end <= first):
        raise ValueError(
            f"[{first}, {'null' if end is None else end}] holds no record; write [first, end] with 0 <= first < end,"
            " counted from 0 and the end not included, or null for the end of the source"
        )
    return take


def _check_hash_range(bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = bounds
    if not 0 <= low < high <= 1:
        raise ValueError(f"{list(bounds)} holds no hash; write [low, high] with 0 <= low < high <= 1")
    return bounds


Take = Annotated[tuple[int, int | None], AfterValidator(_check_take)]
HashRange = Annotated[tuple[float, float], AfterValidator(_check_hash_range)]
