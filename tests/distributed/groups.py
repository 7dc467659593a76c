"""Check on every rank that the groups are those that fairscale would form, and no others.

Usage: python -m tests.distributed.groups TP_SIZE
"""

from __future__ import annotations

import contextlib
import io
import sys

import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fairscale_groups
from torch.distributed import distributed_c10d

from pretrain.topology import ParallelConfig, started


def ranks_of_groups() -> list[list[int]]:
    """Return the ranks of this rank's tensor-parallel and data-parallel groups."""
    groups = (fairscale_groups.get_model_parallel_group(), fairscale_groups.get_data_parallel_group())
    return [dist.get_process_group_ranks(group) for group in groups]


def main() -> None:
    tp_size, made = int(sys.argv[1]), []
    new_group = distributed_c10d._new_group_with_tag

    def counted(*arguments, **options):
        made.append(arguments)
        return new_group(*arguments, **options)

    distributed_c10d._new_group_with_tag = counted
    with started(ParallelConfig(tp_size=tp_size)) as here:
        found, groups = ranks_of_groups(), len(distributed_c10d._world.pg_map)
        assert groups <= 3, "the world's group and two more"
        # gloo forms every rank's groups in turn; a group that spans the whole world is the world's.
        assert len(made) == sum(size for size in (here.dp_size, here.tp_size) if size > 1)
        assert (here.tp_rank, here.dp_rank) == tuple(ranks.index(here.rank) for ranks in found)
        assert dist.get_process_group_ranks(here.tp_group) == found[0]
        assert dist.get_process_group_ranks(here.zero_group) == found[1]
        fairscale_groups.destroy_model_parallel()
        with contextlib.redirect_stdout(io.StringIO()):
            fairscale_groups.initialize_model_parallel(tp_size)
        assert ranks_of_groups() == found


if __name__ == "__main__":
    main()
