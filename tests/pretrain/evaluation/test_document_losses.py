"""The loss of a document is the mean over its targets, wherever its pieces lie in a batch."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pretrain.evaluation.document_losses import document_losses
from pretrain.model.loss import Scores, Targets
from shards import Loader
from tests.shards.corpora import config, words, write_shard


def test_prompts_are_no_part_of_a_documents_loss(tmp_path: Path) -> None:
    tasks = [{"task": words(i, 9), "done": words(i + 7, 5 + i)} for i in range(30)]
    write_shard(tmp_path / "a.jsonl", "".join(json.dumps(task) + "\n" for task in tasks).encode())
    source = {"name": "a", "paths": [f"{tmp_path}/a.jsonl"], "template": "{task} = {done}", "max_epochs": 1}
    with Loader(config([source], lanes=1), 5) as loader:
        batches = list(loader)

    def score(tokens: Tensor, segment_ids: Tensor, targets: Targets) -> Scores:
        """Score a target with its own id."""
        return Scores(targets.tokens.float(), targets.tokens < 0)

    for batch in batches:
        expected: dict[int, list[int]] = defaultdict(list)
        pieces: dict[int, int] = defaultdict(int)
        for origin in batch.origins():
            pieces[origin.slot] += 1
            inside = abs(batch.segment_ids[origin.slot]) == pieces[origin.slot]
            learned = batch.segment_ids[origin.slot][inside] > 0
            expected[origin.line] += batch.tokens[origin.slot][inside][1:][learned[1:]].tolist()
        found = {one.line: one for one in document_losses(score, batch, 2, torch.device("cpu"))}
        assert found.keys() == {line for line, ids in expected.items() if ids}
        for line, one in found.items():
            assert one.targets == len(expected[line])
            assert one.loss == pytest.approx(sum(expected[line]) / len(expected[line]))
