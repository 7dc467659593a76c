"""A part of a source's or a suite's documents: what one leaves out, the other may have, and nothing is lost between."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards import (
    Batch,
    ConfigError,
    DataConfig,
    Loader,
    ShardError,
    Stage,
    StageData,
    Tokenizer,
    check_fingerprint,
    merge_states,
    preparation,
    read_documents,
)
from shards.stages import stage_after
from shards.suites.suite import find, training_shards
from tests.shards.corpora import TOKENIZER, config, ranks_of, record, restarted_hashes, words, write_shard

DOCUMENTS = 400
SEED = 3
TEMPLATE = "Task: {task}\nDone: {text}"
TRAINED, HELD_OUT = [0.0, 0.8], [0.8, 1.0]


def text_of(i: int) -> str:
    """Return the text of a document; every tenth repeats an earlier one."""
    number = i - i % 7 if i % 10 == 9 else i
    return words(number, 3 + number * number % 50)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the same documents as JSON lines in three shards, with blank lines, and as Parquet, with token ids too."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [record(text_of(i), task=f"t{i % 5}", id=i) for i in range(DOCUMENTS)]
    lines[5:5] = [b"\n"]
    for shard, part in enumerate((lines[:130], lines[130:131], lines[131:])):
        write_shard(folder / f"s-{shard}.jsonl{('.zst', '', '.gz')[shard]}", b"".join(part), frames=3)
    texts = [text_of(i) for i in range(DOCUMENTS)]
    tokenizer = Tokenizer(TOKENIZER)
    ids = [tokenizer.encode_document(text).tolist() for text in texts]
    pq.write_table(pa.table({"text": texts, "ids": ids}), folder / "all.parquet", row_group_size=90)
    return folder


def source(corpus: Path, kind: str, **changes: object) -> dict[str, object]:
    """Return a source of the documents, spelled in one of four ways."""
    of_kind: dict[str, dict[str, object]] = {
        "text": {"paths": [f"{corpus}/s-*"]},
        "template": {"paths": [f"{corpus}/s-*"], "template": TEMPLATE},
        "parquet": {"paths": [f"{corpus}/all.parquet"]},
        "ids": {"paths": [f"{corpus}/all.parquet"], "input_ids_key": "ids"},
    }
    return {"name": "a", "max_epochs": 1, **of_kind[kind], **changes}


def suite_of(corpus: Path, folder: Path, kind: str, **changes: object) -> Path:
    """Write a suite of the same file or files."""
    own = source(corpus, kind, **changes)
    own.pop("max_epochs")
    paths = own.pop("paths")
    assert isinstance(paths, list)
    inside = folder / "inside" / "val"
    inside.mkdir(parents=True, exist_ok=True)
    for path in sorted(corpus.glob("s-*")) if paths[0].endswith("s-*") else [corpus / "all.parquet"]:
        if not (inside / path.name).exists():
            (inside / path.name).symlink_to(path)
    listed = folder / "suite.yaml"
    listed.write_text(json.dumps({"sources": [{**own, "path": "inside", "domain_from": None}]}))
    return listed


def steps_of(data: DataConfig, dp_size: int = 1) -> Iterator[list[Batch]]:
    """Yield the batches of all steps, resumed from its state after each fifth one."""
    loaders = ranks_of(data, 8, SEED, dp_size)
    number = 0
    while not all(loader.ended for loader in loaders):
        parts = [loader.next_batch() for loader in loaders]
        if any(part.num_rows for part in parts):
            yield parts
        if (number := number + 1) % 5 == 0:
            state = json.loads(json.dumps(merge_states([loader.state_dict() for loader in loaders])))
            ended = [loader.ended for loader in loaders]
            loaders = ranks_of(data, 8, SEED, dp_size)
            for loader, was in zip(loaders, ended, strict=True):
                loader.load_state_dict(state)
                loader.ended = was
    for loader in loaders:
        loader.close()


def trained(steps: list[list[Batch]]) -> Counter[tuple[str, int]]:
    """Count how often each record begins in a row, by the name of its file and its line."""
    origins = (origin for parts in steps for part in parts for origin in part.origins())
    return Counter((Path(origin.shard.partition("#")[0]).name, origin.line) for origin in origins if origin.start == 0)


def places(corpus: Path, kind: str) -> list[tuple[tuple[str, int], str | None]]:
    """Read the file or files in plain Python: each record's place, and its text; None for a blank line."""
    if kind in ("parquet", "ids"):
        texts = pq.read_table(corpus / "all.parquet")["text"].to_pylist()
        return [(("all.parquet", line), text) for line, text in enumerate(texts, 1)]
    found: list[tuple[tuple[str, int], str | None]] = []
    for path in sorted(corpus.glob("s-*")):
        documents = {document.line: document.text for document in read_documents(path)}
        last = max(documents)
        found += [((path.name, line), documents.get(line)) for line in range(1, last + 1)]
    return found


