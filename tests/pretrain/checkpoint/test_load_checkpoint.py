"""All ranks use the same checkpoint, and an error on one is an error on all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import xxhash

from pretrain.checkpoint.store import CheckpointConfig, CheckpointFile, CheckpointStore, write_complete
from pretrain.evaluation import checkpoints
from pretrain.evaluation.checkpoints import load_checkpoint, score_steps
from pretrain.model.transformer import LlamaConfig
from pretrain.topology import Topology
from shards import CheckpointError, HeadraceError
from shards.storage.content_hash import hash_file

SIZE = 2


class ThreadTopology(Topology):
    """Ranks that are threads."""

    barrier_of_all: threading.Barrier
    values: list[object]

    def gather_objects(self, value):  # type: ignore[no-untyped-def]
        self.values[self.rank] = value
        self.barrier_of_all.wait(10)
        gathered = list(self.values)
        self.barrier_of_all.wait(10)
        return gathered

    def broadcast_object(self, value):  # type: ignore[no-untyped-def]
        return self.gather_objects(value)[0]


def on_ranks(work: Callable[[Topology], object]) -> list[object]:
    """Return a function's result on each of two ranks: a value, or the error that it raised."""
    barrier, values = threading.Barrier(SIZE), [None] * SIZE

    def one(rank: int) -> object:
        here = ThreadTopology(rank, SIZE, rank, SIZE, 0, 1, torch.device("cpu"))
        object.__setattr__(here, "barrier_of_all", barrier)
        object.__setattr__(here, "values", values)
        try:
            return work(here)
        except HeadraceError as error:
            return type(error), str(error)

    with ThreadPoolExecutor(SIZE) as pool:
        return list(pool.map(one, range(SIZE)))


class Model:
    """A model that records the checkpoint loaded into it."""

    config = LlamaConfig(dim=4, n_layers=1, n_heads=1, vocab_size=8)
    step = -1

    def adopt(self, config: LlamaConfig) -> None:
        self.config = config

    def set_weights(self, weights: int) -> None:
        assert self.config.rope_theta == weights, "the positions are those of the checkpoint that was chosen"
        self.step = weights


def model_of(step: int) -> LlamaConfig:
    return Model.config.model_copy(update={"rope_theta": float(step)})


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make checkpoints of steps 2 and 4, whose weights are their step."""
    for step in (2, 4):
        folder = tmp_path / f"step_{step:08d}"
        folder.mkdir()
        write_complete(folder, [], 0.0)
    monkeypatch.setattr(checkpoints, "run_weights", lambda checkpoint, model, base: checkpoint.step)
    return tmp_path


def test_all_ranks_load_the_checkpoint_that_rank_0_finds_newest(root: Path) -> None:
    def work(here: Topology) -> tuple[int, int]:
        model, store = Model(), CheckpointStore(root, CheckpointConfig())
        if here.is_main:
            store.steps = lambda: [2]  # type: ignore[method-assign]  # it looked before the training had saved step 4
        return load_checkpoint(model, store, None, here, model_of), model.step  # type: ignore[arg-type]

    assert on_ranks(work) == [(2, 2), (2, 2)]


@pytest.mark.parametrize("rank", range(SIZE))
def test_an_error_on_one_rank_is_an_error_on_all(root: Path, rank: int) -> None:
    def work(here: Topology) -> object:
        store = CheckpointStore(root / "nothing" if here.rank == rank else root, CheckpointConfig())
        return load_checkpoint(Model(), store, 4, here, model_of)  # type: ignore[arg-type]

    errors = on_ranks(work)
    assert errors[0] == errors[1]
    assert issubclass(errors[0][0], CheckpointError)  # type: ignore[index]
    assert "nothing" in errors[0][1]  # type: ignore[index]


def test_each_file_is_compared_with_its_hash_by_one_rank(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "step_00000006" / "engine"
    folder.mkdir(parents=True)
    names = [f"{number}.pt" for number in range(5)]
    entries = [CheckpointFile(f"engine/{name}", len(name), xxhash.xxh3_128_hexdigest(name.encode())) for name in names]
    for name in names:
        (folder / name).write_text(name)
    write_complete(folder.parent, entries, 0.0)
    hashed: list[str] = []

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return hash_file(path)

    monkeypatch.setattr("pretrain.checkpoint.store.hash_file", counted)

    def work(here: Topology) -> int:
        return load_checkpoint(Model(), CheckpointStore(root, CheckpointConfig()), 6, here, model_of)  # type: ignore[arg-type]

    assert on_ranks(work) == [6, 6]
    assert sorted(hashed) == names
    for name in names:  # whichever rank it is dealt to
        (folder / name).write_text("?.pt")
        errors = on_ranks(work)
        assert errors[0] == errors[1]
        assert errors[0][0] is CheckpointError  # type: ignore[index]
        assert f"{name} differs from what was saved" in errors[0][1]  # type: ignore[index]
        (folder / name).write_text(name)


def test_missing_steps_are_an_error_on_all_ranks(root: Path) -> None:
    store = CheckpointStore(root, CheckpointConfig())

    def work(here: Topology) -> object:
        evaluator = SimpleNamespace(topology=here, labels=["s"])
        steps = (store.find(step).step for step in [3])
        return score_steps(evaluator, store, None, steps, must_be_there=True)  # type: ignore[arg-type]

    errors = on_ranks(work)
    assert errors[0] == errors[1]
    assert "no complete checkpoint of step 3; it has [2, 4]" in errors[0][1]  # type: ignore[index]
