"""A vocabulary that tp_size does not divide trains, resumes, exports and generates as on one rank."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pretrain.checkpoint.store import CheckpointConfig, CheckpointStore
from pretrain.checkpoint.weights import CheckpointWeights
from pretrain.checkpoint.zero_files import read_partitions, whole
from pretrain.config import load_config
from pretrain.exchange.export import export
from pretrain.model.weights import weight_specs
from pretrain.run.run_folder import RunFolder
from tests.distributed.ranks import run_ranks, run_starts
from tests.tiny_run import write_config

SAMPLE = Path("shards/sample/tokenizer-4k.model")
VOCABULARY, STEPS = 4097, 2  # tokens; steps of each start
MULTIPLES = {True: 1, False: 64}  # model.vocab_multiple of runs with and without tied embeddings
# (tp_size, dp_size, ZeRO stage) of each start
LAYOUTS = [(1, 1, 1), (2, 1, 3), (4, 1, 1), (2, 2, 2), (1, 1, 1)]

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the sample's tokenizer with one more token, whose number no tp_size above 1 divides."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(SAMPLE.read_bytes())
    proto.pieces.add(piece="zzzzzz", score=-1e6, type=proto.SentencePiece.NORMAL)
    assert len(proto.pieces) == VOCABULARY
    path = tmp_path_factory.mktemp("tokenizer") / "4097.model"
    path.write_bytes(proto.SerializeToString())
    return path


def train(
    folder: Path,
    tokenizer: Path,
    tied: bool,
    layouts: list[tuple[int, int, int]],
    steps: int,
    precision: str = "fp32",
    multiple: int | None = None,
) -> list[dict]:
    """Start a run once for each layout, for a number of steps each; return its metrics."""
    folder.mkdir()
    model = {"vocab_size": VOCABULARY, "n_kv_heads": 4, "qk_norm": True, "tie_embeddings": tied}
    model["vocab_multiple"] = MULTIPLES[tied] if multiple is None else multiple
    changes = {"data": {"tokenizer": str(tokenizer)}, "train": {"weight_hash_every": 1}, "optim": {"z_loss": 1e-2}}
    config = write_config(folder, "run", model=model, precision=precision, **changes)
    starts = []
    for i, (tp, dp, stage) in enumerate(layouts):
        split = f"parallel.sequence_parallel={str(tp > 1).lower()}"
        layout = [f"parallel.tp_size={tp}", f"parallel.zero_stage={stage}", split]
        starts.append((tp * dp, [f"train.steps={steps * (i + 1)}", *layout], ""))
    codes, output = run_starts(config, starts)
    assert codes == [[0] * world_size for world_size, _, _ in starts], output
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def newest(run: RunFolder) -> tuple[CheckpointWeights, Path]:
    store = CheckpointStore(run.checkpoints, CheckpointConfig())
    checkpoint = store.find(None)
    specs = weight_specs(load_config(run.config, begun=True).model)
    return CheckpointWeights(checkpoint, specs), checkpoint.folder / "engine"


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def runs(request: pytest.FixtureRequest, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the same steps on one rank (straight) and with a change of layout at each start (changed).

    The first has no padding, whatever the vocab_multiple of the second.
    """
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "straight", tokenizer, request.param, LAYOUTS[:1], STEPS * len(LAYOUTS), multiple=1)
    train(folder / "changed", tokenizer, request.param, LAYOUTS, STEPS)
    return folder


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_a_run_goes_on_at_every_tp_size(runs: Path) -> None:
    changed, straight = metrics(runs / "changed"), metrics(runs / "straight")
    assert [m["batch_hash"] for m in changed] == [m["batch_hash"] for m in straight]
    for key, tolerance in {"loss": 1e-5, "grad_norm": 1e-3}.items():
        assert [m[key] for m in changed] == pytest.approx([m[key] for m in straight], rel=tolerance), key
    weights, _ = newest(RunFolder(runs / "changed" / "run"))
    wanted, _ = newest(RunFolder(runs / "straight" / "run"))
    for name in weight_specs(load_config(runs / "changed" / "run" / "config.yaml", begun=True).model):
        torch.testing.assert_close(weights.read(name), wanted.read(name), rtol=1e-3, atol=1e-4)


