"""A recurrent model is trained, resumed, converted, evaluated, exported and used as any other."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pretrain.checkpoint.store import Checkpoint
from pretrain.checkpoint.weights import CheckpointWeights
from pretrain.exchange.folder import open_model
from pretrain.model.recurrent import RecurrentConfig
from pretrain.model.weights import weight_specs
from shards import read_documents
from tests.distributed.ranks import run_ranks, run_starts
from tests.tiny_run import write_config

pytestmark = pytest.mark.distributed

MODEL = {"architecture": "recurrent", "dim": 32, "n_layers": 2, "context_dim": 24, "ffn_dim": 48, "vocab_size": 4096}
STEPS = 3  # in each start


def write(folder: Path, model: dict[str, object], **changes: object) -> Path:
    """Write a tiny run's config with this model, and a suite of one document."""
    folder.mkdir(exist_ok=True)
    suite = folder / "suite" / "wiki"
    suite.mkdir(parents=True)
    documents = islice(read_documents("shards/sample/eval/wiki/val.jsonl.zst"), 2)
    text = "".join(json.dumps({"text": document.text[:600]}) + "\n" for document in documents)
    (suite / "val.jsonl").write_text(text)
    path = write_config(folder, "run", evaluation={"suite": str(suite.parent), "every": STEPS}, **changes)
    config = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(config | {"model": model}))
    return path


def train(config: Path, *starts: tuple[int, list[str]]) -> str:
    codes, output = run_starts(config, [(ranks, overrides, "") for ranks, overrides in starts])
    assert codes == [[0] * ranks for ranks, _ in starts], output
    return output


def read(config: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    lines = (config.parent / "run" / name).read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_every_change_of_layout_keeps_losses_and_layers_figures(tmp_path: Path) -> None:
    layouts = [(1, 1), (2, 3), (2, 1), (1, 2)]  # dp_size, ZeRO stage
    changes: dict[str, Any] = {
        "optim": {"name": "muon", "z_loss": 1e-3},
        "train": {"steps": STEPS * len(layouts), "ema": {"half_life_tokens": 2000}},
        "metrics": {"layers_every": 2},
    }
    changed, straight = (write(tmp_path / name, MODEL, **changes) for name in ("changed", "straight"))
    train(straight, (1, []))
    starts = [
        (dp_size, [f"train.steps={STEPS * (i + 1)}", f"parallel.zero_stage={stage}"])
        for i, (dp_size, stage) in enumerate(layouts)
    ]
    train(changed, *starts)
    wanted, found = read(straight), read(changed)
    assert [m["batch_hash"] for m in found] == [m["batch_hash"] for m in wanted]
    for key in ("loss", "grad_norm"):
        assert [m[key] for m in found] == pytest.approx([m[key] for m in wanted], rel=1e-4), key
    for mine, theirs in zip(read(changed, "layers.jsonl"), read(straight, "layers.jsonl"), strict=True):
        assert mine["layers"].keys() >= {"residual_rms", "context_kept", "update_ratio"}
        for key, values in theirs["layers"].items():
            assert mine["layers"][key] == pytest.approx(values, rel=1e-3), key


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the config of a run with dropout and checkpointing that was resumed once."""
    config = write(
        tmp_path_factory.mktemp("resumed"),
        MODEL | {"dropout": 0.1, "vocab_multiple": 64},
        parallel={"activation_checkpointing": "full"},
        train={"steps": 2 * STEPS},
        checkpoint={"every": STEPS, "keep": 9},
    )
    train(config, (1, [f"train.steps={STEPS}"]), (1, []))
    return config


def test_a_resumed_run_has_the_bits_of_one_that_was_not(resumed: Path, tmp_path: Path) -> None:
    straight = write(tmp_path, MODEL | {"dropout": 0.1, "vocab_multiple": 64})
    settings = yaml.safe_load(resumed.read_text()) | {"run": {"name": "run", "dir": str(tmp_path), "seed": 7}}
    straight.write_text(yaml.safe_dump(settings))
    train(straight, (1, ["parallel.activation_checkpointing=none"]))
    figures = ("loss", "grad_norm", "batch_hash", "weight_hash", "optimizer_hash")
    assert [[m.get(key) for key in figures] for m in read(resumed)] == [
        [m.get(key) for key in figures] for m in read(straight)
    ]
    assert read(resumed)[-1]["weight_hash"]


def test_an_exported_model_is_generated_from_scored_and_trained_on_as_the_run_is(resumed: Path, tmp_path: Path) -> None:
    run, model = resumed.parent / "run", tmp_path / "model"
    said = run_ranks(1, "pretrain", "export", "--run", str(run), "--to", str(model), "--dtype", "fp32")
    assert "headrace layout" in said
    described = json.loads((model / "config.json").read_text())
    assert described["model"]["architecture"] == "recurrent"
    assert (model / "tokenizer.json").exists()

    config = RecurrentConfig.model_validate(MODEL)
    stored = Checkpoint(run / "checkpoints" / f"step_{2 * STEPS:08d}", 2 * STEPS, [], 0.0)
    weights = CheckpointWeights(stored, weight_specs(config.model_copy(update={"vocab_multiple": 64})))
    found = open_model(model, config)
    for name in weight_specs(config):
        assert torch.equal(found.read(name), weights.read(name)), name

    how = ("--prompt", "The ", "--temperature", "0", "--max-tokens", "12", "--precision", "fp32")
    subjects = (("--run", str(run)), ("--model", str(model)))
    texts = [run_ranks(1, "pretrain", "generate", *subject, *how) for subject in subjects]
    assert texts[0].splitlines()[-1] == texts[1].splitlines()[-1] != ""

    suite = str(resumed.parent / "suite")
    scoring = ("--suite", suite, "--seq-len", "64", "--precision", "fp32")
    run_ranks(1, "pretrain", "evaluate", "--model", str(model), *scoring)
    (scored,) = [json.loads(line) for line in (model / "evals.jsonl").read_text().splitlines() if "micro" in line]
    (known,) = [e for e in read(resumed, "evals.jsonl") if e["domain"] == "micro" and e["step"] == 2 * STEPS]
    assert scored["nll_per_token"] == pytest.approx(known["nll_per_token"], rel=1e-6)

    begun = write(tmp_path / "begun", MODEL, init_from=str(model))
    train(begun, (1, ["train.steps=1"]))
    first = [e for e in read(begun, "evals.jsonl") if e["domain"] == "micro" and e["step"] == 0]
    assert first[0]["nll_per_token"] == pytest.approx(known["nll_per_token"], rel=1e-6)
