"""A run of several stages: what its batches hold, on any ranks, through any restarts, and what may not be changed."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import (
    Batch,
    CheckpointError,
    ConfigError,
    DataConfig,
    Loader,
    ShardError,
    Stage,
    StageData,
    Tokenizer,
    check_fingerprint,
    document,
    merge_states,
    read_documents,
)
from shards.records.document_list import hash_of_text
from shards.stages import stage_after
from tests.examples import examples
from tests.shards.corpora import TOKENIZER, config, ranks_of, record, words, write_shard, write_three_sources

SEED = 5
Run = tuple[DataConfig, int, list[Stage]]  # config and batch of the first stage, and the stages after it


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_three_sources(tmp_path_factory.mktemp("corpus"), (".jsonl.zst", ".jsonl"), max_frames=2)


def source(corpus: Path, name: str, **changes: object) -> dict[str, object]:
    return {"name": name, "paths": [str(corpus / f"{name}-*")], **changes}


def staged(data: DataConfig, batch: int, *changes: tuple[int, dict[str, object], int | None]) -> Run:
    """Return a run whose later stages are (step, what changes of the data, rows of a batch)."""
    stages = [Stage(0, data, batch)]
    for i, (step, values, rows) in enumerate(changes):
        stages.append(stage_after(stages[-1], step, StageData.parse(values), rows, f"stages.{i}"))
    return data, batch, stages[1:]


def loaders(run: Run, dp_size: int) -> list[Loader]:
    data, batch, stages = run
    return ranks_of(data, batch, SEED, dp_size, stages)


def steps(ranks: Sequence[Loader]) -> Iterator[list[Batch]]:
    """Yield the batches of all ranks, step by step, which exchange their cursors where a stage ends, as a run does."""
    while True:
        if any(rank.ends_stage for rank in ranks):
            merged = merge_states([rank.state_dict() for rank in ranks])
            for rank in ranks:
                rank.load_state_dict(json.loads(json.dumps(merged)))
        batches = [rank.next_batch() for rank in ranks]
        if all(rank.ended for rank in ranks):
            return
        yield batches


def hash_of(batches: Sequence[Batch]) -> int:
    return sum(batch.row_hash for batch in batches) % (1 << 64)


def hashes(run: Run, count: int) -> list[int]:
    """Return the global batches' hashes of a run on one rank without a restart."""
    ranks = loaders(run, 1)
    try:
        return [hash_of(batches) for batches in itertools.islice(steps(ranks), count)]
    finally:
        ranks[0].close()


PACKINGS = st.sampled_from(["best_fit", "concat", "truncate", "pad"])


@st.composite
def changes_of(draw: st.DrawFn, corpus: Path) -> tuple[dict[str, object], int | None]:
    """Draw what a stage changes."""
    values: dict[str, object] = {
        "seq_len": draw(st.sampled_from([None, 16, 48])),
        "packing": draw(st.none() | PACKINGS),
        "lanes": draw(st.sampled_from([None, 3, 4, 8])),
        "weights": draw(st.sampled_from([{}, {"a": 0.0}, {"a": 2.0, "b": 1.0}])),
    }
    return values, draw(st.sampled_from([None, 12, 24]))


@settings(deadline=None, max_examples=examples(40))
@given(draw=st.data())
def test_batches_of_stages_do_not_depend_on_ranks_or_restarts(corpus: Path, draw: st.DataObject) -> None:
    first = config([source(corpus, "a"), source(corpus, "b")], lanes=6)
    begins = sorted(draw.draw(st.sets(st.integers(1, 9), min_size=1, max_size=3)))
    changes = [(step, *draw.draw(changes_of(corpus))) for step in begins]
    changes[0][1]["sources"] = [source(corpus, "c", weight=draw.draw(st.sampled_from([0.5, 3.0])))]
    run = staged(first, 12, *changes)
    expected = hashes(run, 12)
    for dp_size in (2, 3):
        restarts, found = draw.draw(st.sets(st.integers(0, 11), max_size=3)), []
        ranks = loaders(run, dp_size)
        while len(found) < 12:
            for batches in itertools.islice(steps(ranks), 12 - len(found)):
                found.append(hash_of(batches))
                if len(found) in restarts:
                    state = json.dumps(merge_states([batch.state for batch in batches]))
                    for rank in ranks:
                        rank.close()
                    ranks = loaders(run, draw.draw(st.sampled_from([1, 2, 3])))
                    for rank in ranks:
                        rank.load_state_dict(json.loads(state))
                    restarts.discard(len(found))
                    break
        for rank in ranks:
            rank.close()
        assert found == expected


