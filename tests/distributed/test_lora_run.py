"""A run with adapters resumes, is evaluated, generates, is audited and exported with the model that it began from."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pretrain.commands import average, export
from pretrain.config import load_config
from pretrain.exchange.base import model_hash
from pretrain.exchange.folder import open_model
from pretrain.run.run_folder import RunFolder
from shards import ConfigError
from tests.distributed.evaluation import write_suite
from tests.distributed.ranks import run_ranks, run_starts
from tests.distributed.test_average import written
from tests.pretrain.exchange.test_exchange import tokens_of
from tests.tiny_run import write_config

SAMPLE = Path("shards/sample/tokenizer-4k.model")
STEPS = 4
LORA = {"r": 2, "alpha": 8, "dropout": 0.2, "targets": ["wq", "wo", "w1", "w2"]}

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model as transformers does, with the sample's tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "model"
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        vocab_size=4096, rms_norm_eps=1e-5, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    shutil.copy(SAMPLE, folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Train in one start."""
    return trained(tmp_path_factory.mktemp("whole"), base)


@pytest.fixture(scope="module")
def run(whole: RunFolder, base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Train the second half again, from a checkpoint of the first."""
    folder = tmp_path_factory.mktemp("resumed")
    shutil.copytree(whole.root, folder / "run")
    shutil.rmtree(folder / "run" / "checkpoints" / f"step_{STEPS:08d}")
    return trained(folder, base)


def config_of(folder: Path, base: Path) -> Path:
    return write_config(
        folder, "run", model={"lora": LORA}, init_from=str(base),
        train={"steps": STEPS, "weight_hash_every": 1, "ema": {"half_life_steps": 1}},
        checkpoint={"every": STEPS // 2, "keep": 9},
        evaluation={"suite": str(write_suite(folder / "suite")), "every": STEPS},
    )  # fmt: skip


def trained(folder: Path, base: Path) -> RunFolder:
    codes, output = run_starts(config_of(folder, base), [(1, [], "")])
    assert codes == [[0]], output
    return RunFolder(folder / "run")


def records(path: Path, *keys: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: line.get(key) for key in keys} for line in lines]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lease"}


FIGURES = ("step", "loss", "grad_norm", "batch_hash", "weight_hash", "optimizer_hash")
SCORES = ("step", "domain", "nll_per_token", "tokens")


def test_a_resume_is_exact_and_an_audit_agrees(run: RunFolder, whole: RunFolder) -> None:
    assert [line["step"] for line in records(run.superseded / "metrics.jsonl", "step")] == [3, 4], "trained again"
    assert records(run.metrics.path, *FIGURES) == records(whole.metrics.path, *FIGURES)
    said = run_ranks(1, "pretrain", "audit", "--run", str(run.root), "--from-step", str(STEPS // 2), "--steps", "2")
    assert f"The run agrees bit for bit in steps {STEPS // 2 + 1} to {STEPS}" in " ".join(said.split())


def test_a_checkpoint_holds_the_adapters_alone(run: RunFolder, base: Path) -> None:
    config = load_config(run.config, begun=True)
    saved = sum(path.stat().st_size for path in run.checkpoints.glob(f"step_{STEPS:08d}/engine/*"))
    # Weights, masters, two moments and their average, and what names and types take
    assert config.checkpoint_bytes == 4 * 5 * 2 * 2 * (2 * (32 + 32) + 2 * (32 + 64))
    assert config.checkpoint_bytes < saved < config.checkpoint_bytes + 40_000
    assert saved < (base / "model.safetensors").stat().st_size / 4


def test_evaluations_in_the_loop_and_afterwards_agree(run: RunFolder, tmp_path: Path) -> None:
    copy = RunFolder(tmp_path / "run")
    shutil.copytree(run.root, copy.root)
    in_loop = [line for line in records(run.evals.path, *SCORES) if line["step"] == STEPS]
    copy.evals.path.unlink()
    run_ranks(2, "pretrain", "evaluate", "--run", str(copy.root), "--tp", "2")
    afterwards = records(copy.evals.path, *SCORES)
    assert {line["domain"] for line in afterwards} == {"long", "short", "macro", "micro"}
    for line in afterwards:
        wanted = next(one for one in in_loop if one["domain"] == line["domain"])  # its average comes later
        assert line["nll_per_token"] == pytest.approx(wanted["nll_per_token"], rel=1e-5)


def test_exports_and_continuations_are_of_the_model_with_its_adapters(
    run: RunFolder, base: Path, tmp_path: Path
) -> None:
    def exported(name: str, *words: str, command: object = export) -> Path:
        written(command, "--run", run.root, "--to", tmp_path / name, "--dtype", "fp32", *words)
        return tmp_path / name

    merged, adapters = exported("merged"), exported("adapters", "--format", "peft")
    with pytest.raises(ConfigError, match="--to .* exists already"):
        exported("adapters", "--format", "peft")
    exported("mean", "--steps", str(STEPS // 2), str(STEPS), command=average)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters).eval()
    assert {path.name for path in adapters.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    ours, plain = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (merged, base))
    with torch.no_grad():
        wanted, found, before = (model(tokens_of()).logits for model in (theirs, ours, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, before, rtol=1e-2, atol=1e-2)
    arguments = ("--prompt", "Once", "--max-tokens", "6", "--temperature", "0")
    said = [
        run_ranks(1, "pretrain", "generate", *source, *arguments).splitlines()[-1]
        for source in (("--run", str(run.root)), ("--model", str(merged)))
    ]
    assert said[0] == said[1] != ""


def test_a_run_with_adapters_grows_as_the_merged_model(run: RunFolder, tmp_path: Path) -> None:
    deeper = ("--config", str(run.config), "--to", str(tmp_path / "grown"), "model.n_layers=3")
    said = " ".join(run_ranks(1, "pretrain", "grow", "--run", str(run.root), *deeper).split())
    before, after = re.search(r"loss on random tokens ([\d.]+) nats before, ([\d.]+) after", said).groups()  # type: ignore[union-attr]
    assert float(after) == pytest.approx(float(before), abs=2e-6)


def test_another_base_is_refused_with_both_hashes_and_a_moved_one_is_not(
    run: RunFolder, base: Path, tmp_path: Path
) -> None:
    shutil.copytree(run.root, tmp_path / "run")
    moved = shutil.copytree(base, tmp_path / "moved")
    config = tmp_path / "config.yaml"
    config.write_text(run.config.read_text())
    more = [f"run.dir={tmp_path}", f"init_from={moved}", f"train.steps={STEPS + 1}", "parallel.zero_stage=3"]
    codes, output = run_starts(config, [(2, [*more, "parallel.tp_size=2"], "")])
    assert codes == [[0, 0]], output
    before = contents(tmp_path / "run")
    (moved / "config.json").write_text((moved / "config.json").read_text() + "\n")
    codes, output = run_starts(config, [(1, [*more[:2], f"train.steps={STEPS + 2}"], "")])
    assert codes == [[2]], output
    trained_on = json.loads((run.checkpoints / f"step_{STEPS:08d}" / "state.json").read_text())["init_hash"]
    found = model_hash(open_model(moved))
    assert f"the hash of its files is {found}, not {trained_on}" in " ".join(output.split())
    assert contents(tmp_path / "run") == before
