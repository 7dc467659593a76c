"""The parts of `benchmarks/gpu.py`, one process each. Each result is a line of JSON on stdout as soon as it is there.

With `--tiny` every part does on a small model what it does else, on a CPU too, so that the program can be tried without
a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    RESULTS = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # DeepSpeed prints to stdout, from its import on

import deepspeed
import torch
import torch.nn.functional as F
from gpu_training import training
from torch import Tensor
from training_rows import Rows

from pretrain.model.architecture import Heads
from pretrain.model.attention import AttentionBackend, attention_within_pieces
from pretrain.model.attention_choice import attention_backend
from pretrain.model.loss import next_token_targets, training_loss
from pretrain.model.pieces import pieces_of
from pretrain.model.transformer import LlamaConfig, Transformer
from pretrain.parallel_config import ParallelConfig
from pretrain.run.metrics import peak_flops_of
from pretrain.topology import Topology, started
from shards import ConfigError

Result = dict[str, object]

BACKENDS: tuple[AttentionBackend, ...] = ("sdpa", "flex", "varlen")


@dataclass(frozen=True)
class Job:
    """The orders of a part.

    Attributes:
        device: where to compute.
        tiny: whether to take sizes that only show that the part runs.
        ends: when to begin nothing new any more, by `time.monotonic`.
    """

    device: torch.device
    tiny: bool
    ends: float

    @property
    def time_is_up(self) -> bool:
        return time.monotonic() > self.ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=600.0)
    arguments = parser.parse_args()
    job = Job(torch.device(arguments.device), arguments.tiny, time.monotonic() + arguments.seconds)
    for result in PARTS[arguments.part](job):
        write(RESULTS, result)


def write(results: TextIO, result: Result) -> None:
    print(json.dumps(result), file=results, flush=True)


# What the machine is


def machine(job: Job) -> Iterator[Result]:
    """Name the device and the software, and measure what the device can do at most."""
    found: Result = {
        "device": torch.cuda.get_device_name() if job.device.type == "cuda" else platform.processor() or "CPU",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "deepspeed": deepspeed.__version__,
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
    }
    if job.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        found |= {"memory_gb": round(total / 1e9, 1), "free_memory_gb": round(free / 1e9, 1)}
        found["bf16_tflops_of_data_sheet"] = (peak_flops_of(torch.cuda.get_device_name()) or 0) / 1e12 or None
    size = 512 if job.tiny else 8192
    left, right = (torch.randn(size, size, device=job.device).bfloat16() for _ in range(2))
    milliseconds = time_of(partial(torch.mm, left, right), job.device)
    found["bf16_tflops_measured"] = round(2 * size**3 / milliseconds / 1e9, 1)
    found["product_size"] = size
    source = torch.empty((1 << 20) if job.tiny else (1 << 30), dtype=torch.uint8, device=job.device)
    target = torch.empty_like(source)
    milliseconds = time_of(partial(target.copy_, source), job.device)
    found["memory_gb_per_second"] = round(2 * source.numel() / milliseconds / 1e6)
    yield found


def time_of(action: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Return the median milliseconds of an action, after three that do not count."""
    for _ in range(3):
        action()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            action()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            action()
            times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


# Whether bf16 computes what fp32 does


@dataclass(frozen=True)
class Variant:
    """A way to compute the loss and its gradients."""

    backend: AttentionBackend
    precision: torch.dtype
    compiled: bool = False
    checkpointing: str = "none"

    @property
    def name(self) -> str:
        parts = [self.backend, str(self.precision).removeprefix("torch.")]
        parts += ["compiled"] if self.compiled else []
        parts += [f"checkpointing {self.checkpointing}"] if self.checkpointing != "none" else []
        return ", ".join(parts)


def variants() -> list[Variant]:
    """List what is compared with the fp32 reference, in the order of what matters most.

    The plain bf16 of SDPA, which sets the scale, comes first.
    """
    kinds = [(torch.bfloat16, False, "none"), (torch.bfloat16, True, "none"), (torch.float32, False, "none")]
    kinds += [(torch.bfloat16, True, "selective"), (torch.bfloat16, False, "selective")]
    kinds += [(torch.bfloat16, True, "full"), (torch.bfloat16, False, "full")]
    return [Variant(backend, *kind) for kind in kinds for backend in BACKENDS]


