"""The parts of `benchmarks/gpu.py`, one process each. Each result is a line of JSON on stdout as soon as it is there.

With `--tiny` every part does on a small model what it does else, on a CPU too, so that the program can be tried without
a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
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
from device_trace import device_times, synchronizations
from step_profile import step_profile
from throughput import Training
from torch import Tensor
from training_rows import Rows

from pretrain.config import RunConfig, load_config
from pretrain.model.attention import AttentionBackend, attention_within_pieces
from pretrain.model.attention_choice import attention_backend, with_fastest_attention
from pretrain.model.loss import next_token_targets, training_loss
from pretrain.model.pieces import pieces_of
from pretrain.model.size import flops_per_token, memory_per_rank, parameter_count
from pretrain.model.transformer import ModelConfig, Transformer
from pretrain.run.metrics import peak_flops_of
from pretrain.topology import ParallelConfig, Topology, started
from shards import ConfigError

Result = dict[str, object]

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
BACKENDS: tuple[AttentionBackend, ...] = ("sdpa", "flex", "varlen")


@dataclass(frozen=True)
class Job:
    """What a part is asked to do.

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
    config = ModelConfig.model_validate(sizes)
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


def reference_gradients(config: ModelConfig, rows: Rows, device: torch.device) -> tuple[float, Gradients]:
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
    config: ModelConfig,
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
        backend = attention_backend(parallel, here, config.head_dim, variant.precision)
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


# How fast it trains


@dataclass(frozen=True)
class Point:
    """Settings to try: overrides of a config, the micro-batch, and the documents' length in tokens (None: a row's)."""

    micro_batch_size: int
    overrides: tuple[str, ...] = ()
    document_tokens: int | None = None
    traced: bool = False  # whether to look into a step: kernels, and where the host waits

    @property
    def name(self) -> str:
        parts = [f"{self.micro_batch_size} rows", *(text.removeprefix("parallel.") for text in self.overrides)]
        parts += [f"documents of {self.document_tokens}"] if self.document_tokens else []
        return ", ".join(parts)


SELECTIVE, FULL = "parallel.activation_checkpointing=selective", "parallel.activation_checkpointing=full"
EAGER, FLEX = "parallel.compile=false", "parallel.attention=flex"

# The most promising first, since time may run out.
POINTS = {
    "125m": (Point(16, traced=True), Point(32), Point(16, (EAGER,)), Point(16, (FLEX,))),
    "1b": (
        Point(8, traced=True),
        Point(16, (SELECTIVE,)),
        Point(8, (FLEX,)),
        Point(8, (EAGER,)),
        Point(16),
        Point(8, document_tokens=400),
        Point(32, (FULL,)),
        Point(8, ("parallel.attention=sdpa",)),
    ),
    "7b": (
        Point(1, (SELECTIVE,), traced=True),
        Point(2, (FULL,)),
        Point(2, (SELECTIVE,)),
        Point(1, (SELECTIVE, FLEX)),
    ),
}
FILES = {"125m": "llama-125m-pile.yaml", "1b": "llama-1b-dolma.yaml", "7b": "llama-7b-pile-dolma.yaml"}
MICRO_STEPS = {"125m": 2, "1b": 2, "7b": 4}  # an update of the weights takes the longer, the larger the model
TINY = (
    "model.dim=64", "model.n_heads=4", "model.n_layers=2", "model.ffn_dim=128", "model.vocab_size=512",
    "data.seq_len=64", "metrics.peak_flops=1e11",
)  # fmt: skip
MEMORY_SHARE = 0.92  # of a device that a model may be estimated to need


def training(job: Job, model: str) -> Iterator[Result]:
    """Try the settings of a model one after another; of a model too large, as many layers as fit."""
    overrides = ["parallel.zero_stage=1", "parallel.activation_checkpointing=none", *(TINY if job.tiny else ())]
    file = CONFIGS / FILES[model]
    with started(load_config(file, overrides).parallel) as here:
        fastest = None
        for point in POINTS[model]:
            label: Result = {"model": model, "settings": point.name}
            if job.time_is_up:
                yield label | {"not_run": "no time left"}
                continue
            try:
                config = load_config(file, [*overrides, *point.overrides])
                if config.parallel.attention == "auto":
                    shape = config.attention_shape(here.dp_size)
                    fastest = fastest or with_fastest_attention(config.parallel, here, shape).attention
                    parallel = config.parallel.model_copy(update={"attention": fastest})
                    config = config.model_copy(update={"parallel": parallel})
                yield from label_all(label, try_layers(config, point, here, MICRO_STEPS[model]))
            except Exception as error:  # the next settings may work
                yield label | {"not_run": f"{type(error).__name__}: {str(error)[:300]}"}
            forget(here.device)


