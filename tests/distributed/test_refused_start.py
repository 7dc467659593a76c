"""A refused start leaves the run folder unchanged, byte for byte, and so does what reads it afterwards."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2

from pretrain.commands.export import export_run
from pretrain.commands.generate import find_model
from pretrain.run.run_folder import RunFolder
from pretrain.run.step_log import StepLog
from shards import ConfigError
from shards.storage.content_hash import hash_file
from tests.distributed.ranks import ROOT, run_starts
from tests.tiny_run import write_config

TOKENIZER = ROOT / "shards/sample/tokenizer-4k.model"


def other_tokenizer(path: Path) -> Path:
    """Write a tokenizer with as many pieces, two of which have each other's ids."""
    model = sentencepiece_model_pb2.ModelProto.FromString(TOKENIZER.read_bytes())
    model.pieces[400].piece, model.pieces[401].piece = model.pieces[401].piece, model.pieces[400].piece
    path.write_bytes(model.SerializeToString())
    return path


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hash_file(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.distributed
def test_a_refused_start_changes_nothing(tmp_path: Path) -> None:
    config, folder = write_config(tmp_path, "elastic"), RunFolder(tmp_path / "elastic")
    other, shard = other_tokenizer(tmp_path / "other.model"), tmp_path / "shard.jsonl"
    lines = [json.dumps({"text": f"Document {i} is about the number {i}. " * 20}) + "\n" for i in range(200)]
    shard.write_text("".join(lines))
    base = ["checkpoint.every=4", f"data.sources=[{{name: pile, paths: ['{shard}']}}]"]
    swapped, missing = tmp_path / "swapped.jsonl", "data.sources=[{name: pile, paths: ['nowhere.jsonl']}]"
    swapped.write_text("".join(reversed(lines)))
    snapshot = tmp_path / "snapshot"
    code = "import shutil; shutil.copytree({0!r}, {1!r}, dirs_exist_ok=True)"
    suffixed = [
        [*base, "train.steps=12", f"data.tokenizer={other}"],
        [*base, "train.steps=12", f"data.sources=[{{name: pile, paths: ['{swapped}']}}]"],
        [*base, "train.steps=12", missing],
        [*base, "train.steps=12", missing, "--fresh"],
        [*base, "train.steps=12", "evaluation.suite=nowhere", "--fresh"],
        [*base, "train.steps=12", "data.seq_len=16"],
        [*base, "train.steps=12", "parallel.tp_size=2", f"data.tokenizer={other}"],  # before anything is converted
    ]
    lose = f"import os; os.rename({str(folder.checkpoints)!r}, {str(tmp_path / 'archive')!r})"
    first = (1, [*base, "train.steps=10"], "")
    refused = [
        (1 if "tp_size" not in str(overrides) else 2, overrides, code.format(str(folder.root), f"{snapshot}{i}"))
        for i, overrides in enumerate(suffixed)
    ]
    starts = [first, *refused, (1, [*base, "train.steps=12"], lose), (1, [*base, "train.steps=12"], "")]
    codes, output = run_starts(config, starts)
    assert codes == [[0], *([2] * world for world, _, _ in refused), [2], [2]], output
    for i in range(len(refused)):
        assert content(tmp_path / f"snapshot{i}") == content(tmp_path / "snapshot0"), suffixed[i]
    assert not list(tmp_path.glob("elastic.*")), "nor was it moved aside"
    assert output.count("has records of 10 steps, but") == 2
    assert "steps: 10" in folder.config.read_text()
    assert len(list(folder.metrics.read())) == 10

    shutil.copytree(tmp_path / "archive", folder.checkpoints, dirs_exist_ok=True)
    folder.config.write_text(
        folder.config.read_text().replace(str(Path("shards/sample/tokenizer-4k.model")), str(other))
    )
    asked = argparse.Namespace(
        run=folder.root,
        step=None,
        to=tmp_path / "to",
        overrides=[],
        model=None,
        weights="trained",
        format=None,
    )
    for command in (export_run, find_model):
        with pytest.raises(ConfigError, match=r"other\.model is not the model that .*step_00000010 was trained with"):
            command(asked)
    shutil.rmtree(folder.checkpoints)
    folder.metrics.cut_back(3, folder.superseded / "metrics.jsonl", "lost")  # before the first save
    folder.config.write_text(folder.config.read_text().replace(str(other), "shards/sample/tokenizer-4k.model"))
    codes, output = run_starts(config, [(1, [*base, "train.steps=4"], "")])
    assert codes == [[0]], output
    superseded = StepLog(folder.superseded / "metrics.jsonl").read()
    assert [record["step"] for record in superseded] == [*range(4, 11), 1, 2, 3]
