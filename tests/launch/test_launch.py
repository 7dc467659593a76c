"""Bad input to a command gives exit code 2 and a message that names the key or file and what would be right."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest

from pretrain.checkpoint.store import CheckpointStore
from pretrain.commands import dispatch
from pretrain.config import load_config
from pretrain.run.run_folder import RunFolder
from pretrain.start import IndexingLog, check_checkpoints_there, check_inputs, claim_run
from shards import ConfigError, Tokenizer
from tests.vocabularies import foreign_pieces

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "quickstart.yaml"


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """Return a function that runs the command with overrides on the quickstart: its exit code and its output."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("pretrain.log.set_up", lambda *arguments: None)  # caplog captures the log instead

    def run(*arguments: str) -> tuple[int, str]:
        caplog.clear()
        words = ["--config", str(CONFIG), f"run.dir={tmp_path}/runs", *arguments]
        # A start puts its rank's variables into the environment.
        with caplog.at_level(logging.INFO), mock.patch.dict(os.environ):
            return dispatch.run("train", words), caplog.text

    return run


@pytest.fixture
def truncated_shard(tmp_path: Path) -> Path:
    whole = (ROOT / "shards/sample/train/pile-00.jsonl.zst").read_bytes()
    path = tmp_path / "cut.jsonl.zst"
    path.write_bytes(whole[: len(whole) // 2])
    return path


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.learning_rat=1e-3"], "optim.learning_rat: unknown key; did you mean optim.learning_rate?"),
        (["model.dim=wide"], "model.dim"),
        (["model.n_heads=6"], "model.n_heads=6"),
        (["parallel.tp_size=3"], "parallel.tp_size=3"),
        (["parallel.sequence_parallel=true"], "it needs tp_size > 1"),
        (["deepspeed.gradient_clipping=5.0"], "deepspeed.gradient_clipping=5.0 contradicts 1.0"),
        (["model.vocab_size=32000"], "set model.vocab_size=4096"),
        (["data.tokenizer=nowhere.model"], "nowhere.model"),
        (["data.sources.0.paths=[nowhere/*.zst]"], "nowhere/*.zst"),
        (
            ["data.seq_len=131072", "parallel.attention=sdpa"],
            "data.seq_len=131072: parallel.attention=sdpa needs a whole",
        ),
        (["evaluation.suite=nowhere"], "evaluation.suite=nowhere is not a folder"),
        (["run.dir=README.md"], "set run.dir to a writable folder"),
    ],
)
def test_invalid_input_is_named(command, overrides: list[str], message: str) -> None:
    code, said = command(*overrides)
    assert code == 2, said
    assert message in said


def test_a_tp_size_that_does_not_divide_the_tokens_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    heads = ["model.n_heads=6", "model.n_kv_heads=6", "model.dim=96", "model.ffn_dim=192", "parallel.tp_size=3"]
    with pytest.raises(ConfigError, match="has 4096 tokens; set model.vocab_size=4096$"):
        check_inputs(load_config(CONFIG, [*heads, "model.vocab_size=4095"]))
    check_inputs(load_config(CONFIG, [*heads, "model.vocab_size=4096"]))


def test_a_truncated_shard_is_named(command, truncated_shard: Path) -> None:
    code, said = command(f"data.sources.0.paths=[{truncated_shard}]")
    assert code == 2
    assert str(truncated_shard) in said
    assert "truncated" in said


def test_a_folder_with_another_run_is_refused_unless_fresh(command, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "quickstart")
    folder.create()
    config = load_config(CONFIG, [f"run.dir={tmp_path}/runs", f"data.index_dir={tmp_path}/index"])
    folder.config.write_text(config.settled(None).to_yaml())
    no_data = "data.sources.0.paths=[nowhere/*]"
    assert "holds a run" not in command("model.dim=128", no_data)[1], "nothing has begun, so nothing can be corrupted"
    folder.metrics.path.write_text('{"step": 1}\n')
    code, said = command("model.dim=128", "train.steps=9")
    assert code == 2
    assert "model.dim: 256 -> 128" in said
    assert "train.steps" not in said.partition("must not change")[2], "steps may change"
    aside = tmp_path / "runs" / "quickstart.1"
    assert command("--fresh", "model.dim=128", no_data)[0] == 2
    assert not aside.exists(), "a refused start moves nothing"
    with ExitStack() as stack:
        claim_run(config, folder, True, None, IndexingLog(lambda: None), stack)
        assert (aside / "metrics.jsonl").exists()
        assert not folder.metrics.path.exists()


def test_print_config_shows_the_derived_deepspeed_config(command, capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = command("--print-config", "optim.grad_clip=0.7")
    out = capsys.readouterr().out
    assert code == 0
    assert "grad_clip: 0.7" in out
    assert "gradient_clipping: 0.7" in out


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_configs_are_valid(path: Path, command, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = command("--print-config", "--config", str(path))
    assert code == 0, said
    assert f"name: {path.stem.removesuffix('-tp2')}" in capsys.readouterr().out


def test_text_that_the_tokenizer_cannot_spell_is_refused_before_anything_is_written(command, tmp_path: Path) -> None:
    path = foreign_pieces(tmp_path / "named.model")
    fitting = [f"data.tokenizer={path}", f"model.vocab_size={Tokenizer(path).vocab_size}"]
    code, said = command(*fitting)
    assert code == 2
    assert "cannot spell the text of source 'pile'" in said
    assert not (tmp_path / "runs").exists()


def test_only_a_run_past_its_first_save_can_lack_a_checkpoint(tmp_path: Path) -> None:
    config = load_config(CONFIG, [f"run.dir={tmp_path}", "checkpoint.every=4"])
    folder = RunFolder(tmp_path / "quickstart")
    folder.create()
    store = CheckpointStore(folder.checkpoints, config.checkpoint)
    folder.metrics.append({"step": 4})
    check_checkpoints_there(store, config, folder)  # killed between the step's record and its save
    folder.metrics.append({"step": 5})
    with pytest.raises(ConfigError, match="has records of 5 steps, but .* has no complete checkpoint"):
        check_checkpoints_there(store, config, folder)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["index", "train_tokenizer"])  # which import no torch
def test_a_script_starts_its_own_command_wherever_python_looks_for_modules(name: str, tmp_path: Path) -> None:
    """With -P the folder of the script, in which `pretrain` is another module, is not on sys.path."""
    path = ROOT / "launch" / f"{name}.py"
    command = [sys.executable, "-P", str(path), "--no-such-option"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, check=False)
    assert ran.returncode == 2, ran.stderr
    assert f"usage: python launch/{path.name}" in ran.stderr
