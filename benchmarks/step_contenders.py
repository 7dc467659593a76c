"""The contenders of `benchmarks/step.py`, one process each: training steps of one model on the same rows.

It starts them and writes orders to stdin, a line of JSON each: how many steps to make, or to profile. The answer is a
line of JSON too. All contenders start from the same weights, so the losses of their first steps have to agree.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TextIO

if __name__ == "__main__":
    # The packages of the checkout that is measured; the files beside this one always come from here.
    sys.path.insert(0, json.loads(sys.argv[1])["root"])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # DeepSpeed prints to stdout, from its import on

import torch
from plain_llama import PlainLlama
from step import Settings, Task
from step_profile import step_profile
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.profiler import record_function
from training_rows import Rows

from pretrain.deepspeed_keys import deepspeed_config
from pretrain.engine import Engine
from pretrain.exchange.hf import hf_name
from pretrain.model.size import flops_per_token, parameter_count
from pretrain.model.transformer import LlamaConfig
from pretrain.optim import OptimConfig
from pretrain.parallel_config import ParallelConfig
from pretrain.run.metrics import Meter
from pretrain.topology import started

Step = Callable[[], float]  # makes one optimizer step and returns its loss, in nats

OPTIM = OptimConfig(learning_rate=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, grad_clip=1.0)
CHECKED_STEPS = 3  # whose losses are compared
PRODUCT_SIZE, PRODUCTS = 2048, 8  # rows and columns of the matrices of the peak's measurement; products in a step


def draw(task: Task) -> Rows:
    return Rows.draw(task.rows, task.seq_len, task.model["vocab_size"], task.document_tokens)


class InitialWeights:
    """The weights that all contenders start from; a `pretrain.model.weights.Weights`."""

    def __init__(self, config: LlamaConfig) -> None:
        model = PlainLlama(config)
        generator = torch.Generator().manual_seed(0)
        self.by_name = {name: parameter.detach() for name, parameter in model.named_parameters()}
        for weight in self.by_name.values():
            if weight.dim() > 1:
                weight.normal_(std=0.02, generator=generator)

    def read(self, name: str, index: int = 0, count: int = 1) -> Tensor:
        assert count == 1
        return self.by_name[name]


def headrace(settings: Settings) -> Step:
    """Train with `pretrain.engine.Engine`: DeepSpeed's ZeRO on one rank, as a run on one device does."""
    task = settings.task
    parallel = ParallelConfig.model_validate({**task.parallel, "compile": settings.compiled})
    topology = started(parallel).__enter__()  # the groups are needed until the process ends
    config = LlamaConfig.model_validate(task.model)
    ds_config = deepspeed_config(parallel, OPTIM, task.precision, {})  # type: ignore[arg-type]
    engine = Engine(config, OPTIM, parallel, ds_config, task.rows, 1, topology, seed=0)
    engine.set_weights(InitialWeights(config))
    rows, meter = draw(task), _RecordingMeter()
    n_targets = rows.n_targets
    return lambda: engine.train_step(rows.tokens, rows.segment_ids, n_targets, 0, OPTIM.learning_rate, meter).loss


class _RecordingMeter(Meter):
    """Shows the parts of a step to the profiler."""

    def part(self, name: str) -> AbstractContextManager[None]:  # type: ignore[override]
        return record_function(name)


def plain(settings: Settings) -> Step:
    """Train the model of `plain_llama.py`, compiled as a whole."""
    config = LlamaConfig.model_validate(settings.task.model)
    model = PlainLlama(config)
    model.load_state_dict(InitialWeights(config).by_name, strict=not config.tie_embeddings)
    rows = draw(settings.task)
    mask = rows.visible() if settings.task.document_tokens else None
    optimizer = MixedPrecisionAdamW(model, settings.task.precision)
    forward = torch.compile(model, dynamic=False, fullgraph=True) if settings.compiled else model
    return lambda: optimizer.step(forward(rows.tokens[:, :-1], rows.targets, rows.positions, mask))