def test_a_run_has_the_losses_of_one_rank_and_an_export_without_padding(
    runs: Path, tokenizer: Path, tmp_path: Path
) -> None:
    config = load_config(runs / "straight" / "run" / "config.yaml", begun=True)
    tp_size = 4 if config.model.tie_embeddings else 2
    found = train(tmp_path / "split", tokenizer, config.model.tie_embeddings, [(tp_size, 1, 1)], 3)
    for key in ("loss", "grad_norm"):
        wanted = [m[key] for m in metrics(runs / "straight")[:3]]
        assert [m[key] for m in found] == pytest.approx(wanted, rel=1e-5 if key == "loss" else 1e-4), key
    run = RunFolder(tmp_path / "split" / "run")
    weights, engine = newest(run)
    assert_padding_is_zero(engine, "embedding.weight")
    export(weights, config.model, config.data, tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert theirs.get_input_embeddings().weight.shape == theirs.get_output_embeddings().weight.shape
    assert torch.equal(theirs.get_input_embeddings().weight, weights.read("embedding.weight"))
    assert len(theirs.get_output_embeddings().weight) == VOCABULARY
    arguments = ("--prompt", "Once", "--max-tokens", "6", "--temperature", "0")
    said = [
        run_ranks(count, "pretrain", "generate", *source, *arguments)
        for count, source in ((1, ("--run", str(run.root))), (tp_size, ("--model", str(tmp_path / "hf"))))
    ]
    assert said[0].splitlines()[-1] == said[1].splitlines()[-1] != ""


def assert_padding_is_zero(engine: Path, name: str) -> None:
    """Read what pads the last rank's rows, and its moments, from a checkpoint's files."""
    ranks, _ = read_partitions(engine)
    for state in ("fp32", "exp_avg", "exp_avg_sq"):
        last = whole(ranks[-1], name, state)
        held = VOCABULARY - (len(ranks) - 1) * len(last)
        assert 0 < held < len(last)
        assert last[:held].any()
        assert not last[held:].any()


def test_bf16_keeps_the_padding_at_zero_in_every_zero_stage(tokenizer: Path, tmp_path: Path) -> None:
    found = train(tmp_path / "split", tokenizer, False, [(2, 1, 1), (2, 1, 2), (2, 1, 3)], 2, "bf16")
    alone = train(tmp_path / "alone", tokenizer, False, [(1, 1, 1)], 6, "bf16")
    assert [m["loss"] for m in found] == pytest.approx([m["loss"] for m in alone], rel=1e-2)
    _, engine = newest(RunFolder(tmp_path / "split" / "run"))
    for name in ("embedding.weight", "output.weight"):
        assert_padding_is_zero(engine, name)


def test_the_hash_of_a_state_is_that_of_its_whole_weights(runs: Path, tmp_path: Path) -> None:
    run = RunFolder(runs / "changed" / "run")
    last = metrics(runs / "changed")[-1]
    wanted = [last["weight_hash"], last["optimizer_hash"]]
    for ranks, tp_size in ((2, 2), (4, 4)):
        scratch = tmp_path / f"{ranks}-{tp_size}"
        scratch.mkdir()
        step = str(last["step"])
        said = run_ranks(ranks, "tests.distributed.state_hash", str(run.root), step, str(tp_size), str(scratch))
        found = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
        assert found == dict.fromkeys(found, wanted)


def test_a_run_starts_from_a_model_with_more_rows_than_tokens(tokenizer: Path, tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, intermediate_size=64,
        vocab_size=4160, rms_norm_eps=1e-5, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    shutil.copy(tokenizer, tmp_path / "model" / "tokenizer.model")
    model = {"vocab_size": VOCABULARY, "n_kv_heads": 4, "tie_embeddings": False}
    losses = {}
    for tp_size in (1, 2):
        folder = tmp_path / str(tp_size)
        folder.mkdir()
        changes = {"data": {"tokenizer": str(tokenizer)}, "init_from": str(tmp_path / "model")}
        path = write_config(folder, "run", model=model, parallel={"tp_size": tp_size}, **changes)
        codes, output = run_starts(path, [(tp_size, ["train.steps=2"], "")])
        assert codes == [[0] * tp_size], output
        assert "the last 63 rows of its embedding have no token" in output
        losses[tp_size] = [m["loss"] for m in metrics(folder)]
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)
