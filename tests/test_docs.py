"""Generated pages and pictures agree with the code, and all links between pages work."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from docs import make_configuration, make_pictures
from pretrain.config import RunConfig
from shards import Config
from shards.suites.suite import SuiteFile
from tests.pages import DOCS, unprinted

ROOT = Path(__file__).parents[1]


class Commented(Config):
    """A class whose fields have comments at every possible place."""

    behind: int  # rows
    # above, over
    # two lines
    above: int
    # first this.
    both: int | None = Field(None, ge=1)  # then that

    long: int = Field(
        default=3,  # inside
        ge=1,
    )  # and after

    # apart, so of no field

    none: str = "# in a string"


def keys_in_schema(schema: dict[str, Any], definitions: dict[str, Any], path: str = "") -> Iterator[str]:
    """Yield the paths of all keys by pydantic's JSON schema, with a list's items as []."""
    if "$ref" in schema:
        yield from keys_in_schema(definitions[schema["$ref"].rpartition("/")[2]], definitions, path)
    for part in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from keys_in_schema(part, definitions, path)
    if isinstance(items := schema.get("items"), dict):
        yield from keys_in_schema(items, definitions, f"{path}[]")
    for name, value in schema.get("properties", {}).items():
        key = f"{path}.{name}" if path else name
        yield key
        yield from keys_in_schema(value, definitions, key)


def test_the_configuration_page_is_current() -> None:
    assert make_configuration.PAGE.read_text() == make_configuration.page(), "run `python docs/make_configuration.py`"


def test_the_configuration_page_has_every_key() -> None:
    for root in (RunConfig, SuiteFile):
        schema = root.model_json_schema()
        sections = make_configuration.sections(root)
        listed = [key.path for section in sections for key in make_configuration.keys(section)]
        assert sorted(listed) == sorted(keys_in_schema(schema, schema["$defs"]))


def test_every_key_has_a_comment() -> None:
    assert make_configuration.undocumented() == [], "describe the new field's meaning and unit in a comment"


def test_a_field_gets_the_comments_above_and_after_it() -> None:
    assert make_configuration.comments(Commented) == {
        "behind": "rows",
        "above": "above, over two lines",
        "both": "first this. Then that",
        "long": "inside and after",
    }


@pytest.mark.parametrize("picture", make_pictures.PICTURES, ids=lambda picture: picture.file)
def test_the_pictures_are_current(picture: make_pictures.Picture) -> None:
    drawn = make_pictures.draw(picture)
    assert (make_pictures.FOLDER / picture.file).read_text() == drawn, "run `python docs/make_pictures.py`"
    ET.fromstring(drawn)


def test_the_pictures_name_modules_that_exist() -> None:
    boxes = {box.name for picture in make_pictures.PICTURES for band in picture.bands for box in band.boxes}
    assert boxes == set(make_pictures.MODULES)
    for modules in make_pictures.MODULES.values():
        for module in modules:
            path = ROOT / module
            assert path.is_dir() if module.endswith("/") else path.with_suffix(".py").is_file(), module


def test_an_excerpt_is_compared_with_what_was_printed() -> None:
    printed = "12:00 INFO step 20/40  loss 6.91  (1,024 tokens)\ndone: all of it\n"
    assert unprinted("step 1/2 loss 7.3 … tokens)\ndone: …\n", printed) == []
    assert unprinted("step 1/2 loss …\nstep 1 of 2\ndone: nothing\n", printed) == ["step 1 of 2", "done: nothing"]
    assert unprinted("done: … step", printed) == ["done: … step"], "an excerpt's line comes from one printed line"


def test_links_between_pages_resolve() -> None:
    for page in (*DOCS.glob("*.md"), ROOT / "README.md"):
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
            path = page.parent / target if target else page
            assert path.exists(), f"{page.name}: {target}"
            if anchor:
                assert anchor in anchors(path.read_text()), f"{page.name}: {target}#{anchor}"


def anchors(page: str) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