def scored(path: Path) -> list[str]:
    """Return what a suite scores, as text."""
    tokenizer = Tokenizer(TOKENIZER)
    return [
        tokenizer.decode(document.token_ids[1:-1]) if document.text is None else document.text
        for document in find(path, "val").documents()
    ]


@pytest.mark.parametrize(("kind", "dp_size"), [("text", 4), ("template", 2), ("parquet", 1), ("ids", 4)])
def test_the_halves_of_a_file_are_disjoint_and_together_complete(
    corpus: Path, tmp_path: Path, kind: str, dp_size: int
) -> None:
    data = config([source(corpus, kind, hash_range=TRAINED)], index_dir=tmp_path / "index")
    found = trained(list(steps_of(data, dp_size)))
    held_out = Counter(scored(suite_of(corpus, tmp_path, kind, hash_range=HELD_OUT)))
    there = [(place, text) for place, text in places(corpus, kind) if text is not None]
    spell = {f"Task: t{i % 5}\nDone: {text_of(i)}": text_of(i) for i in range(DOCUMENTS)}
    assert set(found.values()) == {1}
    learned = {place for place, _ in there} & found.keys()
    assert len(learned) == len(found)
    left = Counter(text for place, text in there if place not in learned)
    assert Counter(spell.get(text, text) for text in held_out.elements()) == left
    assert 0.6 * DOCUMENTS < len(found) < 0.95 * DOCUMENTS
    if kind != "template":  # in which equal texts have different tasks
        of_text: dict[str, set[bool]] = {}
        for place, text in there:
            of_text.setdefault(str(text), set()).add(place in learned)
        assert len(of_text) < len(there)
        assert all(len(sides) == 1 for sides in of_text.values()), "the same text on both sides"


@pytest.mark.parametrize(
    ("kind", "bounds"),
    [
        *(("text", bounds) for bounds in [(0, 150), (127, 133), (133, None), (7, 8)]),
        ("template", (127, 133)),
        *(("parquet", bounds) for bounds in [(0, 150), (133, 190)]),
        ("ids", (85, 95)),
    ],
)
def test_records_are_taken_by_their_number_over_all_shards(
    corpus: Path, tmp_path: Path, kind: str, bounds: tuple[int, int | None]
) -> None:
    taken = {place: text for place, text in places(corpus, kind)[slice(*bounds)] if text is not None}
    data = config([source(corpus, kind, take=list(bounds), max_epochs=2)], index_dir=tmp_path / "index")
    found = trained(list(steps_of(data)))
    assert found == dict.fromkeys(taken, 2)
    texts = [
        text.partition("Done: ")[2] or text for text in scored(suite_of(corpus, tmp_path, kind, take=list(bounds)))
    ]
    assert texts == list(taken.values())


@pytest.mark.distributed
@pytest.mark.parametrize(
    "part", [{"take": [40, 390]}, {"hash_range": [0.1, 0.9]}, {"min_tokens": 30, "max_tokens": 150}]
)
def test_batches_of_a_part_are_those_of_any_ranks_restarts_and_workers(
    corpus: Path, tmp_path: Path, part: dict[str, object]
) -> None:
    data = config([source(corpus, "text", max_epochs=None, **part)], index_dir=tmp_path / "index")
    with Loader(data, 8, SEED) as loader:
        expected = [next(loader).row_hash for _ in range(30)]
    assert restarted_hashes(data) == expected
    with Loader(data.model_copy(update={"num_workers": 2}), 8, SEED) as loader:
        assert [next(loader).row_hash for _ in range(6)] == expected[:6]
    with Loader(config([source(corpus, "text", max_epochs=None)], index_dir=tmp_path / "index"), 8, SEED) as loader:
        assert [next(loader).row_hash for _ in range(30)] != expected


