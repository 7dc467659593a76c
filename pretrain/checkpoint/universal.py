"""Convert a checkpoint to another number of ranks or another ZeRO stage. resume -> universal -> engine.

DeepSpeed's files hold flat fragments, in a partition for each rank. Here weights and moments are joined and written in
DeepSpeed's universal layout, one file each; a rank reads its part of each file, whatever the dp_size and stage:

    step_00001000.universal-tp2/
        tp_0/engine/zero/<weight>/{fp32,exp_avg,exp_avg_sq,step}.pt    as tensor-parallel rank 0 of 2 holds them
        tp_1/...
        COMPLETE                                                       written last, as in a checkpoint

DeepSpeed's own converter writes everything twice, and its output for ZeRO-3 fits no other tp_size or stage. Since this
one already cuts the weights for the new tp_size, DeepSpeed only has to divide them over dp ranks. What pads the
vocabulary's slices is zero in weights and moments alike (`model/parallel.py`): it is dropped, and made anew where the
new tp_size needs it.

All ranks convert together, each the weights dealt to it, and finish at about the same time, so that no collective waits
for long.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from math import ceil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.checkpoint.store import Checkpoint, CheckpointFile, CheckpointStore, read_complete, write_complete
from pretrain.checkpoint.write import Writer
from pretrain.checkpoint.zero_files import AVERAGE, Partition, Saved, read_partitions, whole
from pretrain.model.parallel import slice_of
from pretrain.topology import Layout, Topology
from shards import CheckpointError
from shards.storage.atomic import fsync_folder

_logger = logging.getLogger(__name__)

_LINE_SECONDS = 10.0  # between two lines of progress
_STATES = ("fp32", "exp_avg", "exp_avg_sq")  # the master weight and its moments; Muon has only the first


def find_or_convert(
    store: CheckpointStore, checkpoint: Checkpoint, saved: Layout, wanted: Layout, topology: Topology
) -> Path:
    """Return the folder with a checkpoint's conversion, which all ranks create together unless it already exists.

    Args:
        saved, wanted: the checkpoint's layout, and the layout to resume with.
    Raises:
        ConfigError: on all ranks, if the disk lacks the room, with the sizes.
        CheckpointError: on all ranks, if the checkpoint cannot be converted.
    """
    step, tp_size = checkpoint.step, wanted.tp_size
    target = store.universal_folder(step, tp_size)
    if not topology.any(not is_whole(target, step, topology.rank, topology.world_size)):
        return target
    begun = time.monotonic()

    def make_folder() -> None:
        if topology.is_main:
            _logger.info("the checkpoint of step %d was saved by %s; converting it for %s", step, saved, wanted)
            store.discard_universal()
            store.discard_incomplete()
            store.check_room_for_universal(sum(file.size for file in checkpoint.files))
            target.mkdir()

    topology.together(make_folder)
    own = topology.together(lambda: convert(checkpoint.folder, target, tp_size, topology.rank, topology.world_size))
    files = [file for part in topology.gather_objects(own) for file in part]

    def complete() -> None:
        if topology.is_main:
            seconds = time.monotonic() - begun
            write_complete(target, files, seconds)
            size = sum(file.size for file in files)
            _logger.info("converted %d files, %.3g GB, in %.1f s: %s", len(files), size / 1e9, seconds, target)

    topology.together(complete)
    return target


def is_whole(folder: Path, step: int, part: int = 0, parts: int = 1) -> bool:
    """Return whether a conversion is complete, and every file in one part of it undamaged."""
    try:
        return not read_complete(folder, step).broken_files(part, parts)
    except CheckpointError:
        return False


def convert(checkpoint: Path, target: Path, tp_size: int, rank: int = 0, world_size: int = 1) -> list[CheckpointFile]:
    """Write one rank's part of a conversion of `checkpoint`/engine to `tp_size` tensor-parallel ranks into `target`.

    Args:
        target: a folder that holds nothing but the other ranks' output.
        rank, world_size: select the part of the weights to convert.
    Returns:
        The files written, which are durable.
    Raises:
        CheckpointError: if files of the checkpoint are missing, or a file cannot be written.
    """
    partitions, metadata = read_partitions(checkpoint / "engine")
    dims, vocab_size = _shard_dims(metadata), _vocab_size(metadata)
    multiple = metadata["universal_checkpoint_info"].get("vocab_multiple", 1)
    # A small weight may lie on a single dp rank.
    sizes = {name: fragment.shape.numel() for partition in partitions[0] for name, fragment in partition.items()}
    names = _dealt(sizes, rank, world_size)
    averaged = AVERAGE in next(iter(partitions[0][0].values())).states
    states = (*_STATES, *([AVERAGE] if averaged else []), "step")
    written: list[CheckpointFile] = []
    pending: list[Future[CheckpointFile]] = []
    last_line = time.monotonic()
    with Writer() as writer:
        for tp_rank in range(tp_size):
            folder = f"tp_{tp_rank}/engine"
            (target / folder / "zero").mkdir(parents=True, exist_ok=True)
            for name, content in _common(metadata, partitions).items() if rank == 0 else ():
                pending.append(writer.write(target, f"{folder}/{name}", content))
        for done, name in enumerate(names):
            kept = next(ranks[name].states for ranks in partitions[0] if name in ranks)
            for key in (key for key in states if key in kept):
                parts = [whole(ranks, name, key) for ranks in partitions]
                dim = None if key == "step" else dims.get(name)
                slices = _slices(parts, dim, tp_size, vocab_size.get(name), multiple)
                for tp_rank, part in enumerate(slices):
                    content = part if key == "step" else {"param": part}
                    pending.append(writer.write(target, f"tp_{tp_rank}/engine/zero/{name}/{key}.pt", content))
            written += [file.result() for file in pending]  # one weight at a time: they may be large
            pending = []
            if time.monotonic() - last_line > _LINE_SECONDS:
                last_line = time.monotonic()
                size = sum(file.size for file in written)
                _logger.info("converting: %d of %d weights, %.3g GB", done + 1, len(names), size / 1e9)
        written += [file.result() for file in pending]
    # The names of files are durable by now, but those of their folders are not.
    for above in (*target.glob("tp_*/engine/zero"), *target.glob("tp_*/engine"), *target.glob("tp_*"), target):
        fsync_folder(above)
    fsync_folder(target.parent)
    return written


def _dealt(sizes: Mapping[str, int], rank: int, world_size: int) -> list[str]:
    """Deal the weights by descending size, each to the rank with the least so far; return one rank's weights."""
    loads, own = [0] * world_size, []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner = loads.index(min(loads))
        loads[owner] += sizes[name]
        if owner == rank:
            own.append(name)
    return own


