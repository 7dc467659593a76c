"""A conversion is believed only whole, and begun only where there is room. What it holds: tests/distributed."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.checkpoint.store import CheckpointConfig, CheckpointStore, FileEntry, write_manifest
from pretrain.checkpoint.universal import is_whole
from shards import ConfigError
from shards.durable import hash_file


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """With a conversion of step 7 for two tensor-parallel ranks."""
    store = CheckpointStore(tmp_path, CheckpointConfig(reserve_bytes=0))
    folder = store.universal_folder(7, 2)
    folder.mkdir()
    (folder / "fp32.pt").write_bytes(b"weights")
    write_manifest(folder, [FileEntry("fp32.pt", 7, hash_file(folder / "fp32.pt"))], seconds=1.0)
    return store


def test_it_is_for_one_step_and_one_tp_size(store: CheckpointStore) -> None:
    assert is_whole(store, 7, 2)
    assert not is_whole(store, 7, 1)
    assert not is_whole(store, 8, 2)
    assert store.steps() == []  # it is no checkpoint


def test_a_flipped_bit_or_a_missing_end_is_noticed(store: CheckpointStore) -> None:
    folder = store.universal_folder(7, 2)
    (folder / "fp32.pt").write_bytes(b"weightr")
    assert not is_whole(store, 7, 2)
    (folder / "fp32.pt").write_bytes(b"weights")
    assert is_whole(store, 7, 2)
    (folder / "COMPLETE").unlink()
    assert not is_whole(store, 7, 2)


def test_it_goes_when_its_step_is_saved_anew_but_not_with_another(store: CheckpointStore) -> None:
    store.prepare(8)
    assert is_whole(store, 7, 2)
    store.prepare(7)
    assert not store.universal_folder(7, 2).exists()


def test_one_that_does_not_fit_is_refused_with_sizes(store: CheckpointStore) -> None:
    store.check_room_for_universal(1000)
    with pytest.raises(ConfigError, match=r"takes 1000000000\.00 GB.*free .* GB"):
        store.check_room_for_universal(10**18)
