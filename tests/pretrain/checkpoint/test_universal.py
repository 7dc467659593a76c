"""A conversion is as large as its source, the same for any number of ranks, and trusted only if complete.

Training on from a conversion is tested with real ranks, in tests/distributed.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pretrain.checkpoint.store import CheckpointConfig, CheckpointFile, CheckpointStore, write_complete
from pretrain.checkpoint.universal import convert, is_whole, read_piece
from shards import ConfigError
from shards.storage.content_hash import hash_file


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """Make a store with a conversion of step 7 for two tensor-parallel ranks."""
    store = CheckpointStore(tmp_path, CheckpointConfig(reserve_bytes=0))
    folder = store.universal_folder(7, 2)
    folder.mkdir()
    (folder / "fp32.pt").write_bytes(b"weights")
    write_complete(folder, [CheckpointFile("fp32.pt", 7, hash_file(folder / "fp32.pt"))], seconds=1.0)
    return store


def test_a_conversion_is_for_one_step_and_one_tp_size(store: CheckpointStore) -> None:
    assert is_whole(store.universal_folder(7, 2), 7)
    assert not is_whole(store.universal_folder(7, 1), 7)
    assert store.steps() == []  # it is not a checkpoint


def test_a_flipped_bit_or_a_missing_end_is_detected(store: CheckpointStore) -> None:
    folder = store.universal_folder(7, 2)
    (folder / "fp32.pt").write_bytes(b"weightr")
    assert not is_whole(store.universal_folder(7, 2), 7)
    (folder / "fp32.pt").write_bytes(b"weights")
    assert is_whole(store.universal_folder(7, 2), 7)
    (folder / "COMPLETE").unlink()
    assert not is_whole(store.universal_folder(7, 2), 7)


def test_a_conversion_is_removed_when_its_step_is_saved_again_but_not_with_another(store: CheckpointStore) -> None:
    store.prepare(8)
    assert is_whole(store.universal_folder(7, 2), 7)
    store.prepare(7)
    assert not store.universal_folder(7, 2).exists()


def test_a_conversion_that_does_not_fit_is_refused_with_sizes(store: CheckpointStore) -> None:
    store.check_room_for_universal(1000)
    with pytest.raises(ConfigError, match=r"takes 1000000000\.00 GB.*free .* GB"):
        store.check_room_for_universal(10**18)


VOCABULARY = 509  # tokens of the output's rows; the rest is padding of a former tp_size
SHAPES = {"rows.weight": (4096, 64), "columns.weight": (64, 4096), "output.weight": (512, 64), "norm.weight": (64,)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, torch.Tensor]]]:
    """Save what a conversion reads of ZeRO-1 on two ranks; return its folder and the states by kind and weight."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "engine").mkdir()
    generator = torch.Generator().manual_seed(1)
    states = {
        kind: {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for kind in ("fp32", "exp_avg", "exp_avg_sq")
    }
    flat = {kind: torch.cat([state.flatten() for state in states[kind].values()]) for kind in states}
    half = len(flat["fp32"]) // 2
    for rank in (0, 1):
        first, start, places = rank * half, 0, {}
        for name, shape in SHAPES.items():
            size = torch.Size(shape).numel()
            begin, end = max(start, first), min(start + size, first + half)
            if begin < end:
                places[name] = SimpleNamespace(start=begin - first, numel=end - begin)
            start += size
        own = {kind: values[first : first + half].clone() for kind, values in flat.items()}
        saved = {
            "base_optimizer_state": {"state": {0: {**own, "step": torch.tensor(3.0)}}},
            "single_partition_of_fp32_groups": [own["fp32"]],
            "param_slice_mappings": [places],
        }
        torch.save({"optimizer_state_dict": saved}, folder / f"engine/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    info = {
        "tp_replicated_parameter_patterns": [r"^norm\.weight$"],
        "parameter_with_row_parallelism_patterns": [r"^columns\.weight$"],
        "vocabulary_parameter_patterns": [r"^output\.weight$"],
        "original_vocab_size": VOCABULARY,
    }
    metadata = {
        "param_shapes": [{name: torch.Size(shape) for name, shape in SHAPES.items()}],
        "universal_checkpoint_info": info,
        "ds_version": "0",
    }
    torch.save(metadata, folder / "engine/mp_rank_00_model_states.pt")
    return folder, states


def made(source: Path, target: Path, tp_size: int, ranks: int = 1) -> list[CheckpointFile]:
    target.mkdir()
    entries = [entry for rank in range(ranks) for entry in convert(source, target, tp_size, rank, ranks)]
    return sorted(entries, key=lambda entry: entry.name)


@pytest.mark.parametrize("tp_size", [1, 2, 8])
def test_a_conversion_holds_each_slice_once(checkpoint, tp_size: int, tmp_path: Path) -> None:
    source, states = checkpoint
    entries = made(source, tmp_path / "made", tp_size)
    assert sum(entry.size for entry in entries) == sum(
        path.stat().st_size for path in (tmp_path / "made").rglob("*.pt")
    )
    for kind, of_kind in states.items():
        for name, state in of_kind.items():
            files = [tmp_path / f"made/tp_{rank}/engine/zero/{name}/{kind}.pt" for rank in range(tp_size)]
            slices = [torch.load(file)["param"] for file in files]
            dim = {"columns.weight": 1, "norm.weight": None}.get(name, 0)
            found = slices[0] if dim is None else torch.cat(slices, dim)
            rows = VOCABULARY if name == "output.weight" else len(state)
            assert torch.equal(found[:rows], state[:rows])
            assert len(found) == -(-rows // tp_size) * tp_size
            assert not found[rows:].any()
            for file, part in zip(files, slices, strict=True):
                assert file.stat().st_size < part.nbytes + 2000, file  # the rest is torch.save's overhead


def test_any_number_of_ranks_make_the_same_conversion(checkpoint, tmp_path: Path) -> None:
    alone = made(checkpoint[0], tmp_path / "alone", 2)
    assert made(checkpoint[0], tmp_path / "three", 2, ranks=3) == alone
    assert made(checkpoint[0], tmp_path / "nine", 2, ranks=9) == alone  # more ranks than weights


@pytest.mark.parametrize("ranks", [1, 3, 4, 5, 50])
def test_pieces_are_cut_as_in_zero_3(ranks: int, tmp_path: Path) -> None:
    weight = torch.arange(24.0).view(4, 6)
    torch.save({"param": weight}, tmp_path / "fp32.pt")
    pieces = [read_piece(tmp_path / "fp32.pt", rank, ranks) for rank in range(ranks)]
    assert len({piece.shape for piece in pieces}) == 1
    assert torch.equal(torch.cat(pieces)[:24].view(4, 6), weight)
    assert not torch.cat(pieces)[24:].any()


def test_a_piece_is_read_without_the_rest_of_the_file(tmp_path: Path) -> None:
    torch.save({"param": torch.zeros(1 << 12, 1 << 12)}, tmp_path / "fp32.pt")  # 64 MiB
    Path("/proc/self/clear_refs").write_text("5")  # lets the peak begin at what is held now
    before = peak_bytes()
    piece = read_piece(tmp_path / "fp32.pt", 3, 7)
    assert peak_bytes() - before < 3 * piece.nbytes  # the mapped piece and its copy


def peak_bytes() -> int:
    """Return the most memory that this process has held."""
    (line,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(line) << 10
