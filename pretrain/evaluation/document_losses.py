"""The loss of each document of a batch, the worst first. {forward_model, Batch} -> document_losses -> provenance."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch

from pretrain.evaluation.scoring import Score
from pretrain.model.loss import next_token_targets
from pretrain.topology import copy_to
from shards import Batch


class DocumentLoss(NamedTuple):
    """What a model thinks of the tokens of one document in a batch."""

    loss: float  # mean negative log-likelihood of its targets, in nats
    targets: int  # tokens of it that the batch has as targets, over all rows
    source: str
    shard: str  # path
    line: int  # counted from 1


def document_losses(score: Score, batch: Batch, batch_size: int, device: torch.device) -> list[DocumentLoss]:
    """Score every document of a global batch; those without targets, such as forgotten ones, are left out.

    Args:
        score: scores targets with the model's weights.
        batch_size: rows to score at once.
    Returns:
        The documents by falling loss.
    """
    sums: dict[tuple[str, str, int], list[float]] = {}
    numbers = batch.pieces
    pieces = {
        slot: [(origin.source, origin.shard, origin.line) for origin in origins]
        for slot, origins in itertools.groupby(batch.origins(), key=lambda origin: origin.slot)
    }
    for first in range(0, len(batch.tokens), batch_size):
        tokens = torch.from_numpy(batch.tokens[first : first + batch_size]).long()
        segment_ids = torch.from_numpy(batch.segment_ids[first : first + batch_size]).long()
        ids = copy_to(device, tokens)
        targets = next_token_targets(ids, segment_ids)
        nll = score(ids[:, :-1], segment_ids[:, :-1], targets).nll.double().cpu().numpy()
        rows, columns = np.divmod(targets.positions.cpu().numpy(), segment_ids.shape[1] - 1)
        for row, piece, value in zip(rows, numbers[first + rows, columns], nll, strict=True):
            of_document = sums.setdefault(pieces[first + int(row)][int(piece) - 1], [0.0, 0])
            of_document[0] += float(value)
            of_document[1] += 1
    found = [DocumentLoss(total / count, int(count), *document) for document, (total, count) in sums.items()]
    return sorted(found, key=lambda document: (-document.loss, document.shard, document.line))