def hugging_face(settings: Settings) -> Step:
    """Train `LlamaForCausalLM` of transformers with SDPA, as its Trainer would.

    It learns where documents begin as from its own packing collator: by position_ids that start anew, of which it makes
    a block-diagonal mask. Without them it is causal over the row; compiled, it makes a mask for that too.
    """
    from transformers import LlamaConfig, LlamaForCausalLM  # takes seconds, and no other contender needs it

    config = LlamaConfig.model_validate(settings.task.model)
    described = LlamaConfig(
        hidden_size=config.dim,
        intermediate_size=config.hidden_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.kv_heads,
        vocab_size=config.vocab_size,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_embeddings,
        max_position_embeddings=settings.task.seq_len,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(described).train()
    weights = {hf_name(name): weight for name, weight in InitialWeights(config).by_name.items()}
    model.load_state_dict(weights, strict=not config.tie_embeddings)
    rows = draw(settings.task)
    inputs = {"input_ids": rows.tokens[:, :-1], "labels": rows.targets, "shift_labels": rows.targets}
    if settings.task.document_tokens:
        inputs["position_ids"] = rows.positions
    optimizer = MixedPrecisionAdamW(model, settings.task.precision)
    forward = torch.compile(model, dynamic=False) if settings.compiled else model
    return lambda: optimizer.step(forward(**inputs).loss)


class MixedPrecisionAdamW:
    """AdamW on fp32 weights, of which the model computes with copies in bf16; what DeepSpeed does for Headrace.

    In fp32 the model's weights are the optimizer's own.
    """

    def __init__(self, model: nn.Module, precision: str) -> None:
        self._weights = list(model.parameters())
        self._masters = self._weights
        if precision == "bf16":
            self._masters = [weight.detach().clone() for weight in self._weights]
            model.to(torch.bfloat16)
        groups = [
            {"params": [w for w in self._masters if w.dim() > 1], "weight_decay": OPTIM.weight_decay},
            {"params": [w for w in self._masters if w.dim() <= 1], "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(groups, lr=OPTIM.learning_rate, betas=OPTIM.betas, eps=OPTIM.eps, fused=True)

    def step(self, loss: Tensor) -> float:
        """Make the step of a loss and return it."""
        loss.backward()
        with record_function("optimizer"), torch.no_grad():
            if self._masters is not self._weights:
                for master, weight in zip(self._masters, self._weights, strict=True):
                    assert weight.grad is not None
                    master.grad, weight.grad = weight.grad.float(), None
            nn.utils.clip_grad_norm_(self._masters, OPTIM.grad_clip)
            self._adamw.step()
            self._adamw.zero_grad()
            if self._masters is not self._weights:
                torch._foreach_copy_(self._weights, self._masters)
        return loss.item()


def matrix_product(settings: Settings) -> Step:
    """Multiply square matrices, for the machine's peak."""
    dtype = torch.bfloat16 if settings.task.precision == "bf16" else torch.float32
    left, right = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE).to(dtype) for _ in range(2))

    def step() -> float:
        for _ in range(PRODUCTS):
            torch.mm(left, right)
        return math.nan

    return step


CONTENDERS: dict[str, Callable[[Settings], Step]] = {
    "headrace": headrace,
    "hugging_face": hugging_face,
    "plain": plain,
    "matrix_product": matrix_product,
}


def prepare(step: Step) -> dict[str, object]:
    """Make steps until nothing is compiled any more, then measure memory; return what the parent has to know."""
    begin = time.perf_counter()
    losses = [step() for _ in range(CHECKED_STEPS)]
    while True:
        before = compiled_graphs()
        step()
        if compiled_graphs() == before:
            break
    return {"losses": losses, "start_seconds": time.perf_counter() - begin, **memory(step)}


def compiled_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def memory(step: Step) -> dict[str, int | None]:
    """Measure the bytes of tensors that live on between steps, and what a step takes beyond them.

    The latter is how far the resident set grows during a step, beginning without any unused memory; so what Python and
    the compiler hold counts nowhere. None under another allocator than glibc's, which would not give that memory back.
    """
    gc.collect()
    libc = ctypes.CDLL("libc.so.6")
    if "LD_PRELOAD" in os.environ or not hasattr(libc, "malloc_trim"):
        return {"kept_bytes": tensor_bytes(), "step_bytes": None}
    libc.malloc_trim(0)
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    step()
    return {"kept_bytes": tensor_bytes(), "step_bytes": status_bytes("VmHWM") - before}


def status_bytes(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def tensor_bytes() -> int:
    """Sum the bytes of all tensors alive; what several share counts once."""
    storages = {}
    for tensor in gc.get_objects():
        if type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu":  # none of the compiler's stand-ins
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def describe(task: Task) -> dict[str, float]:
    """Return what a step amounts to: its tokens, and the operations of its matrix products for each of them."""
    config, context = LlamaConfig.model_validate(task.model), draw(task).context
    return {
        "parameters": parameter_count(config),
        "tokens": task.rows * task.seq_len,
        "flops_per_token": flops_per_token(config, context),
        "peak_flops_of_step": 2 * PRODUCT_SIZE**3 * PRODUCTS,
    }


def make_steps(step: Step, steps: int) -> dict[str, object]:
    """Time steps one by one, by the clock and by the CPU time of this process."""
    seconds, cpu_seconds, before = [], [], compiled_graphs()
    for _ in range(steps):
        begin, cpu_begin = time.perf_counter(), time.process_time()
        step()
        seconds.append(time.perf_counter() - begin)
        cpu_seconds.append(time.process_time() - cpu_begin)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "compiled_graphs": compiled_graphs() - before}


def main(answers: TextIO) -> None:
    settings = Settings.from_json(sys.argv[1])
    step = CONTENDERS[settings.contender](settings)
    print(json.dumps(prepare(step) | describe(settings.task)), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        answer = make_steps(step, order["steps"]) if "steps" in order else step_profile(step, order["profile"])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(answers)