@settings(deadline=None, max_examples=examples(20))
@given(begin=st.integers(1, 9), batch=st.sampled_from([4, 5, 8]))
def test_a_stage_that_changes_nothing_changes_no_batch(corpus: Path, begin: int, batch: int) -> None:
    data = config([source(corpus, "a", weight=2), source(corpus, "b")], lanes=4)
    assert hashes(staged(data, batch, (begin, {}, None)), 12) == hashes(staged(data, batch), 12)


@pytest.mark.parametrize(("lanes", "batch", "begin"), [(4, 8, 5), (8, 4, 5), (8, 4, 6), (12, 4, 7), (4, 8, 4)])
def test_a_stage_beside_a_change_of_weights_changes_no_batch(corpus: Path, lanes: int, batch: int, begin: int) -> None:
    listed = [source(corpus, "a", weight=2), source(corpus, "b", weight=1)]
    data = config(listed, lanes=lanes, weight_changes=[{"step": 5, "weights": {"a": 0.5}}])
    assert hashes(staged(data, batch, (begin, {}, None)), 14) == hashes(staged(data, batch), 14)


def test_a_stage_begins_after_its_steps_however_many_batches_were_empty(tmp_path: Path) -> None:
    # Of 12 lanes, those with little to read run dry first, and then whole batches of 2 rows are empty
    lines = [record(words(i, 10 + 600 * (i % 5 == 0))) for i in range(40)]
    write_shard(tmp_path / "a.jsonl", b"".join(lines))
    listed = [{"name": "a", "paths": [str(tmp_path / "a.jsonl")], "max_epochs": 1}]
    data = config(listed, lanes=12, window_bytes=512)
    with loaders(staged(data, 2), 1)[0] as loader:
        alone = [batch.row_hash for batch in loader]
        assert loader.state_dict()["rows"] > 2 * len(alone), "no batch was empty"
    begin = len(alone) - 3
    run = staged(data, 2, (begin, {"seq_len": 16}, None))
    for ranks in (loaders(run, 1), loaders(run, 2)):
        found = []
        while not all(rank.ended for rank in ranks):
            if any(rank.ends_stage for rank in ranks):
                state = merge_states([rank.state_dict() for rank in ranks])
                for rank in ranks:
                    rank.load_state_dict(state)
            batches = [rank.next_batch() for rank in ranks]
            if any(batch.num_rows for batch in batches):
                found.append((batches[0].tokens.shape[1], hash_of(batches)))
            else:
                for rank in ranks:
                    rank.pass_over()
        assert [row_hash for _, row_hash in found[:begin]] == alone[:begin]
        assert [length for length, _ in found[: begin + 1]] == [33] * begin + [17]
        for rank in ranks:
            rank.close()
    with loaders(run, 1)[0] as loader:
        assert [batch.row_hash for batch in itertools.islice(loader, len(found))] == [hashed for _, hashed in found]


def test_a_stage_cannot_follow_a_gap_before_other_weights(corpus: Path) -> None:
    listed = [source(corpus, "a", max_epochs=1), source(corpus, "b", weight=0)]

    def data(change: int) -> DataConfig:
        return config(listed, lanes=4, weight_changes=[{"step": change, "weights": {"b": 1.0}}])

    with loaders(staged(data(300), 8), 1)[0] as loader:
        dry = next(step for step, batch in enumerate(loader) if batch.source_tokens.keys() == {"b"})
    for change, message in ((dry + 3, "a stage cannot follow"), (300, "end before the stage at step .* begins")):
        run = staged(data(change), 8, (dry + 5, {"seq_len": 16}, None))
        with loaders(run, 1)[0] as loader, pytest.raises((ConfigError, ShardError), match=message):
            for _ in itertools.islice(loader, dry + 10):
                pass


def test_no_rank_inherits_the_bad_records_of_others(tmp_path: Path) -> None:
    lines = [b"{}\n" if i % 4 == 0 else record(words(i, 20)) for i in range(400)]
    write_shard(tmp_path / "a.jsonl", b"".join(lines))
    data = config([{"name": "a", "paths": [str(tmp_path / "a.jsonl")], "max_epochs": 1}], lanes=4, on_bad_record="skip")
    ranks = loaders(staged(data, 8, (10, {"lanes": 8}, None)), 4)
    for batches in itertools.islice(steps(ranks), 12):
        so_far = [batch.skipped_so_far for batch in batches]
    assert sum(so_far) > 20
    assert max(so_far) < sum(so_far) / 2
    for rank in ranks:
        rank.close()


@pytest.mark.parametrize("lanes", [4, 6])
def test_a_stage_of_other_weights_is_a_change_of_weights(corpus: Path, lanes: int) -> None:
    listed = [source(corpus, "a", weight=2), source(corpus, "b", weight=1)]
    change = {"step": 3, "weights": {"a": 0.5}}
    by_change = staged(config(listed, lanes=lanes, weight_changes=[change]), 8)
    by_stage = staged(config(listed, lanes=lanes), 8, (3, {"weights": {"a": 0.5}}, None))
    assert hashes(by_stage, 8) == hashes(by_change, 8)


