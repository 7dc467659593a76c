"""When a run was trained on some documents. run folder, shards.history -> exposure -> commands.exposure.

Computed from the plan and the states that the run has recorded; see `shards.history`. Nothing is trained again.
"""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pretrain.checkpoint.state import read_data
from pretrain.checkpoint.store import CheckpointConfig, CheckpointStore
from pretrain.provenance import batch_of_step, newest_fingerprint
from pretrain.run.run_folder import Ancestor, RunFolder
from pretrain.run.step_log import step_of
from shards import CheckpointError, ConfigError, Loader, LoaderState, Stage, check_fingerprint
from shards.exposure.search import DocumentPlace
from shards.history import Anchor, Appearance, Historian, History

FORGOTTEN = "forgotten"  # data.forget names the document
_UNTRAINED = {  # keys of metrics.jsonl that say that a step has changed nothing
    "passed_over": "passed over",  # by data.skip_steps
    "nonfinite": "not finite",  # loss or gradient
    "without_targets": "without targets",
}


class Trained(NamedTuple):
    """The steps of a run, as metrics.jsonl tells of them."""

    steps: int  # done so far
    untrained: dict[int, str]  # the steps that have changed nothing, and why
    tokens: list[int]  # [steps + 1], trained on up to each step
    step_seconds: float  # median over all steps

    def reason(self, found: Appearance) -> str:
        """Say why nothing was learned from a piece in a row; empty if it was."""
        return FORGOTTEN if found.forgotten else self.untrained.get(found.step, "")


def read_trained(folder: RunFolder) -> Trained:
    """Read how far a run has trained. Raises: ConfigError if it has not trained a step."""
    untrained: dict[int, str] = {}
    tokens, seconds = [0], []
    for record in folder.metrics.read():
        step = step_of(record)
        if why := next((reason for key, reason in _UNTRAINED.items() if record.get(key)), None):
            untrained[step] = why
        tokens.append(int(str(record["tokens"])))
        seconds.append(float(str(record["step_seconds"])))
        if step != len(tokens) - 1:
            raise CheckpointError(f"{folder.metrics.path}: step {len(tokens) - 1} is missing")
    if not seconds:
        raise ConfigError(f"--run {folder.root}: the run has not trained a step yet")
    return Trained(len(seconds), untrained, tokens, statistics.median(seconds))


def open_loader(folder: RunFolder, stages: Sequence[Stage], seed: int, steps: int) -> Loader:
    """Open a loader of a run's data, which makes windows in this process, and check that the data is the run's.

    Args:
        steps: that the run has trained; stages that begin later may differ.
    Raises: ConfigError or ShardError if the data has changed.
    """
    (_, data, rows), *later = stages
    data = data.model_copy(update={"num_workers": 0, "max_bad_records": None})
    loader = Loader(data, rows, seed, stages=later)
    if (saved := newest_fingerprint(folder)) is not None:
        check_fingerprint(saved[1], loader.fingerprint, min(saved[0], steps))
    return loader


def find(folder: RunFolder, loader: Loader, documents: Sequence[DocumentPlace], steps: int) -> History:
    """Find the rows in which a run has had some documents.

    Args:
        documents: different ones.
        steps: that it has trained.
    Raises: CheckpointError if what is drawn again is not what the run recorded; ShardError if a shard changed.
    """
    anchors = heapq.merge(_logged(folder), _saved(folder), key=lambda anchor: anchor.step)
    historian = Historian(loader.plan, loader.pool, documents)
    return historian.find((anchor for anchor in anchors if anchor.step <= steps), steps)


def _logged(folder: RunFolder) -> Iterator[Anchor]:
    """Read the states of cursors.jsonl.zst."""
    for record in folder.cursors.read():
        step = int(str(record.pop("step")))
        yield Anchor(step, LoaderState.from_dict(record))


def _saved(folder: RunFolder) -> Iterator[Anchor]:
    """Read the states of the checkpoints."""
    store = checkpoints_of(folder)
    for step in store.steps():
        yield Anchor(step, LoaderState.from_dict(read_data(store.open(step)).cursors))


def checkpoints_of(folder: RunFolder) -> CheckpointStore:
    """Open the checkpoints of a run, to read them."""
    return CheckpointStore(folder.checkpoints, CheckpointConfig())


def prove(
    folder: RunFolder, loader: Loader, history: History, documents: Sequence[DocumentPlace], stages: Sequence[Stage],
    seed: int,
) -> int | None:  # fmt: skip
    """Make the first step again in which a document was found, check its hash, and compare what it holds.

    Returns: the step; None if no document was in any.
    Raises: CheckpointError if the batch is not the one that was trained on, or holds the documents elsewhere.
    """
    if not history.appearances:
        return None
    step = history.appearances[0].step
    batch = batch_of_step(folder, step, stages, seed)
    sources = stages[-1].data.sources
    names = {
        (sources[place.source].name, loader.plan.shards[place.source][place.shard].path, place.line): number
        for number, place in enumerate(documents)
    }
    held = [
        (number, origin.slot, origin.start, origin.stop)
        for origin in batch.origins()
        if (number := names.get((origin.source, origin.shard, origin.line))) is not None
    ]
    said = [(one.document, one.slot, one.start, one.stop) for one in history.appearances if one.step == step]
    if sorted(held) != sorted(said):
        raise CheckpointError(
            f"step {step}: its batch, made again, holds {sorted(held)} and not {sorted(said)}, as was found from the "
            "plan; this is an error of the program, please report it"
        )
    return step


def runs_of(ancestors: Sequence[Ancestor], name: str, steps: Sequence[int]) -> dict[str, int]:
    """Count how many of some steps each run has trained: the ancestors up to where they were forked, then the run."""
    counts: dict[str, int] = {}
    for step in steps:
        run = next((one.name for one in ancestors if step <= one.step), name)
        counts[run] = counts.get(run, 0) + 1
    return counts
