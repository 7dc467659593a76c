"""The text indexes of all shards of a run, made in several processes. text_index, processes -> passes.

A shard's file is written when it is complete, so a pass that was killed goes on with the next shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from shards.config import DataConfig
from shards.errors import HeadraceError, ShardError
from shards.exposure.text_index import Made, obtain, places_for
from shards.index.manifest import Shard
from shards.processes import in_processes


def make_all(data: DataConfig, shards: Sequence[Sequence[Shard]], workers: int) -> Iterator[tuple[Shard, Made]]:
    """Make the missing text indexes of all shards; yield each shard with what it took, as they are ready.

    Args:
        shards: those of each source, in the config's order; equal contents under equal keys are read once.
        workers: number of processes.
    Raises: ShardError naming every shard that failed, once all others are done; HeadraceError if a process dies.
    """
    tasks: dict[str, tuple[int, Shard]] = {}
    for number, (source, listed) in enumerate(zip(data.sources, shards, strict=True)):
        for shard in listed:
            tasks.setdefault(str(places_for(data, source, shard)[0]), (number, shard))
    failed = []
    for (_, shard), made in in_processes(partial(_make, data), list(tasks.values()), workers):
        if isinstance(made, HeadraceError):
            failed.append(str(made))
        else:
            yield shard, made
    if failed:
        raise ShardError("\n".join(failed))


def _make(data: DataConfig, task: tuple[int, Shard]) -> Made:
    number, shard = task
    return obtain(data, data.sources[number], shard)