def test_a_part_of_one_shard_reads_no_other_shard(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in corpus.glob("s-*"):
        (folder / path.name).write_bytes(path.read_bytes())
    data = config([source(folder, "text", take=[0, 100], max_epochs=2)], index_dir=tmp_path / "index")
    preparation.prepare(data)
    expected = [parts[0].row_hash for parts in steps_of(data)]
    prepared = preparation.prepare(data)
    for path in folder.glob("s-[12]*"):
        path.unlink()
    with Loader(data, 8, SEED, prepared=prepared) as loader:
        assert [batch.row_hash for batch in loader] == expected


def lengths_and_learned(steps: list[list[Batch]]) -> tuple[dict[tuple[str, int], int], Counter[tuple[str, int]]]:
    """Return, of each document by the name of its file and its line, its tokens and how many of them are predicted."""
    lengths: dict[tuple[str, int], int] = {}
    learned: Counter[tuple[str, int]] = Counter()
    for part, dp_size in ((part, len(parts)) for parts in steps for part in parts):
        places = [0] * len(part.tokens)
        for origin in part.origins():
            key, row = (Path(origin.shard.partition("#")[0]).name, origin.line), origin.slot // dp_size
            begin, end = places[row], places[row] + origin.stop - origin.start
            lengths[key], places[row] = max(lengths.get(key, 0), origin.stop), end
            learned[key] += int((part.segment_ids[row, begin:end] > 0).sum())
    return lengths, learned


@pytest.mark.parametrize(("kind", "dp_size"), [("text", 1), ("template", 2), ("ids", 4), ("parquet", 1)])
def test_documents_are_kept_by_their_tokens(corpus: Path, tmp_path: Path, kind: str, dp_size: int) -> None:
    def read(**part: object) -> tuple[dict[tuple[str, int], int], Counter[tuple[str, int]]]:
        data = config([source(corpus, kind, **part)], index_dir=tmp_path / "index", seq_len=512)  # no document is cut
        return lengths_and_learned(list(steps_of(data, dp_size)))

    lengths, learned = read()
    least, most = np.quantile(list(lengths.values()), (0.3, 0.8), method="lower").tolist()  # which some have exactly
    kept, kept_learned = read(min_tokens=least, max_tokens=most)
    if kind != "template":
        tokenizer = Tokenizer(TOKENIZER)
        there = {place: text for place, text in places(corpus, kind) if text is not None}
        assert lengths == {place: len(tokenizer.encode_document(text)) for place, text in there.items()}
    assert {least, most} <= set(kept.values())
    assert kept == {place: length for place, length in lengths.items() if least <= length <= most}
    assert kept_learned == {place: learned[place] for place in kept}, "prompts are those of the documents that are kept"


def test_a_stage_adds_the_long_documents_of_a_source(corpus: Path, tmp_path: Path) -> None:
    data = config([source(corpus, "text", max_epochs=None)], index_dir=tmp_path / "index", lanes=4)
    long = source(corpus, "text", name="long", max_epochs=None, min_tokens=120, weight=3.0)
    stage = stage_after(Stage(0, data, 8), 5, StageData.model_validate({"sources": [long], "weights": {"a": 1.0}}))

    def batches(dp_sizes: Iterator[int]) -> Iterator[list[Batch]]:
        state: dict[str, object] = {}
        for dp_size in dp_sizes:
            ranks = ranks_of(data, 8, SEED, dp_size, [stage])
            for rank in ranks:
                if state:
                    rank.load_state_dict(state)
            yield [rank.next_batch() for rank in ranks]
            state = json.loads(json.dumps(merge_states([rank.state_dict() for rank in ranks])))
            for rank in ranks:
                rank.close()

    found = list(batches(iter([1, 2, 4, 1, 2, 1, 4, 2, 1, 4, 2, 1])))
    with Loader(data, 8, SEED, stages=[stage]) as loader:
        whole = [next(loader) for _ in found]
    assert [sum(part.row_hash for part in parts) % 2**64 for parts in found] == [batch.row_hash for batch in whole]
    rows = Counter(origin.source for batch in whole[5:] for origin in {o.slot: o for o in batch.origins()}.values())
    assert (rows["long"], rows["a"]) == (42, 14)
    tokenizer = Tokenizer(TOKENIZER)
    lengths = {place: len(tokenizer.encode_document(text)) for place, text in places(corpus, "text") if text}
    drawn = [(Path(o.shard).name, o.line) for batch in whole for o in batch.origins() if o.source == "long"]
    assert min(lengths[place] for place in drawn) >= 120
    assert min(lengths.values()) < 120


@pytest.mark.parametrize("part", [{"take": [100, 300]}, {"hash_range": [0.25, 0.5]}, {"min_tokens": 200}])
def test_what_is_left_out_is_promised_nowhere(corpus: Path, tmp_path: Path, part: dict[str, object]) -> None:
    data = config([source(corpus, "text", max_epochs=2, **part)], index_dir=tmp_path / "index")
    with Loader(data, 8, SEED) as loader:
        forecast = loader.forecast(None)
        epochs = [batch.epochs["a"] for batch in loader]
    assert (forecast.last_step, forecast.is_exact) == (len(epochs), True)
    assert epochs[-1] == pytest.approx(2)
    assert epochs == sorted(epochs)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"take": [0, 402]}, r"source 'a': take: \[0, 402\] reaches beyond the end of its 401 records"),
        ({"take": [401, None]}, r"take: \[401, null\] reaches beyond the end of its 401 records"),
    ],
)
def test_taking_what_is_not_there_names_how_many_records_there_are(
    corpus: Path, tmp_path: Path, part: dict[str, object], message: str
) -> None:
    data = config([source(corpus, "text", **part)], index_dir=tmp_path / "index")
    with pytest.raises(ShardError, match=message):
        preparation.prepare(data)
    with pytest.raises(ShardError, match=message):
        scored(suite_of(corpus, tmp_path, "text", **part))