def test_everything_before_a_stage_stays_as_it_was(corpus: Path) -> None:
    data = config([source(corpus, "a"), source(corpus, "b")], lanes=4)
    plain = hashes(staged(data, 8), 10)
    run = staged(data, 8, (4, {"seq_len": 64, "lanes": 8, "sources": [source(corpus, "c", weight=5)]}, 16))
    found = hashes(run, 10)
    assert found[:4] == plain[:4]
    assert not set(found[4:]) & set(plain)


def targets_of(ranks: Sequence[Loader]) -> Counter[tuple[str, int, int]]:
    """Count how often each token (shard, line, index in its document) is a target until the data ends."""
    found: Counter[tuple[str, int, int]] = Counter()
    for batches in steps(ranks):
        for origin in batches[0].origins():
            for token in range(origin.start + 1, origin.stop):
                found[origin.shard, origin.line, token] += 1
    return found


@settings(deadline=None, max_examples=examples(25))
@given(draw=st.data())
def test_every_token_is_a_target_once_an_epoch_whatever_stages_there_are(corpus: Path, draw: st.DataObject) -> None:
    first = config(
        [source(corpus, "a", max_epochs=2)], lanes=4, packing=draw.draw(st.sampled_from(["best_fit", "concat"]))
    )
    begins = sorted(draw.draw(st.sets(st.integers(1, 40), min_size=1, max_size=3)))
    changes: list[tuple[int, dict[str, object], int | None]] = [
        (
            step,
            {
                "seq_len": draw.draw(st.sampled_from([None, 16, 48, 100])),
                "packing": draw.draw(st.sampled_from([None, "best_fit", "concat"])),
                "lanes": draw.draw(st.sampled_from([None, 1, 3, 7])),
            },
            None,
        )
        for step in begins
    ]
    ranks = loaders(staged(first, 4, *changes), 1)
    try:
        found = targets_of(ranks)
        epochs = ranks[0]._leg.epochs()
    finally:
        ranks[0].close()
    tokenizer = Tokenizer(TOKENIZER, bos=True, eos=True)
    expected = Counter[tuple[str, int, int]]()
    for path in sorted(p for p in corpus.glob("a-*") if ".index" not in p.name):
        for found_there in read_documents(path):
            (length,) = tokenizer.encode_documents([found_there.text])[1].tolist()
            expected.update({(str(path), found_there.line, token): 2 for token in range(1, length)})
    assert (found - expected).total() == (expected - found).total() == 0
    assert epochs["a"] == pytest.approx(2)


def test_a_source_that_is_taken_out_goes_on_where_it_was_when_it_comes_back(corpus: Path) -> None:
    data = config([source(corpus, "a"), source(corpus, "b")], lanes=4)
    run = staged(data, 4, (2, {"weights": {"a": 0.0}}, None), (4, {"weights": {"a": 1.0, "b": 0.0}}, None))
    alone = staged(config([source(corpus, "a")], lanes=4), 4)

    def pieces(run: Run, count: int) -> list[list[tuple[str, int, int]]]:
        ranks = loaders(run, 1)
        lanes: list[list[tuple[str, int, int]]] = [[] for _ in range(4)]
        for batches in itertools.islice(steps(ranks), count):
            for origin in batches[0].origins():
                if origin.source == "a":
                    lanes[origin.slot % 4].append((origin.shard, origin.line, origin.start))
        ranks[0].close()
        return lanes

    for mixed, whole in zip(pieces(run, 8), pieces(alone, 12), strict=True):
        assert mixed
        assert mixed == whole[: len(mixed)]


def test_forgotten_documents_become_padding_and_change_nothing_else(corpus: Path, tmp_path: Path) -> None:
    shard = sorted(corpus.glob("a-*"))[0]
    listed = tmp_path / "forget.jsonl"
    ident = tmp_path / "b-9.jsonl"
    write_shard(ident, b"".join(record(words(i, 30), id=f"n{i}") for i in range(40)))
    sources = [source(corpus, "a"), {"name": "n", "paths": [str(ident)]}]
    text = document(shard, 9).text
    lines = [{"shard": shard.name, "line": 7}, {"source": "n", "id": "n3"}, {"text_hash": hash_of_text(text)}]
    listed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    gone = {(str(shard), 7), (str(shard), 9), (str(ident), 4)}
    data = config(sources, lanes=4)
    plain, masked = (
        loaders(run, 1)[0] for run in (staged(data, 8), staged(data, 8, (3, {"forget": str(listed)}, None)))
    )
    masks = 0
    for step in range(60):
        a, b = next(plain), next(masked)
        assert a.row_hash == b.row_hash == a.trained_hash
        where = [origin for origin in a.origins() if (origin.shard, origin.line) in gone] if step >= 3 else []
        assert (b.trained_hash == b.row_hash) == (not where)
        masks += len(where)
        assert b.forgotten_tokens == sum(origin.stop - origin.start for origin in where)
        expected = a.segment_ids.copy()
        for slot, origins in itertools.groupby(a.origins(), key=lambda origin: origin.slot):
            for piece, origin in enumerate(origins, 1):
                if origin in where:
                    expected[slot][expected[slot] == piece] = 0
        assert (b.segment_ids == expected).all()
        assert (b.tokens == a.tokens * (expected > 0)).all()
        assert b.padding_tokens == a.padding_tokens
    assert masks > 5