def _slices(
    parts: Sequence[Tensor], dim: int | None, tp_size: int, size: int | None, multiple: int
) -> Sequence[Tensor]:
    """Recut the former tensor-parallel ranks' slices of a weight for the new ranks.

    Args:
        dim: the dimension along which it is split; None if it is replicated.
        size: what the whole weight has of that dimension without padding; None if there can be no padding.
        multiple: what the new slices are rounded up to a multiple of, where there can be padding.
    """
    if dim is None:
        return [parts[0]] * tp_size
    joined = torch.cat(list(parts), dim)
    cut = (joined, 1) if size is None else (joined.narrow(dim, 0, size), multiple)
    slices = [slice_of(cut[0], dim, rank, tp_size, cut[1]) for rank in range(tp_size)]
    # Clone, since torch.save writes the whole storage behind a view.
    return [part.clone(memory_format=torch.contiguous_format) for part in slices]


def _shard_dims(metadata: Saved) -> dict[str, int]:
    """Return the dimension along which each sharded weight is split; replicated weights are omitted."""
    rows = _named_by(metadata, "parameter_with_row_parallelism_patterns")
    replicated = _named_by(metadata, "tp_replicated_parameter_patterns")
    return {name: int(name in rows) for name in _names(metadata) if name not in replicated}


def _vocab_size(metadata: Saved) -> dict[str, int]:
    """Return the number of tokens for each weight that has a row for each: embedding and output projection."""
    of_tokens = _named_by(metadata, "vocabulary_parameter_patterns")
    return dict.fromkeys(of_tokens, metadata["universal_checkpoint_info"]["original_vocab_size"])


def _names(metadata: Saved) -> list[str]:
    return [name for group in metadata["param_shapes"] for name in group]


def _named_by(metadata: Saved, key: str) -> set[str]:
    """Return the weights that a list of patterns in DeepSpeed's description names."""
    patterns = metadata["universal_checkpoint_info"][key]
    return {name for name in _names(metadata) for pattern in patterns if re.fullmatch(pattern, name)}


def _common(metadata: Saved, partitions: Sequence[Sequence[Partition]]) -> dict[str, object]:
    """Return the files other than weights, under the names that each ZeRO stage looks for."""
    weights = ("module", "optimizer", "param_shapes", "frozen_param_shapes", "frozen_param_fragments")
    model_states = {key: value for key, value in metadata.items() if key not in weights}
    model_states["mp_world_size"] = 1  # each tensor-parallel rank's folder holds only its own slices
    step = next(iter(partitions[0][0].values())).states["step"]
    # One for each group of weights; the config's are used instead. ZeRO-1 and 2 load as many groups as they find here,
    # and a run that begins with another's optimizer may have more groups: at most one for each weight.
    no_hyperparameters: list[dict[str, object]] = [{} for _ in metadata["param_shapes"]]
    optimizer_state = {
        "ds_version": metadata["ds_version"],
        "param_groups": [{} for _ in _names(metadata)],  # read by ZeRO-1 and 2
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": no_hyperparameters},  # read by ZeRO-3
    }
    return {
        "mp_rank_00_model_states.pt": model_states,
        "zero_pp_rank_0_mp_rank_00_model_states.pt": model_states,
        "zero/optimizer_state.pt": optimizer_state,
    }


def read_piece(file: Path, rank: int, world_size: int) -> Tensor:
    """Read one rank's piece of a state without reading the rest of the file; flat, padded with zeros.

    The pieces are cut as in ZeRO-3, which divides every weight separately into equal lengths.
    """
    flat = torch.load(file, map_location="cpu", mmap=True)["param"].view(-1)
    size = ceil(flat.numel() / world_size)
    piece = flat[min(rank * size, flat.numel()) : min((rank + 1) * size, flat.numel())]
    return F.pad(piece, (0, size - piece.numel())) if piece.numel() < size else piece.clone()
