"""Adapters train as peft trains them, in every layout, and leave the model under them as it is."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import LlamaForCausalLM

from pretrain.checkpoint.store import Checkpoint
from pretrain.checkpoint.weights import CheckpointWeights
from pretrain.exchange import hf
from pretrain.exchange.peft import peft_name
from pretrain.model.transformer import Transformer
from pretrain.model.weights import trained_specs, weight_specs
from pretrain.topology import Topology
from tests.distributed.lora import BASE, LORA, OPTIM, RATE, STAGES, STEPS, batches
from tests.distributed.ranks import run_ranks
from tests.pretrain.exchange.test_exchange import Memory
from tests.reference_model import Weights, pieces

MODEL = BASE.model_copy(update={"lora": LORA})
LAYOUTS = [(1, 2), (2, 2)]  # (tp_size, dp_size); equal numbers of dp ranks draw equal dropout


def write_base(folder: Path) -> None:
    """Write a model whose norms are drawn too, as Hugging Face's layout has it."""
    model = Transformer(BASE)
    model.initialize(seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
    folder.mkdir()
    hf.write_config(folder, BASE, 64, torch.float32, {})
    hf.write_weights(folder, Memory(model), weight_specs(BASE), torch.float32, 1 << 30)


def adapters_in(folder: Path) -> Weights:
    weights = CheckpointWeights(Checkpoint(folder, 0, [], 0.0), trained_specs(MODEL))
    return {name: weights.read(name) for name in trained_specs(MODEL)}


def reference(base: Path, initial: Weights) -> tuple[list[tuple[float, float]], Weights]:
    """Train with peft, piece by piece; return the loss and gradient norm of each step, and the adapters."""
    config = peft.LoraConfig(r=LORA.r, lora_alpha=LORA.alpha, lora_dropout=0.0, target_modules="all-linear")
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base, attn_implementation="eager"), config)
    peft.set_peft_model_state_dict(model, {peft_name(name): weight for name, weight in initial.items()})
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(parameters) == len(initial), "peft trains what we train"
    optimizer = torch.optim.AdamW(parameters, RATE, OPTIM.betas, OPTIM.eps, OPTIM.weight_decay)
    history = []
    for tokens, segment_ids in batches():
        losses = []
        for piece, is_learned in zip(pieces(tokens, segment_ids), pieces(segment_ids > 0, segment_ids), strict=True):
            if len(piece) > 1:
                logits = model(input_ids=piece[None, :-1]).logits[0]
                losses.append(torch.nn.functional.cross_entropy(logits, piece[1:], reduction="none")[is_learned[1:]])
        loss = torch.cat(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, OPTIM.grad_clip)
        optimizer.step()
        history.append((loss.item(), norm.item()))
    state = peft.get_peft_model_state_dict(model)
    return history, {name: state[peft_name(name)].detach() for name in initial}


@pytest.mark.distributed
def test_adapters_train_as_peft_trains_them_in_every_layout(topology: Topology, tmp_path: Path) -> None:
    base, folders = tmp_path / "base", [tmp_path / f"{tp_size}x{dp_size}" for tp_size, dp_size in LAYOUTS]
    write_base(base)
    for i, (tp_size, dp_size) in enumerate(LAYOUTS):
        others = map(str, folders[i - 1 : i])
        run_ranks(tp_size * dp_size, "tests.distributed.lora", str(tp_size), str(base), str(folders[i]), *others)
    initial = adapters_in(folders[0] / "1" / "0")
    history, wanted = reference(base, initial)
    figures = [json.loads((folder / "figures.json").read_text()) for folder in folders]
    for folder, cases in zip(folders, figures, strict=True):
        for stage in STAGES:
            for name, weight in adapters_in(folder / str(stage) / "0").items():
                assert torch.equal(weight, initial[name]), f"{folder}, {stage}: {name} is drawn alike everywhere"
            for name, weight in adapters_in(folder / str(stage) / str(STEPS)).items():
                torch.testing.assert_close(weight, wanted[name], rtol=0, atol=1e-5, msg=f"{folder}, {stage}: {name}")
        for case, found in cases.items():
            near = 1e-5 if case.startswith("fp32") else 5e-2  # the gradient in bf16
            if "dropout=0.3" not in case:
                wanted_steps = history[: len(found)]
                assert found == [pytest.approx(step, rel=near) for step in wanted_steps], case
    for case in ("fp32 dropout=0.3 1", "fp32 dropout=0.3 3"):
        masked = [cases[case] for cases in figures]
        assert masked[0] == [pytest.approx(step, rel=1e-5) for step in masked[1]], "masks do not depend on tp_size"
        assert masked[0][0] != pytest.approx(history[0], rel=1e-3)