def correctness(job: Job) -> Iterator[Result]:
    """Compare loss and gradients of every way to compute them with those of fp32, SDPA and whole logits.

    A gradient's error is the norm of the difference by the norm of the reference, the largest over all weights. In fp32
    it may be 1e-3. In bf16 plain SDPA's own error is the scale: another way may have half as much again. The loss's
    error, relative too, may be 2e-3.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    if job.tiny:
        sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 512}
        rows = Rows.draw(2, 64, 512, 20)
    else:
        sizes = {"dim": 512, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "vocab_size": 32_000, "qk_norm": True}
        rows = Rows.draw(4, 1024, 32_000, 200)  # in two chunks of the loss
    config = LlamaConfig.model_validate(sizes)
    with started(ParallelConfig()) as here:
        wanted = reference_gradients(config, rows, here.device)
        scale = None
        for variant in variants():
            if job.time_is_up:
                yield {"variant": variant.name, "verdict": "not run: no time left"}
                continue
            result = compared(variant, config, rows, here, wanted, scale)
            if variant == Variant("sdpa", torch.bfloat16) and "gradient_error" in result:
                scale = float(str(result["gradient_error"]))
            yield result


Gradients = dict[str, Tensor]


def reference_gradients(config: LlamaConfig, rows: Rows, device: torch.device) -> tuple[float, Gradients]:
    """Compute the mean loss and its gradients in fp32, eagerly, from whole logits."""
    model = Transformer(config, attention="sdpa").to(device)
    model.initialize(seed=0)
    logits = model.train()(rows.tokens[:, :-1].to(device), rows.segment_ids[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), rows.targets.flatten().to(device))
    loss.backward()
    return loss.item(), gradients_of(model)


def gradients_of(model: Transformer) -> Gradients:
    return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def compared(
    variant: Variant,
    config: LlamaConfig,
    rows: Rows,
    here: Topology,
    wanted: tuple[float, Gradients],
    scale: float | None,
) -> Result:
    """Return how far a variant is from the reference, and whether that is as it should be."""
    (wanted_loss, wanted_gradients), device = wanted, here.device
    torch._dynamo.reset()
    parallel = ParallelConfig(
        attention=variant.backend, compile=variant.compiled, activation_checkpointing=variant.checkpointing
    )
    try:
        backend = attention_backend(parallel, here, config.heads, variant.precision)
        model = Transformer(config, parallel, backend).to(device)
        model.initialize(seed=0)
        model.to(variant.precision).train()
        targets = next_token_targets(rows.tokens.to(device), rows.segment_ids)
        head = partial(training_loss, targets=targets, z_loss=0.0, compiled=variant.compiled and device.type == "cuda")
        loss = model(rows.tokens[:, :-1].to(device), rows.segment_ids[:, :-1], head).total / rows.n_targets
        loss.backward()
        found = gradients_of(model)
    except ConfigError as error:
        return {"variant": variant.name, "verdict": f"not for this device: {error}"}
    except Exception as error:  # a variant that fails must not take the others with it
        return {"variant": variant.name, "verdict": f"failed: {type(error).__name__}: {str(error)[:300]}"}
    errors = {name: float((found[name] - g).norm() / g.norm()) for name, g in wanted_gradients.items()}
    worst = max(errors, key=lambda name: errors[name])
    loss_error = abs(loss.item() - wanted_loss) / wanted_loss
    bound = 1e-3 if variant.precision == torch.float32 else 1.5 * scale if scale else 0.1
    return {
        "variant": variant.name,
        "loss_error": loss_error,
        "gradient_error": errors[worst],
        "worst_weight": worst,
        "bound": bound,
        "verdict": "right" if errors[worst] <= bound and loss_error <= 2e-3 else "WRONG",
    }


# How fast attention is


def attention(job: Job) -> Iterator[Result]:
    """Time every backend on the shapes of two models, with long and with short documents."""
    shapes = {"1b": (8, 2048, 16, 128), "7b": (2, 4096, 32, 128)}
    if job.tiny:
        shapes = {"tiny": (2, 64, 4, 16)}
    with started(ParallelConfig()) as here:
        for (name, (rows, length, heads, head_dim)), share, backend in itertools.product(
            shapes.items(), (1, 5), BACKENDS
        ):
            label: Result = {"shape": f"{name}: {rows} x {length}, {heads} heads of {head_dim}",
                             "documents": length // share, "backend": backend}  # fmt: skip
            if job.time_is_up:
                yield label | {"not_run": "no time left"}
                continue
            batch = Rows.draw(rows, length, 100, length // share if share > 1 else None)
            try:
                yield label | time_attention(here, batch, heads, head_dim, backend)
            except Exception as error:  # another backend may work
                yield label | {"not_run": f"{type(error).__name__}: {str(error)[:300]}"}


def time_attention(here: Topology, batch: Rows, heads: int, head_dim: int, wanted: AttentionBackend) -> Result:
    """Time one layer's attention, forward alone and with its backward pass."""
    backend = attention_backend(ParallelConfig(attention=wanted), here, Heads(heads, heads, head_dim), torch.bfloat16)
    ids, device = batch.segment_ids[:, :-1], here.device
    shape = (*ids.shape, heads, head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    attend = attention_within_pieces(pieces_of(ids, device), backend)
    gradient = torch.randn(shape, device=device, dtype=torch.bfloat16)
    forward = time_of(lambda: attend(q, k, v), device)
    both = time_of(lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), gradient), device)
    flops = 2 * 2 * ids.numel() * heads * head_dim * batch.context / 2  # two products, half of them causal
    return {
        "forward_ms": round(forward, 3),
        "with_backward_ms": round(both, 3),
        "forward_tflops": round(flops / forward / 1e9, 1),
        "with_backward_tflops": round(3.5 * flops / both / 1e9, 1),  # its backward pass makes five products for two
    }


# How fast models train


def speed(job: Job, model: str) -> Iterator[Result]:
    """Try the settings of one of the shipped models, in `gpu_training.py`."""
    return training(model, job.tiny, job.ends)


PARTS: dict[str, Callable[[Job], Iterator[Result]]] = {
    "machine": machine,
    "correctness": correctness,
    "1b": partial(speed, model="1b"),
    "7b": partial(speed, model="7b"),
    "long": partial(speed, model="long"),
    "attention": attention,
    "125m": partial(speed, model="125m"),
}

if __name__ == "__main__":
    main()