def label_all(label: Result, results: Iterator[Result]) -> Iterator[Result]:
    return (label | result for result in results)


def try_layers(config: RunConfig, point: Point, here: Topology, micro_steps: int) -> Iterator[Result]:
    """Try as many layers as are estimated to fit; if they do not, fewer."""
    for share in (MEMORY_SHARE, MEMORY_SHARE * 0.75):
        fitting = fitted(config, point, here, share)
        try:
            yield try_point(fitting, config, point, here, micro_steps)
            return
        except torch.OutOfMemoryError as error:
            yield {"layers": fitting.model.n_layers, "not_run": str(error)[:200]}
        forget(here.device)


def fitted(config: RunConfig, point: Point, here: Topology, share: float) -> RunConfig:
    """Return the config with the most layers that are estimated to fit into a share of the device's memory."""
    if here.device.type != "cuda":
        return config
    memory = share * torch.cuda.get_device_properties(here.device).total_memory
    layers = config.model.n_layers
    while layers > 1:
        fitting = config.model_copy(update={"model": config.model.model_copy(update={"n_layers": layers})})
        work = dataclasses.replace(fitting.workload(here.dp_size), micro_batch_size=point.micro_batch_size)
        if memory_per_rank(work).total <= memory:
            break
        layers -= 1
    return fitting


def try_point(config: RunConfig, whole: RunConfig, point: Point, here: Topology, micro_steps: int) -> Result:
    """Train some steps with the settings of a point; return what they took."""
    on_cuda = here.device.type == "cuda"
    left_over = torch.cuda.memory_allocated() if on_cuda else 0
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    training = Training(config, here, point.micro_batch_size, micro_steps, point.document_tokens)
    result: Result = {
        "layers": config.model.n_layers,
        "attention": config.parallel.attention,
        "parameters": parameter_count(config.model),
        "micro_batch_size": point.micro_batch_size,
        "micro_steps": micro_steps,
        "start_seconds": round(time.perf_counter() - begin, 1),
        "left_over_gb": round(left_over / 1e9, 2),
    }
    result |= training.measure(steps=4, warmup=2)
    if config.model.n_layers < whole.model.n_layers:
        result |= projected(config, whole, result)
    if on_cuda:
        result["waits_by_line"] = synchronizations(training.step)
    if point.traced:
        result["trace"] = device_times(training.step) if on_cuda else step_profile(training.step, 1)
    training.engine.deepspeed.destroy()
    return result


def projected(config: RunConfig, whole: RunConfig, result: Result) -> Result:
    """Return what the whole model would do, if all of its operations went as fast as those of this part."""
    peak = flops_per_token(whole.model, config.data.seq_len)
    part = flops_per_token(config.model, config.data.seq_len)
    speed = float(str(result["tokens_per_second"]))
    return {"layers_of_whole": whole.model.n_layers, "tokens_per_second_of_whole": round(speed * part / peak)}


def forget(device: torch.device) -> None:
    """Free what settings leave behind, so that the next ones find the device as these did."""
    gc.collect()
    torch._dynamo.reset()  # beyond a number of variants of a block torch would give up compiling it
    if device.type == "cuda":
        torch.cuda.empty_cache()


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
    backend = attention_backend(ParallelConfig(attention=wanted), here, head_dim, torch.bfloat16)
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


PARTS: dict[str, Callable[[Job], Iterator[Result]]] = {
    "machine": machine,
    "correctness": correctness,
    "1b": partial(training, model="1b"),
    "7b": partial(training, model="7b"),
    "attention": attention,
    "125m": partial(training, model="125m"),
}

if __name__ == "__main__":
    main()
