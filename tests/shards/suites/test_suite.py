"""Suites in every supported layout hold the same documents under the same domains; what is missing is named."""

from __future__ import annotations

import bz2
import json
import lzma
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards import ConfigError, Loader
from shards.suites.suite import find, training_shards
from tests.shards.corpora import SAMPLE, config, record, write_shard

PALOMA = {"c4": ["news", "forum"], "wiki": [None]}  # source -> subdomains
TEXTS = {
    f"{source}/{sub}" if sub else source: [f"{source} {sub} {i} \u2028 end" for i in range(3)]
    for source, subs in PALOMA.items()
    for sub in subs
}


def paloma(folder: Path, split: str = "val") -> Path:
    """Write a suite as Paloma is published, with the subdomains of a source mixed in its shards."""
    for source, subs in PALOMA.items():
        lines = []
        for i in range(3):
            for sub in subs:
                text = TEXTS[f"{source}/{sub}" if sub else source][i]
                lines.append(record(text, source="x", id=str(i), added="", **({"subdomain": sub} if sub else {})))
        for number, part in enumerate((lines[:2], lines[2:])):
            write_shard(folder / source / split / f"{split}_{number}.jsonl.gz", b"".join(part))
    return folder


def domains(path: Path, split: str = "val") -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for document in find(path, split).documents():
        found.setdefault(document.domain, []).append(document.text)
    return found


def test_palomas_layout_is_read(tmp_path: Path) -> None:
    assert domains(paloma(tmp_path)) == TEXTS
    assert {d.source for d in find(tmp_path, "val").documents()} == set(PALOMA)


