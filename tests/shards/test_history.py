"""Where a run had some documents, compared with all batches of the run, drawn by a loader alone."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import CheckpointError, Loader, LoaderState
from shards.exposure.search import DocumentPlace
from shards.history import Anchor, Historian, History
from tests.examples import examples
from tests.shards.corpora import config, write_three_sources
from tests.shards.test_stages import SEED, Run, changes_of, source, staged

Piece = tuple[int, int, int, int]  # step, slot, start, stop


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_three_sources(tmp_path_factory.mktemp("corpus"), (".jsonl.zst", ".jsonl"), max_frames=2)


def drawn(run: Run, steps: int) -> tuple[dict[tuple[str, int], list[Piece]], list[Anchor]]:
    """Draw all batches of a run: the pieces of each document (shard, line), and the state after each step."""
    data, batch, stages = run
    pieces: dict[tuple[str, int], list[Piece]] = defaultdict(list)
    states = []
    with Loader(data, batch, SEED, stages=stages) as loader:
        for step, made in zip(range(1, steps + 1), loader, strict=False):
            for origin in made.origins():
                pieces[origin.shard, origin.line].append((step, origin.slot, origin.start, origin.stop))
            states.append(Anchor(step, LoaderState.from_dict(json.loads(json.dumps(loader.state_dict())))))
    return pieces, states


def found(run: Run, documents: list[DocumentPlace], anchors: list[Anchor], steps: int) -> tuple[History, Historian]:
    data, batch, stages = run
    with Loader(data, batch, SEED, stages=stages) as loader:
        historian = Historian(loader.plan, loader.pool, documents)
        return historian.find(anchors, steps), historian


def everything(run: Run) -> dict[DocumentPlace, tuple[str, int]]:
    """Return all records of a run's sources, with the names that origins have for them."""
    data, batch, stages = run
    with Loader(data, batch, SEED, stages=stages) as loader:
        return {
            DocumentPlace(i, number, line): (shard.path, line)
            for i, listed in enumerate(loader.plan.shards)
            for number, shard in enumerate(listed)
            for line in range(1, shard.index.num_records + 1)
        }


@settings(deadline=None, max_examples=examples(60))
@given(draw=st.data())
def test_all_pieces_are_found_whatever_stages_there_are_and_states_were_kept(corpus: Path, draw: st.DataObject) -> None:
    limit = draw.draw(st.sampled_from([None, 1, 2]))
    first = config([source(corpus, "a", max_epochs=limit), source(corpus, "b")], lanes=draw.draw(st.integers(1, 9)))
    begins = sorted(draw.draw(st.sets(st.integers(1, 60), max_size=3)))
    changes = [(step, *draw.draw(changes_of(corpus))) for step in begins]
    if changes:
        changes[-1][1]["sources"] = [source(corpus, "c", weight=draw.draw(st.sampled_from([0.5, 3.0])))]
    run = staged(first, 12, *changes)
    pieces, states = drawn(run, draw.draw(st.sampled_from([20, 80])))
    kept = sorted(draw.draw(st.sets(st.sampled_from(range(len(states))), max_size=len(states))))
    all_documents = everything(run)
    places = draw.draw(st.permutations(list(all_documents)))[: draw.draw(st.sampled_from([1, 3, 20, 400]))]
    history, _ = found(run, places, [states[i] for i in kept], len(states))
    by_document: dict[int, list[Piece]] = defaultdict(list)
    for one in history.appearances:
        by_document[one.document].append((one.step, one.slot, one.start, one.stop))
    for number, place in enumerate(places):
        assert sorted(by_document[number]) == sorted(pieces.get(all_documents[place], [])), place


def test_only_the_lanes_concerned_are_drawn_and_only_where_they_were(corpus: Path) -> None:
    run = staged(config([source(corpus, "a"), source(corpus, "b")], lanes=12), 12)
    pieces, states = drawn(run, 200)
    kept = states[9::10]
    for place, name in list(everything(run).items())[::40]:
        history, historian = found(run, [place], kept, 200)
        assert [(one.step, one.slot, one.start, one.stop) for one in history.appearances] == pieces[name]
        states_apart = {(one.step - 1) // 10 for one in history.appearances}
        assert historian.steps_drawn <= 10 * 2 * len(states_apart), "one lane or two, from one state to the next"
        assert historian.pool.num_made <= 2 * len({one.epoch for one in history.appearances}) + 1


def test_windows_that_come_out_otherwise_are_refused(corpus: Path) -> None:
    run = staged(config([source(corpus, "a")], lanes=4), 8)
    _, states = drawn(run, 40)
    other = staged(config([source(corpus, "a")], lanes=4, packing="pad"), 8)
    with pytest.raises(CheckpointError, match=r"made again, a window has \d+ rows where the run recorded \d+"):
        found(other, list(everything(run)), states[4::5], 40)


def test_batches_without_a_row_are_no_steps(corpus: Path) -> None:
    listed = [source(corpus, "a", max_epochs=1), source(corpus, "b", weight=0.0)]
    change = {"step": 400, "weights": {"b": 1.0}}
    run = staged(config(listed, lanes=4, weight_changes=[change]), 12)
    pieces, states = drawn(run, 60)
    last = states[-1]
    assert last.state.rows // 12 > 400 > last.step
    documents = everything(run)
    for kept in ([], [last], states[4::7]):
        history, _ = found(run, list(documents), kept, len(states))
        by_document: dict[int, list[Piece]] = defaultdict(list)
        for one in history.appearances:
            by_document[one.document].append((one.step, one.slot, one.start, one.stop))
        assert [sorted(by_document[i]) for i in range(len(documents))] == [
            sorted(pieces.get(name, [])) for name in documents.values()
        ]
