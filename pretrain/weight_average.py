"""Keep a moving average of the fp32 weights on ZeRO's partitions. zero_pieces -> weight_average -> engine.

It lies in the optimizer's state, beside the moments, so that DeepSpeed saves and loads it with them, and conversions to
other layouts read it like them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.checkpoint.zero_files import AVERAGE
from pretrain.topology import Topology
from pretrain.zero_pieces import flat_partitions, own_pieces, set_whole


class WeightAverage:
    """The moving average of an engine's weights. Every rank calls its methods.

    Args:
        optimizer: DeepSpeed's.
    """

    def __init__(self, model: nn.Module, optimizer: Any, topology: Topology) -> None:
        self._model, self._optimizer, self._topology = model, optimizer, topology

    def _partitions(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yield this rank's flat partitions of the fp32 weights, each with its state."""
        for flat in flat_partitions(self._optimizer):
            yield flat.detach(), self._optimizer.optimizer.state[flat]

    @torch.no_grad()
    def update(self, share: float) -> None:
        """Move the average to the weights by a share; the first time, and only then, it is 1."""
        for flat, state in self._partitions():
            if share == 1:
                state[AVERAGE] = flat.clone()
            else:
                state[AVERAGE].lerp_(flat, share)

    def drop(self) -> None:
        """Forget the average, if there is one."""
        for _, state in self._partitions():
            state.pop(AVERAGE, None)

    @torch.no_grad()
    def show(self, average: bool) -> None:
        """Let the forward pass use the average, or the weights again, to the last bit."""
        for _, parameter, piece in own_pieces(self._model, self._optimizer, self._topology.zero_rank):
            values = piece.state(AVERAGE) if average else piece.weights
            whole = torch.zeros(getattr(parameter, "ds_numel", parameter.numel()), device=self._topology.device)
            whole[piece.start :][: len(values)] = values
            set_whole(parameter, self._topology.sum_over_zero(whole))  # the other ranks' pieces are zero here

    def load_universal(self, folder: Path) -> None:
        """Load the average from a conversion, of which DeepSpeed's ZeRO-3 reads only the moments.

        Args:
            folder: this tensor-parallel rank's.
        """
        for name, _, piece in own_pieces(self._model, self._optimizer, self._topology.zero_rank):
            file = folder / "engine/zero" / name / f"{AVERAGE}.pt"
            if not file.exists():
                self.drop()  # that of an engine which goes back
                return
            for flat, state in self._partitions():
                state.setdefault(AVERAGE, torch.zeros_like(flat))
            own, saved = piece.state(AVERAGE), torch.load(file, map_location="cpu", mmap=True)["param"].view(-1)
            own.copy_(saved[piece.start :][: len(own)])