def test_a_source_that_keeps_nothing_is_an_error(corpus: Path, tmp_path: Path) -> None:
    nothing = source(corpus, "text", name="b", hash_range=[0.5, 0.5000001])
    alone = config([{**nothing, "max_epochs": None}], index_dir=tmp_path / "index", lanes=1)
    with Loader(alone, 8) as loader, pytest.raises(ShardError, match=r"no row; .*or none is in hash_range: \[0\.5, "):
        next(loader)
    beside = config([source(corpus, "text"), nothing], index_dir=tmp_path / "index")
    with (
        Loader(beside, 8) as loader,
        pytest.raises(ShardError, match=r"'b': hash_range: .* leave no document of its 401"),
    ):
        loader.forecast(None)
    short = config([source(corpus, "text", min_tokens=100_000)], index_dir=tmp_path / "index")
    with (
        Loader(short, 8) as loader,
        pytest.raises(ShardError, match=r"'a': min_tokens: 100000 leave no document of its 401"),
    ):
        loader.forecast(None)
    blank = config([source(corpus, "text", take=[5, 6])], index_dir=tmp_path / "index")
    with (
        Loader(blank, 8) as loader,
        pytest.raises(ShardError, match=r"take: \[5, 6\] leave no document of its 1 records"),
    ):
        loader.forecast(None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"take": [5, 5]}, r"take: \[5, 5\] holds no record"),
        ({"take": [-1, 5]}, r"take: \[-1, 5\] holds no record"),
        ({"take": [0.5, 5]}, r"take\.0: 0\.5 is wrong; it should be a whole number"),
        ({"take": [5]}, r"take\.1: missing"),
        ({"hash_range": [0.5, 0.5]}, r"hash_range: \[0\.5, 0\.5\] holds no hash"),
        ({"hash_range": [0, 1.5]}, r"hash_range: \[0\.0, 1\.5\] holds no hash"),
        ({"hash_range": 0.5}, r"hash_range: 0\.5 is wrong; it should be a list"),
    ],
)
def test_an_empty_part_is_refused(corpus: Path, tmp_path: Path, values: dict[str, object], message: str) -> None:
    tree = {"tokenizer": str(TOKENIZER), "seq_len": 8, "sources": [source(corpus, "text", **values)]}
    with pytest.raises(ConfigError, match=rf"data\.sources\.0\.{message}"):
        DataConfig.parse(tree, "data")
    with pytest.raises(ConfigError, match=rf"evaluation\.suite\.sources\.0\.{message}"):
        find(suite_of(corpus, tmp_path, "text", **values), "val")