@pytest.mark.parametrize("name", ["{}/val/x.{}", "{}/val.0.{}", "{}.{}"])
@pytest.mark.parametrize("kind", ["parquet", "jsonl.xz", "json.bz2"])
def test_formats_that_a_glob_takes_only_by_name_are_read_where_a_folder_has_no_other(
    tmp_path: Path, name: str, kind: str
) -> None:
    for domain in "ab":
        path = tmp_path / name.format(domain, kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = [f"{domain} one", f"{domain} two"]
        lines = b"".join(map(record, texts))
        if kind == "parquet":
            pq.write_table(pa.table({"text": texts}), path)
        else:
            path.write_bytes(lzma.compress(lines) if kind == "jsonl.xz" else bz2.compress(lines))
    expected = {domain: [f"{domain} one", f"{domain} two"] for domain in "ab"}
    assert domains(tmp_path) == expected
    assert len(find(tmp_path, "val").content_hashes()) == 2
    beside = path.parent / "val.jsonl"  # the same suite once more, as hubs convert it
    beside.write_bytes(record("b of JSON lines"))
    if name != "{}.{}":
        assert domains(tmp_path) == {**expected, "b": ["b of JSON lines"]}


def test_a_suite_file_names_the_column_of_parquet_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    pq.write_table(pa.table({"body": ["x", "y"], "of": ["s", None]}), tmp_path / "a/val.parquet")
    (tmp_path / "suite.yaml").write_text("sources: [{name: a, path: a, text_key: body, domain_from: of}]")
    assert domains(tmp_path / "suite.yaml") == {"a/s": ["x"], "a": ["y"]}


@pytest.mark.parametrize("name", ["{}/val.jsonl.zst", "{}/val.0.json.gz", "{}/val/x.jsonl", "{}.jsonl"])
def test_a_domain_may_be_a_folder_or_a_file(tmp_path: Path, name: str) -> None:
    for domain in ("a", "b"):
        write_shard(tmp_path / name.format(domain), record(f"text of {domain}"))
    assert domains(tmp_path) == {"a": ["text of a"], "b": ["text of b"]}


def test_a_folder_may_be_a_single_source(tmp_path: Path) -> None:
    assert domains(paloma(tmp_path) / "wiki") == {"wiki": TEXTS["wiki"]}


def test_a_suite_may_be_a_list_of_sources(tmp_path: Path) -> None:
    paloma(tmp_path / "data", "test")
    write_shard(tmp_path / "notes.jsonl", record("", body="a note", meta={"kind": "short"}))
    rows = [{"text": text, "subdomain": "set"} for text in ("first", "second")]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    listed = {
        "name": "ours",
        "sources": [
            {"name": "c4", "path": "data/c4", "split": "test"},
            {"name": "flat", "path": "data/c4", "split": "test", "domain_from": None},
            {"name": "notes", "path": "notes.jsonl", "text_key": "body", "domain_from": "meta.kind"},
            {"name": "set", "dataset": str(tmp_path / "saved"), "split": "train"},
        ],
    }
    (tmp_path / "suite.yaml").write_text(json.dumps(listed))
    found = domains(tmp_path / "suite.yaml")
    assert found["c4/news"] == TEXTS["c4/news"]
    assert Counter(found["flat"]) == Counter(TEXTS["c4/news"] + TEXTS["c4/forum"])
    assert found["notes/short"] == ["a note"]
    assert found["set/set"] == ["first", "second"], "of rows that name their source as its domain"
    assert find(tmp_path / "suite.yaml", "val").name == "ours"


def test_files_with_dots_in_their_names_are_separate_domains(tmp_path: Path) -> None:
    for domain in ("falcon-1.5", "falcon-1.7"):
        write_shard(tmp_path / f"{domain}.jsonl", record(domain))
    assert domains(tmp_path) == {"falcon-1.5": ["falcon-1.5"], "falcon-1.7": ["falcon-1.7"]}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"has no <source>/val/\*\.jsonl\.gz, <domain>/val\.jsonl\.zst"),
        (["a/test.jsonl", "b/test.jsonl"], r"no split 'val' in 2 of its domains \(a has test; b has test\)"),
        (["a/val.jsonl", "b/test.jsonl"], r"no split 'val' in 1 of its domains \(b has test\)"),
        (["a/valid/x.jsonl.gz"], r"\(a has valid\); set evaluation\.split"),
        (["train.jsonl", "test.jsonl"], r"there is test, train: set evaluation\.split"),
        (["train/a.jsonl"], r"there is train: set evaluation\.split"),
    ],
)
def test_a_wrong_split_and_a_missing_domain_are_named(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        write_shard(tmp_path / name, record("x"))
    with pytest.raises(ConfigError, match=message):
        find(tmp_path, "val")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sources: [", "not YAML"),
        ("[]", "needs a key `sources`"),
        ("sources: [{name: a, pth: x}]", r"evaluation\.suite\.sources\.0\.pth: unknown key.*path"),
        ("sources: [{name: a}]", "either path or dataset"),
        ("sources: [{name: a, path: nowhere}]", "source 'a': .*nowhere is neither a folder nor a file"),
        ("sources: [{name: a, path: c4, split: dev}]", "no split 'dev'.*c4 has val"),
        ("sources: [{name: a, path: c4}, {name: a, path: wiki}]", "'a' is listed twice"),
    ],
)
def test_what_is_wrong_in_a_list_is_named(tmp_path: Path, content: str, message: str) -> None:
    paloma(tmp_path)
    (tmp_path / "suite.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        find(tmp_path / "suite.yaml", "val")


def test_training_shards_in_a_suite_are_named(tmp_path: Path) -> None:
    shard = SAMPLE / "dolma-handbook-0000.jsonl.zst"
    (tmp_path / "suite").mkdir()
    (tmp_path / "suite" / "mine.jsonl.zst").write_bytes(shard.read_bytes())
    write_shard(tmp_path / "suite" / "other.jsonl", record("held out"))
    data = config([{"name": "book", "paths": [str(shard)]}], index_dir=tmp_path / "index")
    with Loader(data, 8) as loader:
        found = training_shards(find(tmp_path / "suite", "val"), loader.fingerprint)
    assert len(found) == 1
    assert "mine.jsonl.zst is" in found[0]
    assert "dolma-handbook-0000.jsonl.zst of source 'book'" in found[0]


@pytest.mark.parametrize("path", ["a", "a/val.parquet"])
def test_a_form_is_refused_where_a_single_column_would_be_read(tmp_path: Path, path: str) -> None:
    (tmp_path / "a").mkdir()
    pq.write_table(pa.table({"text": ["x"], "b": ["y"]}), tmp_path / "a/val.parquet")
    listed = tmp_path / "suite.yaml"
    listed.write_text(f"sources: [{{name: a, path: {path}, template: '{{b}}', domain_from: null}}]")
    with pytest.raises(ConfigError, match="template reads JSON lines, and of .* a single column is read"):
        find(listed, "val")
