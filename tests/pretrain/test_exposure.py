"""When a run was trained on documents, compared with all that its batches held."""

from __future__ import annotations

import csv
import json
import random
import re
import shlex
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pytest

from pretrain.commands import dispatch
from pretrain.config import load_config
from pretrain.run.run_folder import RunFolder
from shards import preparation, read_documents
from tests.pretrain.loader_run import STEP_SECONDS, Held, begin, train
from tests.shards.corpora import SAMPLE, TOKENIZER, record, words, write_shard
from tests.tiny_run import write_config

Key = tuple[str, str, int]  # source, shard, line
SKIPPED = (182, 184)  # steps that the last run passes over


class Family(NamedTuple):
    """A run that was forked from a fork of another, with all that its batches held."""

    folders: dict[str, RunFolder]
    held: dict[Key, list[Held]]  # of the last run, by document
    forgotten: set[Key]  # from step 150 on
    lines: list[Key]  # all lines of all sources


def excerpt(name: str, count: int) -> list[bytes]:
    """Return records of a shard of the sample, each with its id and the beginning of its text."""
    found = islice(read_documents(SAMPLE / name), count)
    return [record(document.text[: 200 + 37 * i % 1800], id=f"{name[:4]} {i}") for i, document in enumerate(found)]


def write_corpus(root: Path) -> None:
    """Write three sources of the sample's text, with blank and bad lines, of which one is hardly ever read."""
    shards = {
        "pile-0.jsonl.zst": excerpt("pile-00.jsonl.zst", 90),
        "pile-1.json.gz": excerpt("pile-01.jsonl.zst", 90),
        "wiki-0.jsonl": excerpt("dolma-wikipedia-0000.json.gz", 60),
        "rare-0.jsonl.zst": excerpt("dolma-golang-0000.json.gz", 400),
    }
    for name, lines in shards.items():
        lines[7:7] = [b"\n", b'{"id": 3}\n']
        write_shard(root / name, b"".join(lines), frames=2)


