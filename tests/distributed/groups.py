"""Check on every rank that the groups are those that fairscale would form, that of split rows, and no others.

Usage: python -m tests.distributed.groups TP_SIZE SP_SIZE
"""

from __future__ import annotations

import contextlib
import io
import sys

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fairscale_groups
from torch.distributed import distributed_c10d

from pretrain.parallel_config import ParallelConfig
from pretrain.topology import sequence_group, started


def ranks_of_groups() -> list[list[int]]:
    """Return the ranks of this rank's tensor-parallel and data-parallel groups."""
    groups = (fairscale_groups.get_model_parallel_group(), fairscale_groups.get_data_parallel_group())
    return [dist.get_process_group_ranks(group) for group in groups]


def main() -> None:
    tp_size, sp_size, made = int(sys.argv[1]), int(sys.argv[2]), []
    new_group = distributed_c10d._new_group_with_tag

    def counted(*arguments, **options):
        made.append(arguments)
        return new_group(*arguments, **options)

    distributed_c10d._new_group_with_tag = counted
    with started(ParallelConfig(tp_size=tp_size, sp_size=sp_size)) as here:
        found, groups = ranks_of_groups(), len(distributed_c10d._world.pg_map)
        # gloo forms every rank's groups in turn; a group that spans the whole world is the world's.
        if sp_size == 1:
            assert groups <= 3, "the world's group and two more"
            assert len(made) == sum(size for size in (here.dp_size, here.tp_size) if size > 1)
            assert sequence_group() is None
        else:
            assert groups <= 5, "also the group of split rows, and one that the mesh makes on the way"
            first = here.rank - here.sp_rank * tp_size
            assert dist.get_process_group_ranks(sequence_group()) == [first + i * tp_size for i in range(sp_size)]
            assert here.rank == (here.dp_rank * sp_size + here.sp_rank) * tp_size + here.tp_rank
            rows = here.share_rows(torch.tensor([here.rank]))
            assert rows.item() == here.dp_rank * sp_size * tp_size, "the first rank of those that share rows"
        assert (here.tp_rank, here.zero_rank) == tuple(ranks.index(here.rank) for ranks in found)
        assert dist.get_process_group_ranks(here.tp_group) == found[0]
        assert dist.get_process_group_ranks(here.zero_group) == found[1]
        fairscale_groups.destroy_model_parallel()
        with contextlib.redirect_stdout(io.StringIO()):
            fairscale_groups.initialize_model_parallel(tp_size)
        assert ranks_of_groups() == found


if __name__ == "__main__":
    main()