def test_bounds_of_a_length_that_exclude_each_other_are_refused(corpus: Path) -> None:
    with pytest.raises(ConfigError, match=r"source 'a': min_tokens=9 is above max_tokens=8"):
        DataConfig.parse(
            {"tokenizer": str(TOKENIZER), "seq_len": 8, "sources": [source(corpus, "text", min_tokens=9, max_tokens=8)]}
        )


def test_a_run_keeps_its_part_and_old_runs_theirs(corpus: Path, tmp_path: Path) -> None:
    def fingerprint(**part: object) -> dict[str, object]:
        with Loader(config([source(corpus, "text", **part)], index_dir=tmp_path / "index"), 8) as loader:
            return loader.fingerprint

    whole, part = fingerprint(), fingerprint(take=[0, 100])
    plain = whole["config"]["sources"][0]  # type: ignore[index]
    assert plain.keys() == {"name", "weight", "max_epochs", "text_key", "input_ids_key"}, "as before there were parts"
    check_fingerprint(part, fingerprint(take=[0, 100]))
    for other in (
        {"take": [0, 101]},
        {},
        {"take": [0, 100], "hash_range": [0, 0.5]},
        {"take": [0, 100], "min_tokens": 9},
    ):
        with pytest.raises(ConfigError, match=r"data\.sources\[0\]\.(take|hash_range|selection_version|min_tokens)"):
            check_fingerprint(part, fingerprint(**other))


@pytest.mark.parametrize(
    ("ours", "theirs", "is_divided"),
    [
        ({"hash_range": [0.8, 1.0]}, {"hash_range": [0, 0.8]}, True),
        ({"hash_range": [0.7, 1.0]}, {"hash_range": [0, 0.8]}, False),
        ({"hash_range": [0.8, 1.0]}, {}, False),
        ({"take": [200, None]}, {"take": [0, 200]}, True),
        ({"take": [199, None]}, {"take": [0, 200]}, False),
        ({"take": [0, 10], "hash_range": [0, 0.5]}, {"take": [5, 9], "hash_range": [0.5, 1]}, True),
        ({"hash_range": [0.8, 1.0], "template": TEMPLATE}, {"hash_range": [0, 0.8]}, False),
    ],
)
def test_a_suite_is_said_to_be_trained_on_unless_its_part_cannot_be(
    corpus: Path, tmp_path: Path, ours: dict[str, object], theirs: dict[str, object], is_divided: bool
) -> None:
    with Loader(config([source(corpus, "text", **theirs)], index_dir=tmp_path / "index"), 8) as loader:
        found = training_shards(find(suite_of(corpus, tmp_path, "text", **ours), "val"), loader.fingerprint)
    assert len(found) == (0 if is_divided else 3)


def test_numbers_mean_nothing_beside_other_shards(corpus: Path, tmp_path: Path) -> None:
    last = source(corpus, "text", paths=[f"{corpus}/s-2*"], take=[0, 10])
    with Loader(config([last], index_dir=tmp_path / "index"), 8) as loader:
        found = training_shards(find(suite_of(corpus, tmp_path, "text", take=[200, None]), "val"), loader.fingerprint)
    assert len(found) == 1
    assert "s-2.jsonl.gz" in found[0]


def test_hashes_are_even_and_do_not_go_along_with_the_choice_of_a_subset(corpus: Path, tmp_path: Path) -> None:
    counts = [
        len(scored(suite_of(corpus, tmp_path, "parquet", hash_range=[low, low + 0.25]))) for low in (0, 0.25, 0.5, 0.75)
    ]
    assert sum(counts) == DOCUMENTS
    assert np.ptp(counts) < DOCUMENTS / 4