def fork(parent: Path, step: int, name: str, *overrides: str) -> RunFolder:
    assert dispatch.run("fork", ["--run", str(parent), "--step", str(step), "--name", name, *overrides]) == 0
    return RunFolder(parent.with_name(name))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Write three runs: c was forked from b at step 150, and b from a at step 80."""
    root = tmp_path_factory.mktemp("family")
    write_corpus(root / "corpus")

    def source(name: str, **others: object) -> dict[str, object]:
        return {"name": name, "paths": [f"{root}/corpus/{name}-*"], **others}

    data = {
        "seq_len": 96, "lanes": 6, "window_bytes": 20_000, "tokenizer": str(TOKENIZER), "on_bad_record": "skip",
        "sources": [source("pile"), source("rare", weight=0.01)],
    }  # fmt: skip
    added = {"sources": [source("wiki", weight=0.5)], "lanes": 4}
    sizes = {"train": {"steps": 600, "global_batch_size": 12, "micro_batch_size": 2}}
    a = begin(write_config(root, "a", data=data, stages=[{"step": 60, "data": added}], **sizes))
    held = [train(a, 120, {40, 80, 120})]
    b = fork(a.root, 80, "b", "stage.data.seq_len=48", "stage.data.packing=truncate")
    held.append(train(b, 170, {100, 150}))
    lines = all_lines(a)
    forgotten = set(random.Random(5).sample([key for key in lines if key[0] == "pile"], 9))
    listed = root / "forgotten.jsonl"
    listed.write_text(
        "".join(json.dumps({"shard": shard, "line": line}) + "\n" for _, shard, line in sorted(forgotten))
    )
    changes = ("stage.data.lanes=5", "stage.data.packing=best_fit", f"stage.data.forget={listed}")
    skipped = f"data.skip_steps=[[{SKIPPED[0]}, {SKIPPED[1]}]]"
    c = fork(b.root, 150, "c", *changes, "stage.train.global_batch_size=10", skipped)
    held.append(train(c, 420, {200, 350}))
    by_document: dict[Key, list[Held]] = defaultdict(list)
    for first, last, steps in zip((1, 81, 151), (80, 150, 420), held, strict=True):
        for step in range(first, last + 1):
            for one in steps[step]:
                by_document[one[:3]].append(one)
    return Family({"a": a, "b": b, "c": c}, by_document, forgotten, lines)


def all_lines(folder: RunFolder) -> list[Key]:
    data = load_config(folder.config, begun=True).all_stages[-1].data
    return [
        (source.name, shard.path, line)
        for source in data.sources
        for shard in preparation.source_shards(data, source)
        for line in range(1, shard.index.num_records + 1)
    ]


Result = tuple[int, str, str]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def run(*arguments: object) -> Result:
        code = dispatch.run("exposure", [str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def parsed(table: str) -> Iterator[tuple[Key, dict[str, str]]]:
    for line in csv.DictReader(table.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE):
        yield (line["source"], line["shard"], int(line["line"])), line


def reason_of(family: Family, one: Held) -> str:
    """Say why nothing was learned from a piece of the last run, by the config of that run alone."""
    if one.step > 150 and one[:3] in family.forgotten:
        return "forgotten"
    return "passed over" if SKIPPED[0] <= one.step <= SKIPPED[1] else "yes"


def test_exposure_is_what_all_batches_of_three_runs_held(
    family: Family, command: Callable[..., Result], tmp_path: Path
) -> None:
    asked = random.Random(1).sample([key for key in family.lines if key[0] != "rare"], 180)
    asked += random.Random(2).sample([key for key in family.lines if key[0] == "rare"], 20)
    asked += [key for key in family.lines if key[0] == "pile" and key[2] in (8, 9)]  # blank and bad
    listed = tmp_path / "list.jsonl"
    listed.write_text("".join(json.dumps({"shard": shard, "line": line}) + "\n" for _, shard, line in asked))
    code, table, said = command("--run", family.folders["c"].root, "--file", listed, "--table", "-")
    assert code == 0, said
    found: dict[Key, list[tuple[int, ...]]] = defaultdict(list)
    missed: dict[Key, set[str]] = defaultdict(set)
    epochs: dict[Key, set[int]] = defaultdict(set)
    for key, line in parsed(table):
        if not line["step"]:
            missed[key].add(line["trained"])
            continue
        one = Held(*key, *(int(line[name]) for name in ("step", "row", "start", "stop")))
        found[key].append(one[3:])
        epochs[key].add(int(line["epoch"]))
        assert line["trained"] == reason_of(family, one)
    for key in asked:
        assert sorted(found[key]) == sorted(one[3:] for one in family.held.get(key, [])), key
        if "pile" in key[0] and key[2] in (8, 9):
            assert missed[key] == {"the line is blank" if key[2] == 8 else "has no key 'text'; its keys are 'id'"}
    assert sum(not found[key] for key in asked) > 10, "some were never read"
    assert max(map(len, epochs.values())) >= 3
    assert {line["trained"] for _, line in parsed(table)} >= {"yes", "forgotten", "passed over"}
    assert "has the hash that the run was trained on, and holds them as said" in said


def test_the_summary_says_when_and_where(family: Family, command: Callable[..., Result]) -> None:
    key = next(key for key, found in family.held.items() if found[0].step < 40 and key not in family.forgotten)
    learned = [one for one in family.held[key] if reason_of(family, one) == "yes"]
    code, said, _ = command("--run", family.folders["c"].root, "--doc", f"{key[1]}:{key[2]}", "--no-proof")
    assert code == 0
    steps = [one.step for one in learned]
    tokens = sum(one.stop - one.start for one in learned)
    assert f"{len(steps)} pieces of {tokens:,} tokens, first at step {steps[0]}, last at step {steps[-1]}" in said
    assert "checkpoints from before that: none; that have seen it: 150, 200, 350" in said
    counts = [sum(80 < step <= 150 for step in steps), sum(step <= 80 for step in steps)]
    assert f"by a ({counts[1]} pieces), b ({counts[0]} pieces), c (" in said


def test_texts_are_found_and_listed(family: Family, command: Callable[..., Result], tmp_path: Path) -> None:
    name, shard, line = next(key for key in family.lines if key[0] == "pile" and key[2] == 30)
    text = next(document.text for document in read_documents(shard, None, "skip") if document.line == line)
    listed, asked = tmp_path / "found.jsonl", tmp_path / "asked.txt"
    asked.write_text(text.upper())
    run = ("--run", family.folders["c"].root, "--no-proof")
    code, said, progress = command(*run, "--text-file", asked, "--list", listed)
    assert code == 0
    assert f"{name} {shard}:{line} is the text" in said
    assert re.search(r"text index made: [\d.]+ MB for [\d.]+ MB of text, in", progress)
    assert json.loads(listed.read_text().splitlines()[0]) == {"shard": shard, "line": line}
    for forgotten in family.forgotten:
        assert json.dumps({"shard": forgotten[1], "line": forgotten[2]}) in listed.read_text()
    part = " ".join(text.split()[:40])
    code, said, progress = command(*run, "--text", part, "--match", "contains")
    assert (code, progress) == (0, "")
    assert f"{name} {shard}:{line} contains the text" in said
    code, said, _ = command(*run, "--text", f"{part} {words(3, 50)}")
    assert re.search(re.escape(f"{name} {shard}:{line} shares ") + r"\d+ words of the text", said)
    by_id = tmp_path / "ids.jsonl"
    by_id.write_text('{"source": "pile", "id": "pile 3"}\n')
    code, said, _ = command(*run, "--file", by_id)
    assert code == 0
    assert "pile-0.jsonl.zst:4" in said


@pytest.mark.parametrize("stage_lanes", [2, 3])
def test_documents_outside_a_sources_part_are_said_to_be_left_out(
    command: Callable[..., Result], tmp_path: Path, stage_lanes: int
) -> None:
    lines = [record(words(i, 5 + i % 40)) for i in range(120)]
    for name in "abc":
        for part in (0, 1):
            write_shard(tmp_path / f"{name}-{part}.jsonl", b"".join(lines[60 * part : 60 * part + 60]))
    parts = {"a": {"take": [20, 90]}, "b": {"hash_range": [0.3, 0.8]}, "c": {"min_tokens": 50}}
    data = {
        "seq_len": 48, "lanes": 2, "window_bytes": 3000, "tokenizer": str(TOKENIZER),
        "sources": [{"name": name, "paths": [f"{tmp_path}/{name}-*.jsonl"], **part} for name, part in parts.items()],
    }  # fmt: skip
    stages = [{"step": 20, "data": {"lanes": stage_lanes}}]
    sizes = {"train": {"steps": 60, "global_batch_size": 6, "micro_batch_size": 2}}
    run = begin(write_config(tmp_path, "part", data=data, stages=stages, **sizes))
    held: dict[Key, list[tuple[int, ...]]] = defaultdict(list)
    for one in (one for steps in train(run, 60, {30}).values() for one in steps):
        held[one[:3]].append(one[3:])
    lines_of = all_lines(run)
    listed = tmp_path / "all.jsonl"
    listed.write_text("".join(json.dumps({"shard": shard, "line": line}) + "\n" for _, shard, line in lines_of))
    code, table, said = command("--run", run.root, "--file", listed, "--table", "-")
    assert code == 0, said
    found: dict[Key, list[tuple[int, ...]]] = defaultdict(list)
    for key, line in parsed(table):
        if line["step"]:
            found[key].append(tuple(int(line[name]) for name in ("step", "row", "start", "stop")))
        else:
            assert (key[0], line["trained"].partition(" leaves")[0]) in (
                ("b", "hash_range: [0.3, 0.8]"),
                ("c", "min_tokens: 50"),
            )
    assert {key: sorted(pieces) for key, pieces in found.items()} == {key: sorted(one) for key, one in held.items()}
    for shard, line in (("a-0.jsonl", 20), ("a-1.jsonl", 31), ("a-1.jsonl", 30)):
        code, said, _ = command("--run", run.root, "--doc", f"{shard}:{line}", "--no-proof")
        is_left_out = "not in the run's data: take: [20, 90] leaves it out" in said
        assert is_left_out == (line != 30), said
    name, shard, line = next(key for key in lines_of if key[0] == "b" and not held[key])
    code, said, _ = command("--run", run.root, "--doc", f"{shard}:{line}", "--no-proof")
    assert "not in the run's data: hash_range: [0.3, 0.8] leaves it out" in said, said


def test_what_cannot_be_found_is_named(family: Family, command: Callable[..., Result], tmp_path: Path) -> None:
    run = ("--run", family.folders["c"].root)
    for arguments, message in (
        (("--run", tmp_path, "--doc", "x:1"), "no run there"),
        ((*run, "--doc", "nowhere.zst:1"), "no source has a shard nowhere.zst; shards are such as"),
        ((*run, "--doc", "wiki-0.jsonl:63"), "wiki-0.jsonl has no line 63; it has 62"),
        ((*run, "--doc", "wiki-0.jsonl:0"), "wiki-0.jsonl has no line 0; it has 62"),
        ((*run, "--doc", "wiki-0.jsonl"), "write SHARD:LINE, such as"),
        ((*run, "--text", words(1, 60)), "no document of the run's sources has the text"),
        ((*run, "--text-file", tmp_path / "x"), "cannot be read"),
        ((*run, "--file", tmp_path / "x"), "cannot be read"),
        ((*run, "--doc", "wiki-0.jsonl:3", "--unlearn"), "add --list FILE, which writes it"),
    ):
        code, _, said = command(*arguments)
        assert code == 2, arguments
        assert message in said


def test_unlearning_begins_again_where_nothing_was_seen(
    family: Family, command: Callable[..., Result], tmp_path: Path
) -> None:
    """The commands are typed, and train runs whose rows are the same and whose first exposure never comes."""
    runs = family.folders["a"].root.parent
    for low, high, step, parent in ((151, 200, 150, "c"), (41, 80, 40, "a"), (81, 100, 80, "b"), (1, 39, 0, "")):
        key = next(
            key
            for key, found in family.held.items()
            if key not in family.forgotten
            and low <= min((one.step for one in found if reason_of(family, one) == "yes"), default=0) <= high
        )
        listed = tmp_path / f"{step}.jsonl"
        run = ("--run", runs / "c", "--doc", f"{key[1]}:{key[2]}", "--list", listed, "--unlearn", "--no-proof")
        code, said, error = command(*run)
        assert code == 0, error
        assert f"that trains {420 - step:,} steps" in said
        assert f"{STEP_SECONDS * (420 - step):,.0f} s at the run's median speed" in said
        if not step:
            assert "so the run must begin anew" in said
            assert f"data.forget={listed}" in said
            continue
        typed = shlex.split(next(line for line in said.splitlines() if "fork.py" in line))
        assert typed[typed.index("--run") + 1] == str(runs / parent)
        assert dispatch.run("fork", typed[2:]) == 0
        made = runs / "c-without"
        again = train(RunFolder(made), 420, set())
        assert min(again) == step + 1
        wanted = [one for found in family.held.values() for one in found if one.step > step]
        got = [one for steps in again.values() for one in steps]
        assert sorted(one[2:] for one in got) == sorted(one[2:] for one in wanted)
        code, _, error = command("--run", made, "--doc", f"{key[1]}:{key[2]}", "--table", tmp_path / "t", "--no-proof")
        assert code == 0, error
        trained = {line["trained"] for _, line in parsed((tmp_path / "t").read_text())}
        assert "yes" not in trained, "it was never trained on"
        assert "forgotten" in trained
        shutil.rmtree(made)
