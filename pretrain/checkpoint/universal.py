"""A checkpoint made readable for other numbers of ranks or another ZeRO stage. store -> universal -> engine.

DeepSpeed's files hold flat pieces of each rank's share. Here weights and moments are put together again and written in
DeepSpeed's universal layout, a file for each of them, of which a rank takes its part, whatever the dp_size and stage:

    step_00001000.universal-tp2/
        tp_0/engine/zero/<weight>/{fp32,exp_avg,exp_avg_sq,step}.pt    as tensor-parallel rank 0 of 2 holds them
        tp_1/...
        COMPLETE                                                       written last, as in a checkpoint

DeepSpeed's own converter writes everything twice, and what it makes of ZeRO-3 fits no other tp_size and no other stage.
Since this one cuts the weights for the new tp_size already, DeepSpeed has only to divide them over dp ranks.

Rank 0 does it alone, before the process groups exist: a collective would not wait that long.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import torch
from torch import Tensor

from pretrain.checkpoint.shares import Saved, Share, read_shares, whole
from pretrain.checkpoint.state import Layout, read_state
from pretrain.checkpoint.store import Checkpoint, CheckpointStore, FileEntry, read_manifest, write_manifest
from pretrain.checkpoint.write import Writer
from shards import CheckpointError
from shards.durable import fsync_folder

_logger = logging.getLogger(__name__)

_LINE_SECONDS = 10.0  # between two lines about how far it is
_STATES = ("fp32", "exp_avg", "exp_avg_sq")  # of AdamW: the master weight and its two moments


def make_ready(store: CheckpointStore, layout: Layout) -> None:
    """Converts the newest whole checkpoint, unless this layout can read it as it is; rank 0 alone, at a start.

    Raises:
        ConfigError: if the disk has not the room, with sizes.
        CheckpointError: if it cannot be converted.
    """
    for step in reversed(store.steps()):
        try:
            checkpoint = store.open(step)
            saved = read_state(checkpoint).layout
        except (CheckpointError, OSError):
            continue  # damaged: the resume says so, and takes one before it
        if saved == layout or is_whole(store, step, layout.tp_size):
            return
        if checkpoint.broken_files():
            continue
        _logger.info("the checkpoint of step %d was saved by %s; converting it for %s", step, saved, layout)
        _make(store, checkpoint, layout.tp_size)
        return


def is_whole(store: CheckpointStore, step: int, tp_size: int) -> bool:
    """Whether a checkpoint's conversion is there, to the last bit."""
    try:
        return not read_manifest(store.universal_folder(step, tp_size), step).broken_files()
    except CheckpointError:
        return False


def _make(store: CheckpointStore, checkpoint: Checkpoint, tp_size: int) -> None:
    store.discard_universal()
    store.check_room_for_universal(sum(entry.size for entry in checkpoint.files))
    target = store.universal_folder(checkpoint.step, tp_size)
    target.mkdir()
    begun = time.monotonic()
    entries = convert(checkpoint.folder, target, tp_size)
    seconds = time.monotonic() - begun
    write_manifest(target, entries, seconds)
    size = sum(entry.size for entry in entries)
    _logger.info("converted %d files, %.3g GB, in %.1f s: %s", len(entries), size / 1e9, seconds, target)


def convert(source: Path, target: Path, tp_size: int) -> list[FileEntry]:
    """Writes what `source`/engine holds, for `tp_size` tensor-parallel ranks, into the empty folder `target`.

    Returns:
        What was written; all of it is durable.
    Raises:
        CheckpointError: if the source's files are not all there, or a file cannot be written.
    """
    shares, metadata = read_shares(source / "engine")
    dims = _shard_dims(metadata)
    names = sorted({name for share in shares[0] for name in share})  # a small weight may lie on one dp rank alone
    written: list[FileEntry] = []
    pending: list[Future[FileEntry]] = []
    last_line = time.monotonic()
    with Writer() as writer:
        for rank in range(tp_size):
            folder = f"tp_{rank}/engine"
            (target / folder / "zero").mkdir(parents=True)
            for name, content in _common(metadata, shares).items():
                pending.append(writer.write(target, f"{folder}/{name}", content))
        for done, name in enumerate(names):
            for key in (*_STATES, "step"):
                slices = _slices([whole(ranks, name, key) for ranks in shares], dims.get(name), tp_size, key)
                for rank, part in enumerate(slices):
                    content = {"param": part} if key in _STATES else part
                    pending.append(writer.write(target, f"tp_{rank}/engine/zero/{name}/{key}.pt", content))
            written += [file.result() for file in pending]  # one weight at a time: they may be large
            pending = []
            if time.monotonic() - last_line > _LINE_SECONDS:
                last_line = time.monotonic()
                size = sum(entry.size for entry in written)
                _logger.info("converting: %d of %d weights, %.3g GB", done + 1, len(names), size / 1e9)
    # The names of files are durable; these are those of their folders
    for above in (*target.glob("tp_*/engine/zero"), *target.glob("tp_*/engine"), *target.glob("tp_*"), target):
        fsync_folder(above)
    fsync_folder(target.parent)
    return written


def _slices(parts: Sequence[Tensor], dim: int | None, tp_size: int, key: str) -> Sequence[Tensor]:
    """The parts of the tensor-parallel ranks that were -> those of the ranks that will be."""
    if dim is None or key == "step":
        return [parts[0]] * tp_size
    return [part.contiguous() for part in torch.cat(list(parts), dim).chunk(tp_size, dim)]


def _shard_dims(metadata: Saved) -> dict[str, int]:
    """The dimension that each sharded weight is split along; replicated ones are not in it."""
    info = metadata["universal_checkpoint_info"]
    names = [name for group in metadata["param_shapes"] for name in group]

    def named_by(key: str) -> set[str]:
        return {name for name in names for pattern in info[key] if re.fullmatch(pattern, name)}

    rows = named_by("parameter_with_row_parallelism_patterns")
    return {name: int(name in rows) for name in names if name not in named_by("tp_replicated_parameter_patterns")}


def _common(metadata: Saved, shares: Sequence[Sequence[Share]]) -> dict[str, object]:
    """The files besides the weights, under the names that every stage looks for."""
    weights = ("module", "optimizer", "param_shapes", "frozen_param_shapes", "frozen_param_fragments")
    model_states = {key: value for key, value in metadata.items() if key not in weights}
    model_states["mp_world_size"] = 1  # each tensor-parallel rank has a folder, and in it nobody else's slices
    step = next(iter(shares[0][0].values())).states["step"]
    no_hyperparameters: list[dict[str, object]] = [{}, {}]  # those of the config apply
    optimizer_state = {
        "ds_version": metadata["ds_version"],
        "param_groups": no_hyperparameters,  # where ZeRO-1 and 2 look
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": no_hyperparameters},  # where ZeRO-3 does
    }
    return {
        "mp_rank_00_model_states.pt": model_states,
        "zero_pp_rank_0_mp_rank_00_model_states.pt": model_states,
        "zero/optimizer_state.pt": optimizer_state,
    }