def test_stages_that_have_begun_may_not_change_and_others_may(corpus: Path) -> None:
    data = config([source(corpus, "a"), source(corpus, "b")], lanes=4)

    def print_of(*changes: tuple[int, dict[str, object], int | None]) -> dict[str, object]:
        with loaders(staged(data, 8, *changes), 1)[0] as loader:
            return json.loads(json.dumps(loader.fingerprint))

    plain, one = print_of(), print_of((4, {"seq_len": 64}, None))
    other, two = print_of((4, {"seq_len": 48}, None)), print_of((4, {"seq_len": 64}, None), (6, {"lanes": 8}, 16))
    for new in (plain, other, two):
        check_fingerprint(one, new, step=4)  # the stage begins with the next step
    check_fingerprint(one, two, step=6)
    with pytest.raises(ConfigError, match=r"stages\.0\.data\.seq_len: .*begun with 64, now it is 48"):
        check_fingerprint(one, other, step=5)
    for old, new in ((one, plain), (plain, one)):
        with pytest.raises(ConfigError, match="fork the run before that step"):
            check_fingerprint(old, new, step=5)
    with pytest.raises(ConfigError):
        check_fingerprint(one, plain)


def test_stages_that_do_not_fit_are_refused(corpus: Path, tmp_path: Path) -> None:
    data = config([source(corpus, "a"), source(corpus, "b")], lanes=4)
    for values, message in (
        ({"weights": {"z": 1.0}}, r"stages\.0\.data\.weights: no source 'z' before this stage; there are \['a', 'b'\]"),
        ({"sources": [source(corpus, "a")]}, "'a' is a source already"),
        ({"weights": {"a": 0.0, "b": 0.0}}, "all weights are 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            staged(data, 8, (3, values, None))
    with pytest.raises(ConfigError, match=r"stages\.1\.step=3: the stage before begins at step 3; .* overlap"):
        staged(data, 8, (3, {}, None), (3, {}, None))
    path = tmp_path / "list.jsonl"
    shard = sorted(corpus.glob("a-*"))[0]
    for line, message in (
        ('{"shard": "nowhere.zst", "line": 3}', "no source has a shard nowhere.zst"),
        (json.dumps({"shard": shard.name, "line": 4000}), rf"{shard.name} has no line 4000; it has \d+"),
        ('{"source": "z", "id": "1"}', "no source 'z'"),
        ('{"shard": "x"}', "line 1: .* is in no form"),
        ("nonsense", "line 1: "),
        ("", "names no document"),
    ):
        path.write_text(line + "\n")
        with pytest.raises(ConfigError, match=message):
            loaders(staged(data, 8, (3, {"forget": str(path)}, None)), 1)


def test_cursors_of_one_rank_do_not_suffice_for_other_lanes(corpus: Path) -> None:
    run = staged(config([source(corpus, "a")], lanes=4), 8, (2, {"lanes": 8}, None))
    with loaders(run, 2)[0] as loader:
        loader.next_batch()
        loader.next_batch()
        with pytest.raises(CheckpointError, match="merge the states of all ranks"):
            loader.next_batch()


def test_data_that_ends_before_a_stage_begins_is_an_error(corpus: Path) -> None:
    run = staged(config([source(corpus, "a", max_epochs=1)], lanes=4), 8, (4000, {"seq_len": 64}, None))
    with loaders(run, 1)[0] as loader:
        assert loader.forecast(5000).unreached == 4000
    for begin in (4, 10):
        sooner = staged(config([source(corpus, "a", max_epochs=1)], lanes=4), 8, (begin, {"seq_len": 64}, None))
        with loaders(sooner, 1)[0] as loader:
            assert loader.forecast(20).unreached is None
    with loaders(run, 1)[0] as loader, pytest.raises(ShardError, match="end before the stage at step 4000 begins"):
        for _ in loader:
            pass
